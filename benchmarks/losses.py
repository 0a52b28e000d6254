"""What every method costs: time and peak memory of forward + backward, beside plain KD and beside straightforward code.

    python benchmarks/losses.py [--methods kd apd] [--settings cityscapes/8 ade20k/4] [--quick]
    python benchmarks/losses.py --blocks [--settings ade20k/8]
    python benchmarks/losses.py --maps

Networks are not run: student and teacher are random outputs of the sizes that a SegFormer-B0 and a ResNet-101 give
(``_fake.py``), and a loss reads and differentiates them. A method stands in its default config. ``--blocks`` shows
instead how time and memory of the quadratic maps follow ``block_rows``, ``--maps`` what is held at label size, in
float32 maps of all classes, 2.5 GB each for 16 images of 512x512 and 150 classes: all images at once, and a block at a
time. It divides sides and blocks by ``--smaller``, which leaves these numbers as they are; times mean something with
``--smaller 1`` alone (with ``--batch 2``). Prints Markdown.

Straightforward code (``_dense.py``) is what the formula says at sight: a loop over classes, a whole quadratic map. Its
value and gradient are compared with the method's on a small size before anything is timed. How time and memory are
measured says ``_cost.py``; what a method keeps from step to step is not in its peak but in the column "state".
"""

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from _cost import MIB, Action, Clock, held_bytes, peak_bytes
from _dense import DENSE, Dense
from _fake import SETTINGS, Inputs, Setting, build, draw, terms
from _table import machine, markdown
from torch import Tensor

from segdistill.engine.settings import LossConfig, OhemConfig
from segdistill.engine.supervision import Supervision
from segdistill.losses import blocks
from segdistill.methods import METHODS, load
from segdistill.methods.method import Method
from segdistill.models.outputs import Outputs

Loss = Callable[[Inputs], Tensor]
HEADER = ["method", "ms", "x kd", "peak, MiB", "x kd", "state, MiB", "straightforward, x time", "x memory"]


@dataclass(frozen=True)
class Line:
    """One line of the table: a method, or one of its terms, and the straightforward version if there is one."""

    label: str
    method: Method
    loss: Loss
    dense: Dense | None
    quadratic: bool


