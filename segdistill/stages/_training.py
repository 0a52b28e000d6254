"""What train_teacher and distill share: from built networks to a folder of weights, scores and curves."""

import contextlib
import csv
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segdistill.data.memory import Memory
from segdistill.data.shards import DatasetInfo, ShardDataset, read_dataset_info
from segdistill.engine.cohort import Cohort
from segdistill.engine.distributed import Processes
from segdistill.engine.learner import Learner
from segdistill.engine.settings import InferenceConfig, OptimizerConfig, TrainConfig
from segdistill.engine.tracker import Tracker
from segdistill.engine.trainer import CHECKPOINT, Diverged, Result, Training
from segdistill.files import new_folder, seal
from segdistill.identity import Identity
from segdistill.models.export import count_parameters, save_model
from segdistill.models.teacher import Teacher

logger = logging.getLogger(__name__)


def dataset(prepared: Path, memory: Memory | None = None) -> tuple[DatasetInfo, ShardDataset, ShardDataset]:
    """The prepared data set's facts, its train split and its val split, whose decoded samples share the memory."""
    train_set, val_set = (ShardDataset(prepared, split, memory) for split in ("train", "val"))
    return read_dataset_info(prepared), train_set, val_set


def train_and_save(
    learner: Learner,
    config: TrainConfig,
    optimizers: Mapping[str, OptimizerConfig],
    *,
    prepared: Path,
    output: Path,
    inference: InferenceConfig,
    identity: Identity,
    facts: Mapping[str, Any],
    trackers: Mapping[str, Tracker],
    processes: Processes,
    teacher: Teacher | None = None,
    work: Path | None = None,
) -> dict[str, float]:
    """Trains, then writes ``output``: weights, ``metrics.json`` and ``curves/<name>.csv``; returns seconds by activity.

    The resume checkpoint lies in ``<work>-<identity>``, by default beside the output in ``<output>.work``, until the
    output is complete.

    Raises:
        UserError: the training diverged.
    """
    info, train_set, val_set = dataset(prepared, Memory(config.cache_gib))
    work = work.with_name(f"{work.name}-{identity.key}") if work else output.with_name(output.name + ".work")
    training = Training(output.name, learner, optimizers, identity.key, work, trackers)
    cohort = Cohort(
        [training], train_set, val_set, config, inference=inference, seed=identity.seed, teacher=teacher,
        processes=processes,
    )  # fmt: skip
    (outcome,) = cohort.run().values()
    if processes.is_main:
        if isinstance(outcome, Result):
            write(output, training.learner, outcome, info, identity=identity, facts=facts, trackers=trackers)
        forget(work)
    processes.barrier()
    if isinstance(outcome, Diverged):
        raise outcome
    return cohort.seconds


def forget(work: Path) -> None:
    """Removes the checkpoint of a training of which all is told, and its folder unless something else is there."""
    (work / CHECKPOINT).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a checkpoint that was put aside
        work.rmdir()


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
    for name, student in learner.students.items():
        trackers[name].tags(identity.facts())
        trackers[name].metrics({"perf/params": count_parameters(student)})


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
            "val/miou": evaluation.miou,
            "val/pixel_accuracy": evaluation.accuracy,
            "params": count_parameters(student),
        }
        classes = [{"name": item.name, "color": list(item.color)} for item in info.classes]
        document = {"classes": classes, "seed": identity.seed, **identity.facts(), **scores[name]}
        save_model(folder, name, student, document)
        _write_curve(folder / "curves" / f"{name}.csv", result.curves[name])
    metrics = {
        "students": scores,
        "iterations": result.iterations,
        "seconds": result.seconds,
        "startup_seconds": result.startup_seconds,
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
        writer = csv.DictWriter(file, ["step", "train/loss/total", "val/miou"])
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))
