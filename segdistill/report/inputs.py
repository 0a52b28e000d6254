"""What compare reads: the folders of the teacher and of every job, checked as they come in."""

import csv
import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segdistill.config import parse
from segdistill.errors import UserError
from segdistill.files import read_sealed, read_sealed_json
from segdistill.identity import require_classes
from segdistill.metrics.confusion import iou_counts, mean_iou
from segdistill.plan import DIVERGED, TRAINED

TRAIN, EVALUATE = "run the stage that trains it again", "run the stage 'evaluate' again"


@dataclass(frozen=True)
class OutOfDomainCounts:
    """What one network did on the second test set."""

    content: str  # the hash of the set and of what its classes stand for
    classes: tuple[str, ...]  # the M of ours that it has
    sequences: tuple[str | None, ...]  # of each image
    counts: NDArray[np.int64]  # [N, 3, M], iou_counts of each image


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
    counts: NDArray[np.int64]  # [N, 3, K], iou_counts of each test image
    accuracies: dict[str, float]  # share of right pixels of each test image, by id
    curve: dict[int, float]  # validation mIoU by the step at which it was measured
    losses: dict[int, float]  # cross-entropy of the training batches before each step that was logged
    overlays: Path
    elsewhere: "OutOfDomainCounts | None" = None  # on the second test set, where there is one

    @property
    def miou(self) -> float:
        """mIoU on the test split."""
        return mean_iou(self.confusion)


@dataclass(frozen=True)
class Diverged:
    """A job that left no network, since a number of its training was not finite."""

    experiment: str
    seed: int
    iteration: int
    reason: str
    identity: str | None
    code: str | None


def read_job(
    model: Path,
    evaluation: Path | None,
    experiment: str,
    seed: int,
    names: Sequence[str],
    class_names: Sequence[str],
) -> list[Measured] | Diverged:
    """Every network of one job, or why there is none; a job that diverged needs no evaluation.

    Raises:
        UserError: as :func:`read_networks`.
    """
    path, training = read_training(model)
    if path.name == DIVERGED:
        return parse(Diverged, {"identity": None, "code": None, **training}, str(path))
    if evaluation is None:
        raise UserError(f"{model}: not evaluated; {EVALUATE}")
    return read_networks(model, evaluation, experiment, seed, names, class_names)


def read_networks(
    model: Path, evaluation: Path, experiment: str, seed: int | None, names: Sequence[str], class_names: Sequence[str]
) -> list[Measured]:
    """Every network of one folder.

    Args:
        model: the folder that training wrote.
        evaluation: the folder that evaluation wrote.
        experiment: the job's experiment.
        seed: the job's seed; None for the teacher.
        names: the networks to expect.
        class_names: the classes of the data set.

    Raises:
        UserError: a file is missing, broken, or at odds with another one.
    """
    path, training = read_training(model)
    scores = _part(training, "students", path, TRAIN)
    report_path, report = evaluation / "evaluation.json", read_sealed_json(evaluation, "evaluation.json", mend=EVALUATE)
    evaluated = _part(report, "models", report_path, EVALUATE)
    require_classes(report_path, report.get("classes", []), class_names)
    networks = []
    for name in names:
        for file, entries in ((path, scores), (report_path, evaluated)):
            if name not in entries:
                raise UserError(f"{file}: nothing about '{name}'; it holds {', '.join(entries) or 'nothing'}")
        _require_same_weights(model, evaluation, name, evaluated[name])
        confusion, counts, ids, elsewhere = _read_counts(evaluation, name, class_names, report.get("out_of_domain"))
        stated = evaluated[name].get("test/miou")
        if stated is None or not math.isclose(stated, mean_iou(confusion), abs_tol=1e-3):
            raise UserError(
                f"{report_path}: test/miou of '{name}' is {stated}, its counts give "
                f"{mean_iou(confusion):.4f}; the folder mixes two evaluations, run evaluate again"
            )
        right, total, _ = np.moveaxis(counts.sum(axis=-1), -1, 0)
        accuracies = (right / np.maximum(total, 1)).tolist()
        networks.append(
            Measured(
                experiment=experiment,
                student=name,
                seed=seed,
                training=training,
                validation=scores[name],
                test=evaluated[name],
                confusion=confusion,
                counts=counts,
                accuracies=dict(zip(ids, accuracies, strict=True)),
                curve=_read_curve(model, name, "val/miou"),
                losses=_read_curve(model, name, "train/loss/ce"),
                overlays=evaluation / "overlays" / name,
                elsewhere=elsewhere,
            )
        )
    return networks


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
    second = {(other.elsewhere.content, other.elsewhere.classes) if other.elsewhere else None for other in measured}
    if len(second) > 1:
        raise UserError("evaluate.out_of_domain: not all networks were scored on the same second test set; "
                        "run evaluate_teacher and evaluate again")  # fmt: skip


