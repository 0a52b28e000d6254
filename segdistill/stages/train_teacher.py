"""Trains the teacher, or imports one, and records the validation score that every distillation checks."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdistill.config import Seed, flatten, to_dict
from segdistill.config import config as config_class
from segdistill.engine.settings import InferenceConfig, OptimizerConfig, TrainConfig
from segdistill.engine.tracker import Tracker
from segdistill.identity import Identity, effective
from segdistill.models.config import ModelConfig
from segdistill.report.highlights import Highlights, trained

if TYPE_CHECKING:
    from segdistill.engine.distributed import Processes

NAME = "teacher"


@config_class
class Config:
    """Section ``train_teacher`` of params.yaml."""

    model: ModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    # How the teacher is validated.
    inference: InferenceConfig
    seed: Seed
    # A folder with teacher.safetensors and teacher.json to use instead of training; null trains.
    import_from: Path | None


def run(
    config: Config,
    *,
    prepared: Path,
    teacher: Path,
    tracker: Tracker,
    device: str = "auto",
    work: Path | None = None,
) -> dict[str, float]:
    """Writes ``teacher``: weights, ``metrics.json`` and curves; returns seconds by activity."""
    import torch

    from segdistill.engine.distributed import processes as join
    from segdistill.engine.learner import Learner
    from segdistill.models.segmenter import build_segmenter
    from segdistill.stages._training import dataset, train_and_save

    child = tracker.child(NAME)
    child.params(flatten(to_dict(config)))
    child.tags({"student": NAME, "seed": str(config.seed)})
    facts = {"config": to_dict(config)}
    with join(device) as processes:
        info, _, _ = dataset(prepared)
        if config.import_from is not None:
            seconds = _import(config.import_from, config, prepared, teacher, child, processes)
        else:
            settings = {
                "model": to_dict(config.model), "optimizer": to_dict(config.optimizer),
                "inference": to_dict(config.inference), "train": effective(config.train),
            }  # fmt: skip
            torch.manual_seed(config.seed)
            network = build_segmenter(config.model, info.num_classes)
            seconds = train_and_save(
                Learner({NAME: network}), config.train, {NAME: config.optimizer}, prepared=prepared, output=teacher,
                inference=config.inference, identity=Identity(info.content_hash, None, config.seed, settings),
                facts=facts, trackers={NAME: child}, processes=processes,
                work=work,
            )  # fmt: skip
    child.close()
    return seconds


def _import(
    folder: Path, config: Config, prepared: Path, teacher: Path, tracker: Tracker, processes: "Processes"
) -> dict[str, float]:
    """Takes a trained teacher as it is, and measures its validation score here."""
    import time

    from segdistill.engine.evaluate import evaluate
    from segdistill.engine.learner import Learner
    from segdistill.engine.trainer import Result
    from segdistill.models.export import load_model
    from segdistill.stages._training import dataset, write

    started = time.monotonic()
    info, _, val_set = dataset(prepared)
    network, document = load_model(folder, NAME, classes=[item.name for item in info.classes])
    network.to(processes.device)
    found = evaluate(network, val_set, config.inference, num_classes=info.num_classes, processes=processes)
    if processes.is_main:
        tracker.metrics({"val/miou": found.miou, "val/pixel_accuracy": found.accuracy}, 0)
        result = Result(0, 0.0, 0.0, {NAME: found}, {NAME: []})
        facts = {"config": to_dict(config)}
        identity = Identity(info.content_hash, None, config.seed, {"imported": document["sha256"]})
        write(
            teacher, Learner({NAME: network}), result, info, identity=identity, facts=facts, trackers={NAME: tracker}
        )  # fmt: skip
    processes.barrier()
    return {"evaluation": time.monotonic() - started}


def highlights(paths: Mapping[str, Any]) -> Highlights:
    """The validation scores."""
    return trained(paths["teacher"])
