"""What every method costs: time and peak memory of forward + backward, beside plain KD and beside straightforward code.

    python benchmarks/losses.py [--methods kd apd] [--settings cityscapes/8 ade20k/4] [--quick]
    python benchmarks/losses.py --blocks [--settings ade20k/8]

Networks are not run: student and teacher are random outputs of the sizes that a SegFormer-B0 and a ResNet-101 give, and
a loss reads and differentiates them. A method stands in its default config. ``--blocks`` shows instead how time and
memory of the quadratic maps follow ``block_rows``. Prints Markdown.

Straightforward code (``_dense.py``) is what the formula says at sight: a loop over classes, a whole quadratic map. Its
value and gradient are compared with the method's on a small size before anything is timed.

Peak memory is what a call allocates beyond its inputs, at most at one time: saved tensors, temporary buffers, the
gradients and the recomputation of the backward pass. On a CPU it is summed from the allocations and releases that
torch.profiler records of PyTorch's allocator, in a run that is not timed; buffers inside MKL and oneDNN are not seen.
On CUDA it is ``torch.cuda.max_memory_allocated``. What a method keeps from step to step is in the column "state".
"""

import argparse
import contextlib
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise reports its starts

import torch
from _dense import DENSE, Dense
from _table import machine, markdown
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from segdistill.losses import IGNORE_INDEX
from segdistill.methods import METHODS, build_offline, build_online, load, parse_method
from segdistill.methods.method import Method
from segdistill.models.operators import ConvMLP, PooledAttention
from segdistill.models.outputs import ModelInfo, Outputs

Action = Callable[[], object]
MIB = 2**20
SLOW = 5.0  # seconds


@dataclass(frozen=True)
class Setting:
    """A crop of the literature, and the stride of logits and last features on it."""

    size: tuple[int, int]
    num_classes: int
    stride: int

    def at(self, stride: int) -> tuple[int, int]:
        height, width = self.size
        return -(-height // stride), -(-width // stride)


SETTINGS = {
    "cityscapes/8": Setting((512, 1024), 19, 8),
    "cityscapes/4": Setting((512, 1024), 19, 4),
    "ade20k/8": Setting((512, 512), 150, 8),
    "ade20k/4": Setting((512, 512), 150, 4),
}


@dataclass(frozen=True)
class Network:
    """Widths of what a network gives."""

    kind: str
    widths: tuple[int, int, int, int]  # of the encoder's stages
    last: int
    dilated: bool = False  # at stride 8: the last stage has stride 16

    def info(self, setting: Setting) -> ModelInfo:
        strides = (4, 8, 16, 16 if self.dilated and setting.stride == 8 else 32)
        stride = setting.stride
        return ModelInfo(setting.num_classes, self.widths, strides, self.last, stride, stride, self.kind)


STUDENT = Network("vit", (32, 64, 160, 256), 128)  # SegFormer-B0, its decoder narrowed to 128
TEACHER = Network("cnn", (256, 512, 1024, 2048), 512, dilated=True)  # ResNet-101 with a PSPNet head
PEER = Network("cnn", (64, 128, 256, 512), 128)  # ResNet-18: co-trained with the student


@dataclass(frozen=True)
class Inputs:
    """One batch: what the networks gave for it, and its labels."""

    setting: Setting
    student: Outputs
    teacher: Outputs
    peer: Outputs
    target: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for one in (self.student, self.peer) for leaf in (one.logits, *one.features, one.last_feature)]


