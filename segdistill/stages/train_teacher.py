"""Trains the teacher, or imports one, and records the validation score that every distillation checks."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdistill.config import flatten, to_dict
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.identity import Identity, effective
from segdistill.plan import TEACHER, TeacherConfig, TeacherPlan, read_plan
from segdistill.report.highlights import Highlights, trained
from segdistill.stages._cohort import made_by

if TYPE_CHECKING:
    from segdistill.engine.distributed import Processes


def run(
    *,
    plan: Path,
    prepared: Path,
    teacher: Path,
    tracker: Tracker,
    device: str = "auto",
    work: Path | None = None,
) -> dict[str, float]:
    """Writes ``teacher``: weights, ``metrics.json`` and curves, unless it is there with the same identity.

    The checkpoint lies in ``work``, by default beside the output in ``<teacher>.work``, until the output is complete.

    Returns:
        Seconds by activity.
    """
    from segdistill.data.shards import read_dataset_info
    from segdistill.engine.distributed import processes as join

    config: TeacherConfig = read_plan(TeacherPlan, plan).settings
    if config.folders:
        return _import(config, prepared, teacher, tracker, device)
    settings = {
        "model": to_dict(config.model), "optimizer": to_dict(config.optimizer),
        "inference": to_dict(config.inference), "train": effective(config.train),
    }  # fmt: skip
    content = read_dataset_info(prepared).content_hash
    identity = Identity(content, None, config.seed, settings, config.code)
    if made_by(teacher, "metrics.json") == identity.key:
        return {}
    with join(device) as processes:
        return _train(config, identity, prepared, teacher, work, _child(tracker, config, identity), processes)


def _child(tracker: Tracker, config: TeacherConfig, identity: Identity) -> Tracker:
    child = tracker.child(TEACHER)
    child.params(flatten(to_dict(config)))
    child.tags({"student": TEACHER, "seed": str(config.seed), **identity.facts()})
    return child


def _train(
    config: TeacherConfig, identity: Identity, prepared: Path, teacher: Path, work: Path | None, tracker: Tracker,
    processes: "Processes",
) -> dict[str, float]:  # fmt: skip
    from segdistill.data.memory import Memory
    from segdistill.engine.building import build_learner
    from segdistill.engine.cohort import Cohort
    from segdistill.engine.progress import TrainingBar
    from segdistill.engine.supervision import class_weights
    from segdistill.engine.trainer import Ended, Training
    from segdistill.stages._training import dataset, forget, write

    info, train_set, val_set = dataset(prepared, Memory(config.train.cache_gib))
    work = work or teacher.with_name(teacher.name + ".work")
    learner = build_learner(
        {TEACHER: config.model}, seed=config.seed, num_classes=info.num_classes, images=info.images,
        loss=config.train.loss,
        class_weights=class_weights(config.train.loss, prepared, "train_teacher.train.loss"),
    )  # fmt: skip
    training = Training(
        name=TEACHER, learner=learner,
        optimizers={TEACHER: config.optimizer}, fingerprint=identity.key, work=work, trackers={TEACHER: tracker},
    )  # fmt: skip
    with TrainingBar(TEACHER, [[TEACHER]], [1], enabled=processes.is_main) as bar:
        cohort = Cohort(
            [training], train_set, val_set, config.train, inference=config.inference, seed=config.seed, teacher=None,
            processes=processes, advanced=bar.update,
        )  # fmt: skip
        outcome = cohort.run()[TEACHER]
    if isinstance(outcome, Ended):
        if processes.is_main:
            forget(work)
        raise outcome
    if processes.is_main:
        facts = {"config": to_dict(config)}
        write(
            teacher, training.learner, outcome, info, identity=identity, facts=facts, trackers=training.trackers
        )  # fmt: skip
        forget(work)
    processes.barrier()
    tracker.close()
    return cohort.seconds


def _import(config: TeacherConfig, prepared: Path, teacher: Path, tracker: Tracker, device: str) -> dict[str, float]:
    """Takes a trained teacher as it is, and measures its validation score here, unless that is done."""
    from segdistill.engine.distributed import processes as join
    from segdistill.engine.evaluate import evaluate
    from segdistill.engine.inference import Views
    from segdistill.engine.learner import Learner
    from segdistill.engine.trainer import Result
    from segdistill.models.teachers import files_hash, licence, open_teacher
    from segdistill.stages._training import dataset, write

    started = time.monotonic()
    info, _, val_set = dataset(prepared)
    settings = {
        "imported": files_hash(config.folders), "labels": config.labels, "inference": to_dict(config.inference)
    }  # fmt: skip
    identity = Identity(info.content_hash, None, config.seed, settings, config.code)
    if made_by(teacher, "metrics.json") == identity.key:
        return {}
    with join(device) as processes:
        network = open_teacher(config.folders, [item.name for item in info.classes], config.labels)
        if (network.images.channels, network.images.bits) != (info.images.channels, info.images.bits):
            raise UserError(
                f"train_teacher.import_from: a network for images with {network.images}, but those of the data set have"
                f" {info.images}"
            )
        network.to(processes.device)
        views = Views(config.inference)
        evaluation = evaluate(network, val_set, views, num_classes=info.num_classes, processes=processes)
        if processes.is_main:
            child = _child(tracker, config, identity)
            child.metrics({"val/miou": evaluation.miou, "val/pixel_accuracy": evaluation.accuracy}, 0)
            result = Result(0, 0.0, 0.0, {TEACHER: evaluation}, {TEACHER: []})
            facts = {"config": to_dict(config), "licence": licence(config.folders)}
            networks: Any = {TEACHER: network}  # a learner of which nothing is asked but to hold it
            write(
                teacher, Learner(networks), result, info, identity=identity, facts=facts,
                trackers={TEACHER: child},
            )  # fmt: skip
            child.close()
        processes.barrier()
    return {"evaluation": time.monotonic() - started}


def highlights(paths: Mapping[str, Any]) -> Highlights:
    """The validation scores."""
    return trained(paths["teacher"])
