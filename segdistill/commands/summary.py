"""What a person reads at the end of a run: the table, where the report lies, the champion, and where the time went."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from segdistill.errors import UserError
from segdistill.files import SEAL, read_json, read_sealed_json
from segdistill.stages import BY_NAME, STAGES

ACTIVITIES = ("start-up", "data", "training", "evaluation")


def command(_arguments: argparse.Namespace) -> None:
    """Prints the summary of the last run here."""
    show()


def show(root: Path = Path(), console: Console | None = None) -> None:
    """Prints the summary of the last run in this folder.

    Raises:
        UserError: nothing was compared here yet.
    """
    from segdistill.stages.compare import table
    from segdistill.stages.register import sentence

    console = console or Console(width=None if sys.stdout.isatty() else 110)
    comparison = root / BY_NAME["compare"].outputs["report"]
    results = _read(comparison / "results.json")
    if results is None:
        raise UserError(f"{comparison / 'results.json'}: nothing was compared yet; run the pipeline: dvc repro")
    console.print()
    console.print(table(results))
    console.print(f"Report: {comparison / 'report.html'}", soft_wrap=True)
    registration = _read(root / BY_NAME["register"].outputs["registration"] / "registration.json")
    if registration:
        console.print(sentence(registration), soft_wrap=True)
    timings = _timings(root / "artifacts/timings")
    if timings:
        console.print(timings)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    again = "run the stage that makes it again"
    sealed = (path.parent / SEAL).exists()
    return dict(read_sealed_json(path.parent, path.name, mend=again) if sealed else read_json(path, mend=again))


def _timings(folder: Path) -> Table | None:
    """Seconds by stage and activity; the jobs of a matrix stage are added up."""
    records = [read_json(path, mend="delete it") for path in sorted(folder.glob("*.json"))]
    if not records:
        return None
    shown = Table(title="Where the time went, in seconds", title_justify="left")
    shown.add_column("stage")
    for column in ("runs", *ACTIVITIES, "all"):
        shown.add_column(column, justify="right")
    totals = dict.fromkeys(ACTIVITIES, 0.0)
    for stage in STAGES:
        mine = [record["seconds"] for record in records if record["stage"] == stage.name]
        if not mine:
            continue
        sums = {activity: sum(seconds.get(activity, 0.0) for seconds in mine) for activity in ACTIVITIES}
        totals = {activity: totals[activity] + sums[activity] for activity in ACTIVITIES}
        cells = [f"{sums[activity]:.0f}" for activity in ACTIVITIES]
        shown.add_row(stage.name, str(len(mine)), *cells, f"{sum(sums.values()):.0f}")
    shown.add_section()
    shown.add_row("all", "", *(f"{value:.0f}" for value in totals.values()), f"{sum(totals.values()):.0f}")
    return shown
