"""A network and a data set small enough to train in a test, and a script around them that can be killed.

``python tiny.py WORK OUT [key=value ...]`` trains and writes the student's weights to OUT; :func:`main` has the keys.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segdistill.config import parse
from segdistill.engine import checkpoint
from segdistill.engine.cohort import Cohort
from segdistill.engine.distributed import Processes, processes
from segdistill.engine.evaluate import evaluate
from segdistill.engine.inference import Views
from segdistill.engine.learner import Learner
from segdistill.engine.settings import InferenceConfig, OptimizerConfig, TrainConfig
from segdistill.engine.supervision import Supervision
from segdistill.engine.tracker import Tracker
from segdistill.engine.trainer import Diverged, Result, Trainer, Training
from segdistill.errors import Interrupted
from segdistill.losses.masks import IGNORE_INDEX, UNLABELLED
from segdistill.methods import build_offline, build_online, parse_method
from segdistill.models.outputs import ModelInfo, Outputs
from segdistill.models.teacher import Teacher

CLASSES, SIZE = 3, (16, 24)


class TinySegmenter(nn.Module):
    """Two convolutions at stride 2 and a classifier; optional dropout, no batch statistics."""

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.decoder = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Conv2d(width, CLASSES, 1)
        self.info = ModelInfo(CLASSES, (width,) * 4, (2,) * 4, width, 2, 2, "cnn")

    def forward(self, images: Tensor) -> Outputs:
        feature = self.encoder(images)
        last = self.decoder(feature)
        return Outputs(self.classifier(last), (feature,) * 4, last)

    def logits(self, images: Tensor) -> Tensor:
        return self(images).logits

    def encoder_parameters(self) -> Any:
        return self.encoder.parameters()

    def decoder_parameters(self) -> Any:
        return [*self.decoder.parameters(), *self.classifier.parameters()]


class Blobs:
    """In-memory samples: bright blocks whose brightness is the class.

    Args:
        void: the share of pixels without a label in every other sample; the others have no void.
    """

    def __init__(self, samples: int = 16, seed: int = 0, void: float = 0.0) -> None:
        random = np.random.default_rng(seed)
        coarse = random.integers(0, CLASSES, (samples, SIZE[0] // 4, SIZE[1] // 4), dtype=np.uint8)
        self.labels = coarse.repeat(4, 1).repeat(4, 2)
        noise = random.integers(0, 60, (samples, *SIZE, 3), dtype=np.uint8)
        self.images = (self.labels[..., None] * 80 + noise).astype(np.uint8)
        self.labels[::2][random.random((samples - samples // 2, *SIZE)) < void] = IGNORE_INDEX

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.images[index], self.labels[index]

    def rows(self, index: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        image, label = self[index]
        return image[rows], label[rows]

    def size(self, index: int) -> tuple[int, int]:
        return SIZE

    def sample_id(self, index: int) -> str:
        return f"{index:04d}"


def train_config(**changes: Any) -> TrainConfig:
    augmentation = {"crop_size": SIZE, "scale": (1.0, 1.0), "flip": 0.5, "color_jitter": 0.0}
    base = {
        "iterations": 8, "seconds": None, "batch_size": 8, "accumulate": 1, "augmentation": augmentation,
        "precision": "fp32", "channels_last": False, "compile": False, "max_grad_norm": None, "workers": 0,
        "cache_gib": 0, "log_every": 4, "validate_every": 3, "checkpoint_every": 2, "gradient_share_every": 0,
        "select": "last",
    }  # fmt: skip
    return parse(TrainConfig, base | changes, "train")


INFERENCE = parse(
    InferenceConfig, {"batch_size": 4, "input_scale": 1.0, "window": None, "window_stride": 1.0}, "inference"
)
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
ADAMW = {"name": "adamw", "lr": 0.01}

# Of methods whose defaults are too large for a network this small.
SETTINGS: dict[str, dict[str, Any]] = {
    "apd": {"hidden_channels": 8, "out_channels": 8, "teacher_head_lr": 0.01},
    "cirkd": {"pixel_queue": 20, "region_queue": 6, "pixel_contrast": 12, "region_contrast": 9},
    "hfd_bsd": {"hfd": "direct"},
    "skd": {"holistic_weight": 0.1, "critic_channels": 4},
}


def make_training(
    name: str,
    work: Path,
    *,
    method: str = "none",
    dropout: float = 0.0,
    trackers: Tracker | None = None,
    settings: dict[str, Any] | None = None,
    supervised: float = 1.0,
    fingerprint: str = "tiny",
    budget: float = 1.0,
    pseudo_labels: float | None = None,
    class_weights: Sequence[float] | None = None,
) -> Training:
    """One student, alone or under an offline method, or two peers (SGD, AdamW) of an online one."""
    torch.manual_seed(0)
    students = {"cnn": TinySegmenter(dropout=dropout)}
    optimizers = {"cnn": parse(OptimizerConfig, SGD, "optimizer")}
    methods = {}
    if method != "none":
        kind, config = parse_method({"name": method, **SETTINGS.get(method, {}), **(settings or {})}, "methods")
        if kind.kind == "offline":
            methods = build_offline([config], students["cnn"].info, TinySegmenter(width=12).info)
        else:
            students["vit"] = TinySegmenter(width=6, dropout=dropout)
            optimizers["vit"] = parse(OptimizerConfig, ADAMW, "optimizer")
            methods = build_online([config], {name: student.info for name, student in students.items()})
    labels = Supervision(class_weights=class_weights)
    learner = Learner(
        students, dict(methods), supervised=supervised, pseudo_labels=pseudo_labels, supervision=labels
    )  # fmt: skip
    trackers_of = dict.fromkeys(students, trackers or Tracker())
    return Training(name, learner, optimizers, fingerprint, work, trackers_of, budget)


def make_teacher() -> Teacher:
    torch.manual_seed(0)
    TinySegmenter()  # the student's numbers, which are not the teacher's
    return Teacher(TinySegmenter(width=12))


def make_cohort(trainings: Sequence[Training], here: Processes, *, void: float = 0.0, **changes: Any) -> Cohort:
    """Trainings on blobs, with a teacher, and TrainConfig's ``changes``; other blobs have no labels."""
    unlabelled = Blobs(6, seed=2)
    unlabelled.labels[:] = UNLABELLED
    return Cohort(
        trainings, Blobs(void=void), Blobs(4, seed=1), train_config(**changes), inference=INFERENCE, seed=3,
        teacher=make_teacher(), processes=here, unlabelled_set=unlabelled,
    )  # fmt: skip


