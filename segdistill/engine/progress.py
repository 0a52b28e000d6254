"""Progress bars with the time left: on a terminal only, by the main process only."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from segdistill.engine.settings import TrainConfig


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
    """Iteration, loss, images per second and time left of a training run."""

    def __init__(self, config: TrainConfig, enabled: bool) -> None:
        self.total = config.iterations
        self.bar = progress_bar(enabled, "{task.fields[text]}")
        self.task = self.bar.add_task("training", total=1.0, text="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, fraction: float, iteration: int) -> None:
        """Moves the bar to a part of the budget."""
        if not self.bar.disable:
            of = f" of {self.total}" if self.total else ""
            self.bar.update(self.task, completed=fraction, description=f"iteration {iteration}{of}")

    def describe(self, loss: float, images_per_second: float) -> None:
        """Shows the latest logged numbers."""
        if not self.bar.disable:
            self.bar.update(self.task, text=f"loss {loss:.3f}  {images_per_second:.1f} img/s ")
