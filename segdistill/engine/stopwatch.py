"""Seconds of parts of a step, on the clock of the device that computes them."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from segdistill.models.outputs import Network

WARM = 3  # passes that only warm up


class Stopwatch:
    """Sums up what was :func:`timed`. Asking it waits for nothing: on a GPU it knows of what is finished by then."""

    def __init__(self) -> None:
        self._seconds = self._cpu_seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def take(self) -> float:
        """The sum since it was last taken."""
        while self._events and self._events[0][1].query():
            start, end = self._events.popleft()
            self._seconds += start.elapsed_time(end) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def take_cpu(self) -> float:
        """The CPU seconds of all threads since they were last taken: other programs add nothing. None on a GPU."""
        seconds, self._cpu_seconds = self._cpu_seconds, 0.0
        return seconds

    def add(self, seconds: float, cpu_seconds: float) -> None:
        """Adds what the host's clock says, and what its processors worked for us."""
        self._seconds += seconds
        self._cpu_seconds += cpu_seconds

    def add_later(self, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Adds the time between two events, once the device has come to them."""
        self._events.append((start, end))


def pass_seconds(
    network: Network, size: tuple[int, int], *, channels: int = 3, repeats: int = 30, device: Any = "cpu"
) -> list[float]:
    """Seconds of each of some passes of one image of ``size`` (H, W), when warm.

    The fastest is the network's latency: slower ones tell what else the machine was doing.
    """
    image, seconds = torch.rand((1, channels, *size), device=device), []
    wait: Callable[[], object] = torch.cuda.synchronize if image.is_cuda else lambda: None
    with torch.inference_mode():
        for _ in range(repeats + WARM):
            wait()
            started = time.perf_counter()
            network.logits(image)
            wait()
            seconds.append(time.perf_counter() - started)
    return seconds[WARM:]


@contextlib.contextmanager
def timed(device: torch.device, *stopwatches: Stopwatch) -> Iterator[None]:
    """Charges what runs inside to each of the stopwatches.

    On a GPU that is the time from when it has done what came before until it has done this. What the host takes while
    the GPU is busy costs nothing, and the host's own clock would say when work was handed over, and not whose it was.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        for stopwatch in stopwatches:
            stopwatch.add_later(start, end)
    else:
        started, worked = time.monotonic(), time.process_time()
        yield
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - worked
        for stopwatch in stopwatches:
            stopwatch.add(seconds, cpu_seconds)
