"""What train_teacher and distill share: from what a training left to a folder of weights, scores and curves."""

import contextlib
import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segdistill.data.layouts.layout import WITHOUT_MASKS
from segdistill.data.memory import Memory
from segdistill.data.shards import INFO_FILE, DatasetInfo, ShardDataset, read_dataset_info
from segdistill.engine.learner import Learner
from segdistill.engine.tracker import Tracker
from segdistill.engine.trainer import CHECKPOINT, Result
from segdistill.errors import UserError
from segdistill.files import new_folder, seal
from segdistill.identity import Identity
from segdistill.models.export import count_parameters, save_model


def dataset(prepared: Path, memory: Memory | None = None) -> tuple[DatasetInfo, ShardDataset, ShardDataset]:
    """The prepared data set's facts, its train split and its val split, whose decoded samples share the memory."""
    train_set, val_set = (ShardDataset(prepared, split, memory) for split in ("train", "val"))
    return read_dataset_info(prepared), train_set, val_set


def unlabelled_set(prepared: Path, wanted: int, memory: Memory | None = None) -> ShardDataset | None:
    """The images without labels, if any are wanted.

    Raises:
        UserError: there are none.
    """
    if not wanted:
        return None
    if not read_dataset_info(prepared).splits.get(WITHOUT_MASKS):
        raise UserError(
            f"distill.train.unlabelled: {wanted}, but {prepared / INFO_FILE} has no split '{WITHOUT_MASKS}'; give the"
            " data set one, lower prepare.labelled, or set it to 0"
        )
    return ShardDataset(prepared, WITHOUT_MASKS, memory)


def write(
    output: Path,
    learner: Learner,
    result: Result,
    info: DatasetInfo,
    *,
    identity: Identity,
    facts: Mapping[str, Any],
    trackers: Mapping[str, Tracker],
) -> None:
    """Fills the output folder, sealed, under another name and renames it when it is complete."""
    with new_folder(output) as partial:
        _fill(partial, learner, result, info, identity, facts)
    costs = {"perf/training_wall_seconds": result.seconds}
    if result.cpu_seconds is not None:
        costs["perf/training_cpu_seconds"] = result.cpu_seconds
    for name, student in learner.students.items():
        trackers[name].metrics({"perf/params": count_parameters(student), **costs})


def forget(work: Path) -> None:
    """Removes the checkpoints of trainings of which all is told, and the folders that they leave empty."""
    for folder in (*work.glob("*/"), work):
        (folder / CHECKPOINT).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is there: a checkpoint that was put aside
            folder.rmdir()


def _fill(
    folder: Path,
    learner: Learner,
    result: Result,
    info: DatasetInfo,
    identity: Identity,
    facts: Mapping[str, Any],
) -> None:
    (folder / "curves").mkdir()
    scores: dict[str, dict[str, float]] = {}
    for name, student in learner.students.items():
        evaluation = result.evaluations[name]
        scores[name] = {
            "val/miou": evaluation.miou, "val/pixel_accuracy": evaluation.accuracy, "params": count_parameters(student),
        }  # fmt: skip
        classes = [{"name": item.name, "color": list(item.color)} for item in info.classes]
        document = {"classes": classes, "seed": identity.seed, **identity.facts(), **scores[name]}
        save_model(folder, name, student, document)
        _write_curve(folder / "curves" / f"{name}.csv", result.curves[name])
    metrics = {
        "students": scores,
        "iterations": result.iterations,
        "seconds": result.seconds,
        "startup_seconds": result.startup_seconds,
        "cpu_seconds": result.cpu_seconds,
        "images_per_second": result.images_per_second,
        "seed": identity.seed,
        **identity.facts(),
        **facts,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, default=str) + "\n")
    seal(folder)


def _write_curve(path: Path, points: list[dict[str, float]]) -> None:
    """One row a step; a cell stays blank where nothing was measured."""
    rows: dict[int, dict[str, float]] = {}
    for point in points:
        rows.setdefault(int(point["step"]), {}).update(point)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/loss/total", "train/loss/ce", "val/miou"])
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))
