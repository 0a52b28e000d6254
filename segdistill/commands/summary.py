"""What a person reads at the end of a run: the table, where the report lies, the champion, and where the time went."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from segdistill.errors import UserError
from segdistill.files import read_json
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
    from segdistill.report.results import RESULTS, read_results
    from segdistill.stages import compare
    from segdistill.stages.register import sentence

    console = console or Console(width=None if sys.stdout.isatty() else 110)
    comparison = root / BY_NAME["compare"].outputs["report"]
    if not (comparison / RESULTS).exists():
        raise UserError(f"{comparison / RESULTS}: nothing was compared yet; run the pipeline: dvc repro")
    console.print()
    console.print(compare.table(read_results(comparison)))
    console.print(f"Report: {comparison / 'report.html'}", soft_wrap=True)
    registration = root / BY_NAME["register"].outputs["registration"] / "registration.json"
    if registration.exists():
        console.print(sentence(read_json(registration, mend="run the stage 'register' again")), soft_wrap=True)
    timings = _timings(root / "artifacts/timings")
    if timings:
        console.print(timings)


def _timings(folder: Path) -> Table | None:
    """Seconds by stage and activity; the jobs of a matrix stage are added up."""
    records = [read_json(path, mend="delete it") for path in sorted(folder.glob("*.json"))]
    if not records:
        return None
    table = Table(title="Where the time went, in seconds", title_justify="left")
    table.add_column("stage")
    for column in ("runs", *ACTIVITIES, "all"):
        table.add_column(column, justify="right")
    totals = dict.fromkeys(ACTIVITIES, 0.0)
    for stage in STAGES:
        runs = [record["seconds"] for record in records if record["stage"] == stage.name]
        if not runs:
            continue
        sums = {activity: sum(seconds.get(activity, 0.0) for seconds in runs) for activity in ACTIVITIES}
        totals = {activity: totals[activity] + sums[activity] for activity in ACTIVITIES}
        cells = [f"{sums[activity]:.0f}" for activity in ACTIVITIES]
        table.add_row(stage.name, str(len(runs)), *cells, f"{sum(sums.values()):.0f}")
    table.add_section()
    table.add_row("all", "", *(f"{value:.0f}" for value in totals.values()), f"{sum(totals.values()):.0f}")
    return table