class Lender(nn.Module):
    """What a method may borrow from a student: the attention and the MLP of its first stage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.mlp = PooledAttention(width, heads=1, grid=16), ConvMLP(width, expansion=4)


def draw(setting: Setting, batch: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random outputs. The labels are blocks of about twelve classes an image, a tenth of them ignored."""
    torch.manual_seed(0)

    def outputs(network: Network, *, grad: bool) -> Outputs:
        def values(channels: int, stride: int) -> Tensor:
            drawn = torch.randn(batch, channels, *setting.at(stride), device=device)
            return drawn.to(dtype).requires_grad_(grad)

        info = network.info(setting)
        stages = tuple(itertools.starmap(values, zip(info.feature_channels, info.feature_strides, strict=True)))
        logits = values(info.num_classes, info.logits_stride)
        return Outputs(logits, stages, values(info.last_channels, info.last_stride))

    shown = torch.randint(setting.num_classes, (batch, 12))
    blocks = shown.gather(1, torch.randint(12, (batch, 8 * 8))).unflatten(1, (8, 8))
    blocks[torch.rand(blocks.shape) < 0.1] = IGNORE_INDEX
    target = nn.functional.interpolate(blocks[:, None].float(), size=setting.size)[:, 0].long().to(device)
    return Inputs(setting, outputs(STUDENT, grad=True), outputs(TEACHER, grad=False), outputs(PEER, grad=True), target)


def build(name: str, setting: Setting, device: torch.device, **changes: Any) -> Method:
    """The method between the student and the teacher, or between the student and its peer."""
    torch.manual_seed(0)
    cls, config = parse_method({"name": name, **changes}, name)
    student = STUDENT.info(setting)
    if cls.kind == "offline":
        method = build_offline([config], student, TEACHER.info(setting))[name]
        lenders = {"vit": Lender(STUDENT.widths[0])}
    else:
        method = build_online([config], {"cnn": PEER.info(setting), "vit": student})[name]
        lenders = {"cnn": Lender(PEER.widths[0]), "vit": Lender(STUDENT.widths[0])}
    method.attach({name: lender.to(device) for name, lender in lenders.items()})
    return method.to(device)


def terms(method: Method, inputs: Inputs) -> dict[str, Tensor]:
    torch.manual_seed(1)  # what a method draws is the same in every run
    if method.kind == "offline":
        return method(inputs.student, inputs.teacher, inputs.target)
    return method({"cnn": inputs.peer, "vit": inputs.student}, inputs.target)


def whole(method: Method, inputs: Inputs) -> Callable[[], Tensor]:
    """The weighted sum of a method's terms."""
    return lambda: sum(method.weights[key.rpartition("/")[2]] * loss for key, loss in terms(method, inputs).items())


def compared_terms(method: Method, dense: Dense, inputs: Inputs) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        found = terms(method, inputs)
        return sum(found[term] for term in dense.terms)

    return loss


def straightforward(method: Method, dense: Dense, inputs: Inputs) -> Callable[[], Tensor]:
    """The dense version, in float32 as the method's loss is."""

    def loss() -> Tensor:
        torch.manual_seed(1)
        with torch.autocast(inputs.target.device.type, enabled=False):
            return dense.function(method, widened(inputs.student), widened(inputs.teacher), inputs.target)

    return loss


def widened(outputs: Outputs) -> Outputs:
    stages = tuple(stage.float() for stage in outputs.features)
    return Outputs(outputs.logits.float(), stages, outputs.last_feature.float())


def backward(loss: Callable[[], Tensor], method: Method, inputs: Inputs, autocast: torch.dtype | None = None) -> Action:
    """Forward and backward pass, down to the outputs of the networks; the gradients are there, and gone at the end."""

    def action() -> None:
        device = inputs.target.device.type
        with torch.autocast(device, autocast) if autocast else contextlib.nullcontext():
            value = loss()
        value.backward()
        for leaf in (*inputs.leaves, *method.parameters()):
            leaf.grad = None

    return action


def alone(name: str, dense: Dense) -> dict[str, Any]:
    """The config under which a method has the compared terms and no others."""
    kept = {f"{term}_weight" for term in dense.terms}
    fields = load(name).Config.__dataclass_fields__
    off = {field: 0.0 for field in fields if field.endswith("_weight") and field not in kept}
    return {**off, **dense.changes}


