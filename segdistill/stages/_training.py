"""What train_teacher and distill share: from built networks to a folder of weights, scores and curves."""

import csv
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segdistill.data.shards import DatasetInfo, ShardDataset, read_dataset_info
from segdistill.engine.distributed import Processes
from segdistill.engine.learner import Learner
from segdistill.engine.settings import InferenceConfig, OptimizerConfig, TrainConfig
from segdistill.engine.tracker import Tracker
from segdistill.engine.trainer import Result, Trainer
from segdistill.models.export import count_parameters, save_model

logger = logging.getLogger(__name__)


def dataset(prepared: Path) -> tuple[DatasetInfo, ShardDataset, ShardDataset]:
    """The prepared data set's facts, its train split and its val split."""
    return read_dataset_info(prepared), ShardDataset(prepared, "train"), ShardDataset(prepared, "val")


def fingerprint(**facts: Any) -> str:
    """A short name of everything that defines a run; a checkpoint of another run is not resumed."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def train_and_save(
    learner: Learner,
    config: TrainConfig,
    optimizers: Mapping[str, OptimizerConfig],
    *,
    prepared: Path,
    output: Path,
    seed: int,
    inference: InferenceConfig,
    facts: Mapping[str, Any],
    trackers: Mapping[str, Tracker],
    processes: Processes,
    work: Path | None = None,
) -> dict[str, float]:
    """Trains, then writes ``output``: weights, ``metrics.json`` and ``curves/<name>.csv``; returns seconds by activity.

    The resume checkpoint lies in ``<work>-<fingerprint>``, by default beside the output in ``<output>.work``, until the
    output is complete.
    """
    info, train_set, val_set = dataset(prepared)
    name_of_run = fingerprint(**facts, seed=seed, data=json.loads((prepared / "dataset.json").read_text()))
    work = work.with_name(f"{work.name}-{name_of_run}") if work else output.with_name(output.name + ".work")
    trainer = Trainer(
        learner, train_set, val_set, config, optimizers, inference=inference, seed=seed, work=work,
        fingerprint=name_of_run, trackers=trackers, processes=processes,
    )  # fmt: skip
    result = trainer.run()
    if processes.is_main:
        write(output, trainer.learner, result, info, seed=seed, facts=facts, trackers=trackers)
        shutil.rmtree(work, ignore_errors=True)
    processes.barrier()
    return {
        "data": result.data_seconds,
        "training": result.seconds - result.data_seconds,
        "evaluation": result.evaluation_seconds,
    }


def write(
    output: Path,
    learner: Learner,
    result: Result,
    info: DatasetInfo,
    *,
    seed: int,
    facts: Mapping[str, Any],
    trackers: Mapping[str, Tracker],
) -> None:
    """Fills the output folder under another name and renames it when it is complete."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "curves").mkdir(parents=True)
    scores: dict[str, dict[str, float]] = {}
    for name, student in learner.students.items():
        found = result.evaluations[name]
        scores[name] = {
            "val/miou": found.miou, "val/pixel_accuracy": found.accuracy, "params": count_parameters(student),
        }  # fmt: skip
        classes = [{"name": item.name, "color": list(item.color)} for item in info.classes]
        save_model(partial, name, student, {"classes": classes, "seed": seed, **scores[name]})
        _write_curve(partial / "curves" / f"{name}.csv", result.curves[name])
        trackers[name].metrics({"perf/params": scores[name]["params"]})
    metrics = {
        "students": scores,
        "iterations": result.iterations,
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "seed": seed,
        **facts,
    }
    (partial / "metrics.json").write_text(json.dumps(metrics, indent=2, default=str) + "\n")
    shutil.rmtree(output, ignore_errors=True)
    partial.replace(output)


def _write_curve(path: Path, points: list[dict[str, float]]) -> None:
    """One row a step; a cell stays blank where nothing was measured."""
    rows: dict[int, dict[str, float]] = {}
    for point in points:
        rows.setdefault(int(point["step"]), {}).update(point)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/loss/total", "val/miou"])
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))