def read_training(model: Path) -> tuple[Path, dict[str, Any]]:
    """The file in which a training says how it was done, with scores or why there are none, and what it says."""
    path = model / (DIVERGED if (model / DIVERGED).exists() else TRAINED)
    return path, dict(read_sealed_json(model, path.name, mend=TRAIN))


def read_settings(models: Sequence[tuple[str, Path]], data: str, teacher: Path) -> dict[str, Any]:
    """The settings of every experiment, alike in all its seeds.

    Args:
        models: experiment and folder of each job.
        data: the content hash of the prepared data, on which they must have been trained.
        teacher: the folder of the teacher that those with one must have had.

    Raises:
        UserError: settings are missing, or one experiment's jobs were trained with different ones.
    """
    recorded: dict[str, tuple[Path, Any]] = {}  # by experiment: the first file, and what it says
    teacher_weights = read_sealed_json(teacher, "teacher.json", mend=TRAIN).get("sha256")
    for experiment, model in models:
        path, training = read_training(model)
        settings = {key: _part(training, key, path, TRAIN) for key in ("settings", "config")}
        if training.get("data_content") != data:
            raise UserError(f"{path}: trained on other data than is prepared; {TRAIN}")
        if training.get("teacher_sha256", teacher_weights) != teacher_weights:
            raise UserError(f"{path}: learnt from another teacher than the one in {teacher}; {TRAIN}")
        first, expected = recorded.setdefault(experiment, (path, settings))
        if settings != expected:
            raise UserError(f"{path}: '{experiment}' was trained with other settings than {first} says; {TRAIN}")
    return {experiment: settings["settings"] for experiment, (_, settings) in recorded.items()}


def _part(document: Any, key: str, path: Path, mend: str) -> dict[str, Any]:
    part = document.get(key) if isinstance(document, Mapping) else None
    if not isinstance(part, dict) or not part:
        raise UserError(f"{path}: no '{key}' in it; {mend}")
    return part


def _require_same_weights(model: Path, evaluation: Path, name: str, evaluated: Mapping[str, Any]) -> None:
    trained = read_sealed_json(model, f"{name}.json", mend=TRAIN).get("sha256")
    if not trained or evaluated.get("weights_sha256") != trained:
        raise UserError(f"{evaluation}: not of the weights in {model / name}.safetensors; {EVALUATE}")


def _read_counts(
    folder: Path, name: str, class_names: Sequence[str], second: Mapping[str, Any] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str], OutOfDomainCounts | None]:
    """The confusion matrix of the split, the counts of each image, the images' ids, and what the second set gave."""
    path = folder / f"{name}.npz"
    content = read_sealed(folder, path.name, mend=EVALUATE)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            confusion, counts, ids = file["confusion"], file["counts"], file["ids"].tolist()
            elsewhere = second and OutOfDomainCounts(
                second["content"], tuple(second["classes"]), tuple(second["sequences"]), file["out_of_domain"]
            )
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not the counts that this version of evaluate writes: {error}; {EVALUATE}") from None
    classes = len(class_names)
    if confusion.shape != (classes, classes) or counts.shape != (len(ids), 3, classes):
        raise UserError(
            f"{path}: counts of shape {confusion.shape} and {counts.shape} for {len(ids)} images, but the data set "
            f"has {classes} classes; run evaluate again"
        )
    if not np.array_equal(counts.sum(axis=0), np.stack(iou_counts(confusion))):
        raise UserError(f"{path}: the counts of the images do not add up to those of the split; run evaluate again")
    if elsewhere and elsewhere.counts.shape != (len(elsewhere.sequences), 3, len(elsewhere.classes)):
        raise UserError(f"{path}: counts of another second test set than evaluation.json names; run evaluate again")
    return confusion, counts, ids, elsewhere or None


def _read_curve(model: Path, name: str, column: str) -> dict[int, float]:
    """The values by step; a step has not all of them, and an imported teacher's curve has none."""
    file, curve = f"curves/{name}.csv", {}
    for row in csv.DictReader(read_sealed(model, file, mend=TRAIN).decode().splitlines()):
        if row.get(column):
            try:
                curve[int(row["step"])] = float(row[column])
            except (KeyError, ValueError):
                raise UserError(f"{model / file}: expected numbers under step and {column}, found {row}") from None
    return curve
