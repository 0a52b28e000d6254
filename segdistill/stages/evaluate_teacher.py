"""The teacher on the test split: its row of the table, which belongs to no cell of the matrix."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segdistill.engine.tracker import Tracker
from segdistill.plan import TEACHER
from segdistill.report.highlights import Highlights
from segdistill.stages import evaluate

Config = evaluate.Config


def run(
    config: evaluate.Config, *, prepared: Path, model: Path, evaluation: Path, tracker: Tracker, device: str = "auto"
) -> dict[str, float]:
    """Writes ``evaluation``; see :func:`segdistill.stages.evaluate.run`."""
    return evaluate.measure(
        config, {evaluation: model}, prepared=prepared, names={evaluation: {TEACHER: TEACHER}}, tracker=tracker,
        device=device,
    )  # fmt: skip


def highlights(paths: Mapping[str, Any]) -> Highlights:
    """Scores and cost, and the confusion matrix."""
    return evaluate.highlights_of([paths["evaluation"]])
