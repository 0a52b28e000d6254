"""Time and peak memory of a call.

Peak memory is what a call allocates beyond what was there before it, at most at one time: saved tensors, temporary
buffers, gradients and the recomputation of a backward pass. On a CPU it is summed from the allocations and releases
that torch.profiler records of PyTorch's allocator, in a run that is not timed. Buffers inside MKL and oneDNN are not
seen; where glibc gives freed memory back at once, the process's resident set shows the same within two percent. On CUDA
it is ``torch.cuda.max_memory_allocated``.
"""

import contextlib
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise reports its starts

import torch
from torch.profiler import ProfilerActivity, profile

Action = Callable[[], object]
MIB = 2**20
SLOW = 5.0  # seconds; what takes as long is timed once, in the run that shows its memory


def peak_bytes(action: Action, device: torch.device) -> int:
    """The most bytes that an action holds at one time beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(itertools.accumulate(_allocations(action), initial=0))


def held_bytes(action: Action) -> int:
    """What an action that returns a loss leaves allocated on a CPU until the loss is differentiated."""
    values = []  # what is returned lives on while the allocations are summed
    return sum(_allocations(lambda: values.append(action())))


def _allocations(action: Action) -> list[int]:
    """Bytes that an action takes of PyTorch's allocator, or gives back as negative ones, in their order."""
    with _no_collection(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]


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


def free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return free[0] if free else float("inf")


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
class Clock:
    """How to measure."""

    device: torch.device
    repeats: int = 9  # rounds at most
    budget: float = 1.5  # seconds for the rounds of one comparison; more than one round only if they fit
    limit: float = 25.0  # seconds; what grows with the square of the pixels and would take longer is projected

    def compare(self, actions: Mapping[str, Action]) -> dict[str, Cost]:
        """Times actions in alternating rounds, so that a slow minute of the machine falls on all."""
        peaks, rounds = {}, {}
        for name, action in actions.items():
            peaks[name], took = self._first(action)
            if took is not None:
                rounds[name] = [took]
        quick = {name: action for name, action in actions.items() if name not in rounds}
        once = {name: seconds(action, self.device) for name, action in quick.items()}
        calls = {name: max(1, min(20, int(0.05 / took))) for name, took in once.items()}
        longest = sum(calls[name] * took for name, took in once.items())
        if longest > self.budget:  # no time for rounds; what is short has some for itself
            short = {name: min(self.repeats, 5) for name in once if once[name] < self.budget / 10}
            rounds |= {name: [took] for name, took in once.items() if name not in short}
            for name, count in short.items():
                rounds[name] = [seconds(quick[name], self.device, calls[name]) for _ in range(count)]
        else:
            count = min(self.repeats, int(self.budget / longest)) if once else 0
            rounds |= {name: [] for name in once}
            for _, (name, action) in itertools.product(range(count), quick.items()):
                rounds[name].append(seconds(action, self.device, calls[name]))
        return {name: Cost(tuple(rounds[name]), peaks[name]) for name in actions}

    def projected(self, part: Callable[[int], Action], *, blocked: bool) -> Cost | None:
        """The cost of what grows with the square of the pixels, by smaller crops, if it is too much to be run.

        Time grows from a quarter of the pixels as it did from a sixteenth to a quarter, memory as the area of the map
        or, where a block of rows is held at a time, as its width.

        Args:
            part: gives the action on a crop whose sides are this many times as short.
            blocked: whether a block of rows is held at a time.
        """
        took = []
        for times in (4, 2):
            action = part(times)
            peak, known = self._first(action)
            took.append(known or seconds(action, self.device))
        whole, peak = took[1] * min(max(took[1] / took[0], 4), 16), peak * (4 if blocked else 16)
        too_much = whole > self.limit or peak > 0.7 * free_bytes(self.device)
        return Cost((whole,), peak, projected=True) if too_much else None

    def _first(self, action: Action) -> tuple[int, float | None]:
        """Peak memory of a call, after which all is warm, and its time if that is long: once is then enough."""
        started = time.perf_counter()
        peak = peak_bytes(action, self.device)
        took = time.perf_counter() - started
        return peak, took if took > SLOW else None
