"""What methods teach, and what they do where there is nothing to learn, at the smallest size at which it is stable.

benchmarks/controls.py asks the same of real networks; docs/results/controls.md has its answers.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CLASSES, INFERENCE, Blobs, TinySegmenter, make_training, train_config
from torch import Tensor, nn

from benchmarks._permuted import Permuted
from segdistill.config import parse
from segdistill.engine.cohort import Cohort
from segdistill.engine.distributed import Processes
from segdistill.engine.settings import OptimizerConfig
from segdistill.engine.trainer import Result
from segdistill.metrics.confusion import mean_iou
from segdistill.models.teacher import Teacher

HERE = Processes(0, 1, torch.device("cpu"))
HELD = {"name": "sgd", "lr": 1e-12, "momentum": 0.0, "weight_decay": 0.0}
ITERATIONS = 120
CHANCE = 1 / (2 * CLASSES - 1)  # mIoU of uniform guesses among classes that are equally frequent


def train(trainings: Any, teacher: Teacher | None = None, iterations: int = ITERATIONS) -> dict[str, float]:
    """Validation mIoU of each training's student "cnn", and under "<name>, permuted" that on permuted classes."""
    settings = train_config(iterations=iterations, validate_every=10**6, checkpoint_every=10**6, log_every=10**6)
    cohort = Cohort(
        trainings, Blobs(), Blobs(8, seed=1), settings, inference=INFERENCE, seed=3, teacher=teacher, processes=HERE
    )  # fmt: skip
    scores = {}
    for name, outcome in cohort.run().items():
        assert isinstance(outcome, Result), outcome
        confusion = outcome.evaluations["cnn"].confusion
        scores[name] = mean_iou(confusion)
        scores[f"{name}, permuted"] = mean_iou(np.roll(confusion, 1, axis=0))
    return scores


@pytest.fixture(scope="module")
def good() -> TinySegmenter:
    """A network that was trained with labels."""
    torch.manual_seed(5)
    network = TinySegmenter(width=12)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.02)
    images, labels = blobs_as_batch()
    for _ in range(60):
        optimizer.zero_grad()
        mean_cross_entropy(network, images, labels).backward()
        optimizer.step()
    return network


def blobs_as_batch() -> tuple[Tensor, Tensor]:
    blobs = Blobs(32, seed=7)
    return torch.as_tensor(blobs.images).permute(0, 3, 1, 2).float() / 255, torch.as_tensor(blobs.labels).long()


def mean_cross_entropy(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    logits = network(images).logits
    return nn.functional.cross_entropy(nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear"), labels)


def test_what_compares_predictions_teaches_a_random_student_the_classes_without_any_other_loss(
    good: TinySegmenter, tmp_path: Path
) -> None:
    methods = ("kd", "dkd", "dist", "apd", "c2vkd")
    scores = train(
        [make_training(name, tmp_path / name, method=name, supervised=0.0) for name in methods], Teacher(good)
    )
    assert {name: scores[name] > 2 * CHANCE for name in methods} == dict.fromkeys(methods, True)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("at", {}),
        ("fitnet", {}),
        ("mgd", {}),
        ("apd", {"global_weight": 0.0}),
        ("c2vkd", {"pdd_weight": 0.0}),
        ("hfd_bsd", {"pixel_weight": 0.0}),
    ],
)
def test_what_compares_features_alone_leaves_the_classifier_as_it_was_drawn(
    good: TinySegmenter, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    training = make_training(method, tmp_path, method=method, settings=settings, supervised=0.0)
    student: Any = training.learner.students["cnn"]
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    train([training], Teacher(good), iterations=2)
    moved = {name.split(".")[0] for name, weight in student.state_dict().items() if not weight.equal(before[name])}
    assert moved
    assert "classifier" not in moved


def test_a_teacher_with_permuted_classes_beats_the_labels_in_kd_and_is_corrected_by_them_in_c2vkd(
    good: TinySegmenter, tmp_path: Path
) -> None:
    trainings = [
        make_training(name, tmp_path / name, method=name, settings={"weight": 2.0}) for name in ("kd", "c2vkd")
    ]
    scores = train(trainings, Teacher(Permuted(good)))  # type: ignore[arg-type]
    assert scores["kd"] < CHANCE < 2 * CHANCE < scores["kd, permuted"]
    assert scores["c2vkd, permuted"] < CHANCE < 2 * CHANCE < scores["c2vkd"]


def test_a_held_peer_that_knows_nothing_holds_back_less_who_selects_and_least_who_learns_alone(tmp_path: Path) -> None:
    """Even predictions: where the student is wrong and sure they are the better ones, so BSD does not notice fully."""
    selective = {"hfd_weight": 0.0, "region_weight": 0.0}
    trainings = {
        "dml": make_training("dml", tmp_path / "dml", method="dml"),
        "bsd": make_training("bsd", tmp_path / "bsd", method="hfd_bsd", settings=selective),
        "none": make_training("none", tmp_path / "none"),
    }
    for name in ("dml", "bsd"):
        peer: Any = trainings[name].learner.students["vit"]
        nn.init.zeros_(peer.classifier.weight)
        nn.init.zeros_(peer.classifier.bias)
        optimizers = {**trainings[name].optimizers, "vit": parse(OptimizerConfig, HELD, "optimizer")}
        trainings[name] = dataclasses.replace(trainings[name], optimizers=optimizers)
    train(list(trainings.values()))
    batch = blobs_as_batch()
    errors = {
        name: mean_cross_entropy(training.learner.students["cnn"], *batch).item()
        for name, training in trainings.items()
    }
    assert errors["none"] + 0.1 < errors["bsd"] < errors["dml"] - 0.1