def agree(name: str, dense: Dense, device: torch.device) -> None:
    """Compares value and gradient of a term and of its straightforward version, on a small crop.

    Raises:
        AssertionError: they are not the same formula.
    """
    setting = Setting((64, 96), 7, 8)
    inputs = draw(setting, 2, device, torch.float32)
    method = build(name, setting, device, **alone(name, dense))
    found = []
    for loss in (compared_terms(method, dense, inputs), straightforward(method, dense, inputs)):
        gradients = torch.autograd.grad(value := loss(), inputs.leaves, allow_unused=True)
        found.append([value.detach(), *(gradient for gradient in gradients if gradient is not None)])
    for ours, theirs in zip(*found, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(
            ours, theirs, rtol=1e-3, atol=1e-3 * scale, msg=lambda text: f"{name}, {dense.label}: {text}"
        )


def peak_bytes(action: Action, device: torch.device) -> int:
    """The most bytes that an action holds at one time beyond what was there before it; see the head of the file."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _no_collection(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """What older garbage gives back would count as given back by what is measured."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def seconds(action: Action, device: torch.device, repeats: int = 1) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    wait()
    return (time.perf_counter() - started) / repeats


@dataclass(frozen=True)
class Cost:
    """What one action takes; ``rounds`` are its times, in the rounds in which all actions of a comparison alternate."""

    rounds: tuple[float, ...]
    peak: float
    projected: bool = False

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)

    @property
    def milliseconds(self) -> str:
        return self._marked(1000 * self.seconds)

    @property
    def mebibytes(self) -> str:
        return self._marked(self.peak / MIB)

    def times(self, other: "Cost") -> str:
        """How many times as long it takes as another action of the same rounds."""
        ratio = self.seconds / other.seconds
        if len(self.rounds) == len(other.rounds):
            ratio = statistics.median(one / two for one, two in zip(self.rounds, other.rounds, strict=True))
        return self._marked(ratio, other)

    def size(self, other: "Cost") -> str:
        """How many times as much memory it needs."""
        return self._marked(self.peak / max(other.peak, 1), other)

    def _marked(self, number: float, other: "Cost | None" = None) -> str:
        projected = self.projected or (other is not None and other.projected)
        digits = 0 if number >= 100 else 1 if number >= 10 else 2
        return f"{'~' if projected else ''}{number:.{digits}f}"


