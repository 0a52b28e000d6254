"""What compare reads: the folders of the teacher and of every job, checked as they come in."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segdistill.errors import UserError
from segdistill.metrics import iou_counts, mean_iou


@dataclass(frozen=True)
class Curve:
    """Validation mIoU of one run at the steps where it was measured."""

    experiment: str
    student: str
    seed: int | None
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """One network of one job: how it was trained and what it did on the test split."""

    experiment: str
    student: str
    seed: int | None
    training: dict[str, Any]  # metrics.json of the job
    validation: dict[str, float]  # this network's entry in it
    test: dict[str, Any]  # this network's entry in evaluation.json
    confusion: NDArray[np.int64]  # [K, K]
    counts: NDArray[np.float64]  # [N, 3, K], see iou_counts
    accuracies: dict[str, float]  # share of right pixels of each test image, by id
    curve: Curve
    overlays: Path

    @property
    def miou(self) -> float:
        """mIoU on the test split."""
        return mean_iou(self.confusion)


def read_job(
    model: Path, evaluation: Path, experiment: str, seed: int | None, names: Sequence[str], class_names: Sequence[str]
) -> list[Measured]:
    """Every network of one job.

    Args:
        model: the folder that training wrote.
        evaluation: the folder that evaluation wrote.
        experiment: the job's experiment.
        seed: the job's seed; None for the teacher.
        names: the networks to expect; empty takes what the evaluation holds.
        class_names: the classes of the data set.

    Raises:
        UserError: a file is missing, broken, or at odds with another one.
    """
    training = read_json(model / "metrics.json")
    evaluated = read_json(evaluation / "evaluation.json").get("models", {})
    found = []
    for name in names or sorted(evaluated):
        for where, entries in (("metrics.json", training.get("students", {})), ("evaluation.json", evaluated)):
            if name not in entries:
                folder = model if where == "metrics.json" else evaluation
                raise UserError(f"{folder / where}: nothing about '{name}'; it holds {', '.join(entries) or 'nothing'}")
        confusion, per_image, ids = _read_counts(evaluation / f"{name}.npz", class_names)
        stated = evaluated[name].get("test/miou")
        if stated is None or not math.isclose(stated, mean_iou(confusion), abs_tol=1e-3):
            raise UserError(
                f"{evaluation / 'evaluation.json'}: test/miou of '{name}' is {stated}, its counts give "
                f"{mean_iou(confusion):.4f}; the folder mixes two evaluations, run evaluate again"
            )
        right, total = np.trace(per_image, axis1=1, axis2=2), per_image.sum(axis=(1, 2))
        accuracies = (right / np.maximum(total, 1)).tolist()
        found.append(
            Measured(
                experiment=experiment,
                student=name,
                seed=seed,
                training=training,
                validation=training["students"][name],
                test=evaluated[name],
                confusion=confusion,
                counts=iou_counts(per_image),
                accuracies=dict(zip(ids, accuracies, strict=True)),
                curve=_read_curve(model / "curves" / f"{name}.csv", experiment, name, seed),
                overlays=evaluation / "overlays" / name,
            )
        )
    return found


def check_same_images(measured: Sequence[Measured]) -> None:
    """Raises a UserError unless all were evaluated on the same images, in the same order."""
    first = list(measured[0].accuracies)
    for other in measured[1:]:
        if list(other.accuracies) != first:
            where = other.overlays.parent.parent / f"{other.student}.npz"
            raise UserError(
                f"{where}: evaluated on other test images ({len(other.accuracies)}) than the teacher ({len(first)}); "
                "run evaluate again"
            )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of an earlier stage.

    Raises:
        UserError: the file is absent or no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the stage that writes it has not run") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, Mapping):
        raise UserError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return dict(data)


def _read_counts(path: Path, class_names: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
    """The confusion matrix of the split, that of each image, and the images' ids."""
    try:
        with np.load(path, allow_pickle=False) as file:
            confusion, per_image, ids = file["confusion"], file["per_image"], file["ids"].tolist()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the stage evaluate has not run") from None
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"{path}: not the confusion counts that evaluate writes: {error}") from None
    classes = len(class_names)
    if confusion.shape != (classes, classes) or per_image.shape != (len(ids), classes, classes):
        raise UserError(
            f"{path}: counts of shape {confusion.shape} and {per_image.shape} for {len(ids)} images, but the data set "
            f"has {classes} classes; run evaluate again"
        )
    if not np.array_equal(per_image.sum(axis=0), confusion):
        raise UserError(f"{path}: the counts of the images do not add up to those of the split; run evaluate again")
    return confusion, per_image, ids


def _read_curve(path: Path, experiment: str, name: str, seed: int | None) -> Curve:
    """The rows that have a validation score; an imported teacher may have no curve at all."""
    steps, values = [], []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row.get("val/miou"):
                    try:
                        steps.append(int(row["step"]))
                        values.append(float(row["val/miou"]))
                    except (KeyError, ValueError):
                        raise UserError(f"{path}: expected numbers under step and val/miou, found {row}") from None
    return Curve(experiment, name, seed, tuple(steps), tuple(values))