def make_trainer(work: Path, here: Processes, **options: Any) -> Any:
    """The only member of its cohort, with the cohort's ``run``, which gives its result or raises why there is none.

    Args:
        options: of :func:`make_training` and :func:`make_cohort`.
    """
    keys = (
        "method",
        "dropout",
        "trackers",
        "settings",
        "supervised",
        "fingerprint",
        "budget",
        "pseudo_labels",
        "class_weights",
    )
    own = {key: options.pop(key) for key in keys if key in options}
    cohort = make_cohort([make_training("tiny", work, **own)], here, **options)
    (trainer,) = cohort.members.values()
    trainer.cohort, trainer.run = cohort, lambda: outcome(cohort)
    return trainer


def outcome(cohort: Cohort) -> Result:
    (only,) = cohort.run().values()
    if isinstance(only, Diverged):
        raise only
    return only


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.learner.state_dict().items()}


def main(work: str, out: str, *options: str) -> int:
    """Keys: method, dropout, supervised, void, any of TrainConfig's, slow, started, stop_after, and steps of signals.

    ``class_weights`` are numbers with commas between them. Several methods, with commas between them, make a cohort;
    ``dead`` is a method whose loss is not finite. Signals, to this process, are ``die_at`` and ``die_in_save``
    (SIGKILL), and ``told_in_save`` (SIGTERM).
    """
    changes: dict[str, Any] = dict(option.split("=") for option in options)
    die_at, slow = int(changes.pop("die_at", -1)), float(changes.pop("slow", 0))
    started, stop_after = changes.pop("started", ""), int(changes.pop("stop_after", -1))
    in_save = {signal.SIGKILL: changes.pop("die_in_save", None), signal.SIGTERM: changes.pop("told_in_save", None)}
    deadly = {int(step): number for number, step in in_save.items() if step is not None}
    methods, dead = changes.pop("method", "none").split(","), changes.pop("dead", "")
    changes |= {key: int(text) for key, text in changes.items() if text.isdigit()}
    changes |= {key: float(changes[key]) for key in ("dropout", "supervised", "void") if key in changes}
    if "class_weights" in changes:
        changes["class_weights"] = [float(weight) for weight in changes["class_weights"].split(",")]
    own = {key: changes.pop(key) for key in ("dropout", "supervised", "class_weights") if key in changes}
    torch.set_num_threads(1)
    with processes("cpu") as here:
        folders = [Path(work), *(Path(work) / method for method in methods[1:])]
        trainings = [
            make_training(method, folder, method=method, **own) for method, folder in zip(methods, folders, strict=True)
        ]
        cohort = make_cohort(trainings, here, **changes)
        members = list(cohort.members.values())
        step, agree = members[0].step, cohort._agree
        for member in members:
            if member.training.name == dead:
                member.learner.total = lambda terms, progress: sum(terms["cnn"].values()) * float("nan")

        def dying_step() -> None:
            if members[0].progress.iteration == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if started:
                Path(started).touch()
            time.sleep(slow)
            step()

        def told(stop: Any, iteration: int, takers: Any) -> bool:
            return agree(stop, iteration, takers) or iteration == stop_after

        def dying_replace(self: Path, target: Path) -> Path:
            if members[0].progress.iteration in deadly:
                os.kill(os.getpid(), deadly[members[0].progress.iteration])
            return self.rename(target)

        members[0].step, cohort._agree = dying_step, told
        if deadly:
            Path.replace = dying_replace  # type: ignore[method-assign, assignment]
        try:
            outcomes = cohort.run()
        except Interrupted:
            return 75
        sound = [member for member in members if isinstance(outcomes[member.training.name], Result)]
        if here.is_main:
            for number, member in enumerate(sound):
                state = {"weights": weights(member), "curves": member.progress.curves}
                checkpoint.save(Path(out) if not number else Path(f"{out}-{member.training.name}"), state)
    return 0


def evaluated(out: str, samples: int, environment: dict[str, str]) -> None:
    """What one process of as many as the environment says has counted, in ``out/<rank>``."""
    os.environ.update(environment)
    torch.manual_seed(0)
    with processes("cpu") as here:
        counted = evaluate(
            TinySegmenter(), Blobs(samples), Views(INFERENCE), num_classes=CLASSES, processes=here  # type: ignore[arg-type]
        )  # fmt: skip
        counts = {"confusion": torch.from_numpy(counted.confusion), "counts": torch.from_numpy(counted.counts)}
        checkpoint.save(Path(out) / str(here.rank), counts)


def child(arguments: list[str], environment: dict[str, str]) -> None:
    """The script, in a process that another one forked."""
    os.environ.update(environment)
    sys.exit(main(*arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
