"""Progress bars with the time left: on a terminal only, by the main process only."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN = 0.2  # two sights of a bar


def progress_bar(enabled: bool = True, *columns: str) -> Progress:
    """A rich progress bar on standard error, silent where that is not a terminal.

    While it is there, what is written to ``sys.stderr`` comes above it.
    """
    console = Console(stderr=True)
    texts = [TextColumn(column) for column in columns]
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.percentage:>3.0f}%"), *texts,
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
        console=console, disable=not (enabled and sys.stderr.isatty()), transient=True, speed_estimate_period=300,
    )  # fmt: skip


@dataclass(frozen=True)
class Advance:
    """How far trainings are that train together."""

    iteration: int
    iterations: int | None  # how many the longest takes; None where time is the budget
    fraction: float  # of the budget, 0..1
    images_per_second: float


class PartsBar:
    """A bar that parts of a stage move, each from a process of its own."""

    def __init__(self, enabled: bool, *columns: str) -> None:
        self.bar = progress_bar(enabled, *columns)
        # Where another process draws: sends it what its :meth:`update` is to be called with.
        self.relay: Callable[[tuple[Any, ...]], None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, *news: Any) -> None:
        """Moves the bar, which begins with the first call: its thread must not be there when processes fork."""
        raise NotImplementedError


class CountBar(PartsBar):
    """How many of several things are done."""

    def __init__(self, description: str, total: int, *, enabled: bool) -> None:
        super().__init__(enabled)
        self.task = self.bar.add_task(description, total=total)

    def update(self) -> None:
        """One more is."""
        if self.bar.disable:
            return
        if self.relay is not None:
            self.relay(())
            return
        self.bar.start()
        self.bar.advance(self.task)


class TrainingBar(PartsBar):
    """The trainings of a stage: which of how many train now, their iteration, images per second, time left of all.

    Args:
        kind: what is trained: teacher, student, trial.
        groups: the names of those that train together, one group after another or several at once.
        costs: how long each group takes, compared with the others.
        before, share: the parts of the whole that were done before, and that these groups are, 0..1.
    """

    def __init__(
        self,
        kind: str,
        groups: Sequence[Sequence[str]],
        costs: Sequence[float],
        *,
        before: float = 0.0,
        share: float = 1.0,
        enabled: bool,
    ) -> None:
        self.kind, self.groups, self.costs = kind, groups, costs
        self.before, self.share = before, share
        self.advances: dict[int, Advance] = {}
        self.relayed = 0.0
        super().__init__(enabled, "{task.fields[speed]}")
        self.task = self.bar.add_task("", total=1.0, completed=before, speed="")  # type: ignore[arg-type]

    def update(self, advance: Advance, group: int = 0) -> None:
        """How far a group is."""
        if self.bar.disable:
            return
        if self.relay is not None:
            now = time.monotonic()
            if advance.fraction >= 1 or now - self.relayed >= SECONDS_BETWEEN:
                self.relayed = now
                self.relay((advance, group))
            return
        self.advances[group] = advance
        self.bar.start()
        speed = sum(one.images_per_second for one in self._active().values())
        done = sum(self.costs[key] * one.fraction for key, one in self.advances.items()) / sum(self.costs)
        self.bar.update(
            self.task,
            completed=self.before + self.share * done,
            description=escape(self.title()),
            speed=f"{speed:.1f} img/s",
        )

    def title(self) -> str:
        """What trains now, which of how many, and the iteration of who is the least far."""
        active = self._active()
        total = sum(map(len, self.groups))
        names = [name for group in active for name in self.groups[group]]
        if len(names) == 1:
            number = 1 + sum(map(len, self.groups[: next(iter(active))]))
            what = f"{names[0]}, {self.kind} {number} of {total}" if total > 1 else names[0]
        else:
            what = f"{len(names)} of {total} {self.kind}s: {', '.join(names[:2])}{', ...' if len(names) > 2 else ''}"
        last = min(active.values(), key=lambda one: one.fraction)
        of = f" of {last.iterations}" if last.iterations else ""
        return f"{what}: iteration {last.iteration}{of}"

    def _active(self) -> dict[int, Advance]:
        """Those that train now, by group; the last one where all are done."""
        active = {group: one for group, one in self.advances.items() if one.fraction < 1}
        return active or dict(list(self.advances.items())[-1:])