@dataclass(frozen=True)
class Bench:
    """What is measured in one setting, and how."""

    setting: Setting
    clock: Clock
    batch: int
    dtype: torch.dtype

    def inputs(self, shorter: int = 1) -> Inputs:
        """One batch; of crops whose sides are so many times as short."""
        height, width = self.setting.size
        setting = replace(self.setting, size=(height // shorter, width // shorter))
        return draw(setting, self.batch, self.clock.device, self.dtype)

    def build(self, name: str, **changes: Any) -> Method:
        return build(name, self.setting, self.clock.device, **changes)

    def action(self, loss: Loss, method: Method, inputs: Inputs) -> Action:
        """Forward and backward pass, down to the outputs of the networks; gradients are there, and gone at the end."""

        def action() -> None:
            torch.manual_seed(1)  # what a method draws is the same in every run
            half = self.dtype != torch.float32
            with torch.autocast(self.clock.device.type, self.dtype) if half else contextlib.nullcontext():
                value = loss(inputs)
            value.backward()
            for leaf in (*inputs.leaves, *method.parameters()):
                leaf.grad = None

        return action


def whole(method: Method) -> Loss:
    """The weighted sum of a method's terms."""

    def loss(inputs: Inputs) -> Tensor:
        raw = terms(method, inputs)
        return sum(method.weights[key.rpartition("/")[2]] * term for key, term in raw.items())

    return loss


def compared(method: Method, dense: Dense) -> Loss:
    """The terms that there is a straightforward version of, as they are."""

    def loss(inputs: Inputs) -> Tensor:
        raw = terms(method, inputs)
        return sum(raw[term] for term in dense.terms)

    return loss


def straightforward(method: Method, dense: Dense) -> Loss:
    """That version, in float32 as the method's loss is."""

    def widened(outputs: Outputs) -> Outputs:
        stages = tuple(stage.float() for stage in outputs.features)
        return Outputs(outputs.logits.float(), stages, outputs.last_feature.float())

    def loss(inputs: Inputs) -> Tensor:
        with torch.autocast(inputs.target.device.type, enabled=False):
            return dense.function(method, widened(inputs.student), widened(inputs.teacher), inputs.target)

    return loss


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
    outcomes = []
    for loss in (compared(method, dense), straightforward(method, dense)):
        gradients = torch.autograd.grad(value := loss(inputs), inputs.leaves, allow_unused=True)
        outcomes.append([value.detach(), *(gradient for gradient in gradients if gradient is not None)])
    for efficient, plain in zip(*outcomes, strict=True):
        scale = plain.abs().max().item()
        torch.testing.assert_close(
            efficient, plain, rtol=1e-3, atol=1e-3 * scale, msg=lambda text: f"{name}, {dense.label}: {text}"
        )


def lines(name: str, bench: Bench) -> list[Line]:
    """The method, and each of its terms that has a straightforward version, unless that term is all of it."""
    method, versions = bench.build(name), DENSE.get(name, ())
    all_of_it = [dense for dense in versions if set(method.weights) == set(dense.terms) and not dense.changes]
    quadratic = any(dense.quadratic for dense in versions)
    table = [Line(name, method, whole(method), next(iter(all_of_it), None), quadratic)]
    for dense in versions:
        if dense not in all_of_it:
            part = bench.build(name, **alone(name, dense))
            table.append(Line(f"{name}: {dense.label}", part, compared(part, dense), dense, dense.quadratic))
    return table


def measure(line: Line, inputs: Inputs, bench: Bench) -> list[object]:
    """A row of the table; what may take minutes or all memory is tried on small crops first."""
    kd = bench.build("kd")
    losses = {"kd": (whole(kd), kd), "line": (line.loss, line.method)}
    if line.dense is not None:
        losses["dense"] = (straightforward(line.method, line.dense), line.method)
    costs = {}
    for key, (loss, method) in losses.items():
        if line.quadratic and key != "kd":
            small = {times: bench.action(loss, method, bench.inputs(times)) for times in (4, 2)}
            cost = bench.clock.projected(small.__getitem__, blocked=key == "line")
            costs |= {key: cost} if cost else {}
    run = {key: bench.action(*pair, inputs) for key, pair in losses.items() if key not in costs}
    if line.label == "kd":
        del run["line"]
    costs |= bench.clock.compare(run)
    base, cost, dense = costs["kd"], costs.get("line", costs["kd"]), costs.get("dense")
    state = sum(one.numel() * one.element_size() for one in (*line.method.parameters(), *line.method.buffers()))
    return [
        line.label, cost.milliseconds, cost.times(base), cost.mebibytes, cost.size(base), f"{state / MIB:.1f}",
        *([dense.times(cost), dense.size(cost)] if dense else ["-", "-"]),
    ]  # fmt: skip


def block_rows(name: str, dense: Dense, inputs: Inputs, bench: Bench) -> list[list[object]]:
    """Time and peak memory of a quadratic map by the rows that are held at a time."""
    actions: dict[str, Action] = {}
    for label, rows in {"128": 128, "512": 512, "2048": 2048, "all": 10**6}.items():
        method = bench.build(name, **alone(name, dense), block_rows=rows)
        actions[label] = bench.action(compared(method, dense), method, inputs)
    actions["straightforward"] = bench.action(straightforward(method, dense), method, inputs)
    costs = bench.clock.compare(actions)
    base = costs["straightforward"]
    return [
        [f"{name}: {dense.label}", rows, cost.milliseconds, cost.mebibytes, cost.times(base), cost.size(base)]
        for rows, cost in costs.items()
    ]


MAPS = Setting((512, 512), 150, 4, "ade20k/4")
AT_LABEL_SIZE = {
    "apd: global": ("apd", {"local_weight": 0.0, "prototype_weight": 0.0, "teacher_head": "identity"}),
    "c2vkd: pdd": ("c2vkd", {"visual_weight": 0.0, "patch_weight": 0.0, "linguistic_weight": 0.0}),
    "c2vkd: pdd as dkd": (
        "c2vkd",
        {"visual_weight": 0.0, "patch_weight": 0.0, "linguistic_weight": 0.0, "pdd": "dkd"},
    ),
    "hfd_bsd: region, pixel": ("hfd_bsd", {"hfd_weight": 0.0}),
    **{f"{name}, upsample": (name, {"upsample": True}) for name in ("kd", "dist", "dkd", "pseudo", "dml", "kdcl")},
}
SUPERVISION: dict[str, dict[str, Any]] = {
    "cross-entropy": {},
    "cross-entropy, OHEM": {"ohem": OhemConfig(threshold=0.7, min_kept=1000)},
    "cross-entropy, Dice": {"dice": 1.0},
    "cross-entropy, Lovasz": {"lovasz": 1.0},
}


def maps_held(batch: int, smaller: int) -> list[list[object]]:
    """What each loss holds for its backward pass, and at most at one time, in maps of all classes at label size.

    Args:
        smaller: divides the crop's sides and, squared, a block, so that a block has as many images as at full size.
    """
    height, width = MAPS.size
    setting = replace(MAPS, size=(height // smaller, width // smaller))
    device = torch.device("cpu")
    inputs = draw(setting, batch, device, torch.float32)
    losses: dict[str, Callable[[], Tensor]] = {}
    for label, changes in SUPERVISION.items():
        supervision = Supervision(LossConfig(**changes))
        losses[label] = lambda of=supervision: sum(of(inputs.student.logits, inputs.target).values())
    for label, (name, changes) in AT_LABEL_SIZE.items():
        losses[label] = functools.partial(whole(build(name, setting, device, **changes)), inputs)
    one = batch * setting.num_classes * setting.size[0] * setting.size[1] * 4
    rows: list[list[object]] = []
    for label, loss in losses.items():
        print(label, file=sys.stderr)
        held, peaks, times = [], [], []
        for block in (sys.maxsize, blocks.BLOCK // smaller**2):
            with mock.patch("segdistill.losses.blocks.BLOCK", block):
                held.append(held_bytes(loss) / one)
                peaks.append(peak_bytes(lambda loss=loss: loss().backward(), device) / one)
                started = time.process_time()
                loss().backward()
                times.append(time.process_time() - started)
        rows.append([label, *(f"{maps:.2f}" for maps in (*held, *peaks)), f"{times[1] / times[0]:.2f}"])
    return rows


def table(names: Sequence[str], bench: Bench, *, blocks: bool) -> str:
    """The Markdown of one setting."""
    inputs, rows = bench.inputs(), []
    for name in names:
        print(f"{bench.setting.name} {name}", file=sys.stderr)
        if blocks:
            blocked = hasattr(load(name).Config(), "block_rows")
            quadratic = (dense for dense in DENSE.get(name, ()) if dense.quadratic and blocked)
            rows += [row for dense in quadratic for row in block_rows(name, dense, inputs, bench)]
        else:
            rows += [measure(line, inputs, bench) for line in lines(name, bench)]
    header = ["term", "block_rows", "ms", "peak, MiB", "x straightforward time", "x its memory"] if blocks else HEADER
    return f"### {bench.setting}\n\n{markdown(header, rows)}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), help="(all; with --blocks: ade20k/8)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="another crop in all settings")
    parser.add_argument("--batch", type=int, help="(2 on a CPU, 8 on CUDA)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds at most (%(default)s)")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds for the rounds of one line (%(default)s)")
    parser.add_argument(
        "--limit", type=float, default=25, help="seconds; a longer quadratic map is projected (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="half the crop in both directions, one round")
    parser.add_argument("--blocks", action="store_true", help="time and memory by block_rows, of the quadratic maps")
    parser.add_argument("--maps", action="store_true", help="what is held at label size, in maps of all classes")
    parser.add_argument("--smaller", type=int, default=16, help="divides the sides for --maps (%(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the networks' outputs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    device, started = torch.device(given.device), time.perf_counter()
    if given.maps:
        header = ["loss", "held for backward, all at once", "in blocks", "peak, all at once", "in blocks", "x time"]
        print(f"Forward + backward, batch {given.batch or 16}, fp32, cpu. {machine(['torch'])}\n")
        print(markdown(header, maps_held(given.batch or 16, given.smaller)))
        return
    repeats, limit = (1, given.limit / 5) if given.quick else (given.repeats, given.limit)
    clock = Clock(device, repeats, given.budget, limit)
    batch = given.batch or (8 if device.type == "cuda" else 2)
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    for name in given.methods:
        for dense in DENSE.get(name, ()):
            agree(name, dense, device)
    print(f"Forward + backward, batch {batch}, {given.precision}, {device.type}. {machine(['torch'])}\n")
    for label in given.settings or (["ade20k/8"] if given.blocks else SETTINGS):
        height, width = given.size or SETTINGS[label].size
        size = (height // 2, width // 2) if given.quick else (height, width)
        bench = Bench(replace(SETTINGS[label], size=size), clock, batch, dtype)
        print(table(given.methods, bench, blocks=given.blocks))
    if not given.blocks:
        print(
            'A line is a method in its default config; "method: term" is one term of it. "straightforward": how many '
            "times as\nmuch the same formula takes as loops or whole maps; ~ is projected from smaller crops."
        )
    print(f"took {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
