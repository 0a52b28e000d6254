"""What people look at first of a stage's outputs: what Kubeflow's pages show of a task without a download."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segdistill.files import read_sealed_json


@dataclass(frozen=True)
class Highlights:
    """Read from a stage's outputs by its module's ``highlights(paths)``; which of them there are, the table says."""

    scores: Mapping[str, float] = field(default_factory=dict)
    confusion: tuple[Sequence[str], Sequence[Sequence[int]]] | None = None  # classes; rows are the truth
    page: str | None = None  # self-contained HTML
    summary: str | None = None  # Markdown


def scores_of(networks: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """The named scores of each network, as flat names; a single network needs no prefix."""
    return {
        (name if len(networks) == 1 else f"{network}/{name}"): float(values[name])
        for network, values in networks.items()
        for name in names
    }


def trained(folder: Path) -> Highlights:
    """Of a folder of trained networks: their validation scores."""
    students = read_sealed_json(folder, "metrics.json", mend="run the stage that trains it again")["students"]
    return Highlights(scores=scores_of(students, ("val/miou", "val/pixel_accuracy")))
