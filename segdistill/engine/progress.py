"""Progress bars with the time left: on a terminal only, by the main process only."""

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(enabled: bool = True, *columns: str) -> Progress:
    """A rich progress bar on standard error, silent where that is not a terminal."""
    console = Console(stderr=True)
    texts = [TextColumn(column) for column in columns]
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.percentage:>3.0f}%"), *texts,
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
        console=console, disable=not (enabled and sys.stderr.isatty()), transient=True,
    )  # fmt: skip


class TrainingBar:
    """What trains, its iteration, images per second and time left.

    Args:
        names: of what trains.
        iterations: how many the longest takes; None where time is the budget.
        enabled: whether it is to be seen at all.
    """

    def __init__(self, names: Sequence[str], iterations: int | None, *, enabled: bool) -> None:
        self.iterations, self.images = iterations, 0
        self.title = names[0] if len(names) == 1 else f"{len(names)} trainings"
        self.bar = progress_bar(enabled, "{task.fields[text]}")
        self.task = self.bar.add_task(self.title, total=1.0, text="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, iteration: int, fraction: float, seconds: float, images: int) -> None:
        """Moves the bar.

        Args:
            iteration: how many are done.
            fraction: the part of the budget that is used, 0..1.
            seconds: what training has taken up to now, without its first step.
            images: how many the last step was of, for each training that took them.
        """
        if self.bar.disable:
            return
        self.images += images if seconds else 0
        of = f" of {self.iterations}" if self.iterations else ""
        speed = f"{self.images / max(seconds, 1e-9):.1f} img/s "
        self.bar.update(
            self.task, completed=fraction, description=f"{self.title}: iteration {iteration}{of}", text=speed
        )