@dataclass(frozen=True)
class Bench:
    """How to measure."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    repeats: int
    budget: float  # seconds for the rounds of one comparison; more than one round only if they fit
    limit: float  # seconds; what is quadratic and expected to take longer is projected from smaller crops

    def compare(self, actions: Mapping[str, Action]) -> dict[str, Cost]:
        """Times actions in alternating rounds, so that a slow minute of the machine falls on all."""
        peaks, rounds = {}, {}
        for name, action in actions.items():
            peaks[name], took = self.first(action)
            if took is not None:
                rounds[name] = [took]
        quick = {name: action for name, action in actions.items() if name not in rounds}
        once = {name: seconds(action, self.device) for name, action in quick.items()}
        calls = {name: max(1, min(20, int(0.05 / took))) for name, took in once.items()}
        longest = sum(calls[name] * took for name, took in once.items())
        if longest > self.budget:
            rounds |= {name: [took] for name, took in once.items()}
        else:
            count = min(self.repeats, int(self.budget / longest)) if once else 0
            rounds |= {name: [] for name in once}
            for _, (name, action) in itertools.product(range(count), quick.items()):
                rounds[name].append(seconds(action, self.device, calls[name]))
        return {name: Cost(tuple(rounds[name]), peaks[name]) for name in actions}

    def first(self, action: Action) -> tuple[int, float | None]:
        """Peak memory of a call, after which all is warm, and its time if that is long: once is then enough."""
        started = time.perf_counter()
        peak = peak_bytes(action, self.device)
        took = time.perf_counter() - started
        return peak, took if took > SLOW else None

    def inputs(self, setting: Setting) -> Inputs:
        return draw(setting, self.batch, self.device, self.dtype)

    def action(self, loss: Callable[[], Tensor], method: Method, inputs: Inputs) -> Action:
        return backward(loss, method, inputs, self.dtype if self.dtype != torch.float32 else None)

    def projected(self, act: Callable[[Inputs], Action], setting: Setting, *, blocked: bool) -> Cost | None:
        """The cost of something quadratic by smaller crops, if that says it is too much to be run.

        Time grows from a quarter of the pixels as it did from a sixteenth to a quarter, memory as the area of the map
        or, where a block of rows is held at a time, as its width.
        """
        height, width = setting.size
        took = []
        for part in (4, 2):
            action = act(self.inputs(replace(setting, size=(height // part, width // part))))
            peak, known = self.first(action)
            took.append(known or seconds(action, self.device))
        whole = took[1] * min(max(took[1] / took[0], 4), 16)
        peak *= 4 if blocked else 16
        return Cost((whole,), peak, True) if whole > self.limit or peak > 0.7 * free_bytes(self.device) else None


def free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return free[0] if free else float("inf")


def state_bytes(method: Method) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*method.parameters(), *method.buffers()))


HEADER = ["method", "ms", "x kd", "peak, MiB", "x kd", "state, MiB", "straightforward: time", "memory"]


def rows_of(name: str, inputs: Inputs, bench: Bench) -> list[list[object]]:
    """One row for a method, with the straightforward version beside it if that is the whole method ...

    ... and one row for each of its terms that has a straightforward version, if the method has other terms too.
    """
    setting, device = inputs.setting, bench.device
    plain = build("kd", setting, device)
    kd = bench.action(whole(plain, inputs), plain, inputs)
    method = build(name, setting, device)
    compared = DENSE.get(name, ())
    lone = [dense for dense in compared if set(method.weights) == set(dense.terms) and not dense.changes]

    def ours(some: Inputs) -> Action:
        again = build(name, some.setting, device)
        return bench.action(whole(again, some), again, some)

    def row(
        label: str, method: Method, ours: Callable[[Inputs], Action], dense: Dense | None, *, quadratic: bool
    ) -> list[object]:
        # What may take minutes or all memory is tried on small crops first.
        skipped: dict[str, Cost | None] = {}
        actions = {"kd": kd} if name == "kd" else {"kd": kd, "ours": ours(inputs)}
        if quadratic:
            skipped["ours"] = bench.projected(ours, setting, blocked=True)
        if dense is not None:

            def theirs(some: Inputs) -> Action:
                return bench.action(straightforward(method, dense, some), method, some)

            actions["dense"] = theirs(inputs)
            if dense.quadratic:
                skipped["dense"] = bench.projected(theirs, setting, blocked=False)
        costs = bench.compare({key: action for key, action in actions.items() if skipped.get(key) is None})
        costs |= {key: cost for key, cost in skipped.items() if cost is not None}
        cost, base = costs.get("ours", costs["kd"]), costs["kd"]
        against = ["-", "-"] if dense is None else [costs["dense"].times(cost), costs["dense"].size(cost)]
        return [
            label, cost.milliseconds, cost.times(base), cost.mebibytes, cost.size(base),
            f"{state_bytes(method) / MIB:.1f}", *against,
        ]  # fmt: skip

    quadratic = any(dense.quadratic for dense in compared)
    rows = [row(name, method, ours, lone[0] if lone else None, quadratic=quadratic)]
    for dense in compared:
        if dense in lone:
            continue
        changes = alone(name, dense)
        single = build(name, setting, device, **changes)

        def only(some: Inputs, dense: Dense = dense, single: Method = single) -> Action:
            return bench.action(compared_terms(single, dense, some), single, some)

        rows.append(row(f"{name}: {dense.label}", single, only, dense, quadratic=dense.quadratic))
    return rows


def print_methods(names: Sequence[str], settings: Mapping[str, Setting], bench: Bench) -> None:
    for label, setting in settings.items():
        inputs, rows = bench.inputs(setting), []
        for name in names:
            print(f"{label} {name}", file=sys.stderr)
            rows += rows_of(name, inputs, bench)
        print(f"### {describe(label, setting)}\n\n{markdown(HEADER, rows)}\n")
    print(
        'One line is a method in its default config; "method: term" is one term of it. "straightforward" says how many '
        "times as\nmuch time and memory the same formula takes as loops or whole maps; ~ is projected from smaller "
        "crops."
    )


def print_blocks(names: Sequence[str], settings: Mapping[str, Setting], bench: Bench) -> None:
    """Time and peak memory of each quadratic map by the rows that are held at a time."""
    for label, setting in settings.items():
        inputs, rows = bench.inputs(setting), []
        for name in names:
            for dense in (dense for dense in DENSE.get(name, ()) if dense.quadratic):
                print(f"{label} {name}", file=sys.stderr)
                rows += block_rows(name, dense, inputs, bench)
        header = ["term", "block_rows", "ms", "peak, MiB", "x the whole map's time", "x its memory"]
        print(f"### {describe(label, setting)}\n\n{markdown(header, rows)}\n")


def block_rows(name: str, dense: Dense, inputs: Inputs, bench: Bench) -> list[list[object]]:
    actions: dict[str, Action] = {}
    for rows in (128, 512, 2048, 10**9):
        method = build(name, inputs.setting, bench.device, **{**alone(name, dense), "block_rows": rows})
        actions[str(rows) if rows < 10**9 else "all"] = bench.action(
            compared_terms(method, dense, inputs), method, inputs
        )
    actions["straightforward"] = bench.action(straightforward(method, dense, inputs), method, inputs)
    costs = bench.compare(actions)
    return [
        [f"{name}: {dense.label}", rows, cost.milliseconds, cost.mebibytes,
         cost.times(costs["straightforward"]), cost.size(costs["straightforward"])]
        for rows, cost in costs.items()
    ]  # fmt: skip


def describe(label: str, setting: Setting) -> str:
    height, width = setting.size
    maps = "x".join(map(str, setting.at(setting.stride)))
    return f"{label}: crop {height}x{width}, {setting.num_classes} classes, logits and last feature {maps}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), help="(all; with --blocks: ade20k/8)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="another crop in all settings")
    parser.add_argument("--batch", type=int, help="(2 on a CPU, 8 on CUDA)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds at most (%(default)s)")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds for the rounds of one line (%(default)s)")
    parser.add_argument(
        "--limit", type=float, default=25, help="a quadratic map that takes more seconds is projected (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="half the crop in both directions, one round")
    parser.add_argument("--blocks", action="store_true", help="time and memory by block_rows, of the quadratic maps")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the networks' outputs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    repeats, limit = (1, given.limit / 5) if given.quick else (given.repeats, given.limit)
    bench = Bench(
        device, dtype, given.batch or (8 if device.type == "cuda" else 2), repeats, given.budget, limit
    )  # fmt: skip
    settings = {label: SETTINGS[label] for label in given.settings or (["ade20k/8"] if given.blocks else SETTINGS)}
    for label, setting in settings.items():
        height, width = given.size or setting.size
        size = (height // 2, width // 2) if given.quick else (height, width)
        settings[label] = replace(setting, size=size)
    started = time.perf_counter()
    for name in given.methods:
        for dense in DENSE.get(name, ()):
            agree(name, dense, device)
    print(f"Forward + backward, batch {bench.batch}, {given.precision}, {device.type}. {machine(['torch'])}\n")
    (print_blocks if given.blocks else print_methods)(given.methods, settings, bench)
    print(f"took {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
