"""The presets of published protocols: each of their experiments takes a step, at the number of classes of its data."""

from pathlib import Path
from typing import Any

import pytest
import torch

from segdistill.config import parse, read_yaml
from segdistill.data.layouts import LAYOUTS
from segdistill.engine.building import build_learner
from segdistill.models.teacher import Teacher
from segdistill.plan import TeacherConfig, experiments, parse_methods

PRESETS = Path(__file__).resolve().parents[2] / "presets"


def without_weights(section: Any) -> Any:
    """A section of a preset whose encoders begin at random weights, which need no download."""
    if isinstance(section, dict):
        return {key: "none" if key == "encoder_weights" else without_weights(value) for key, value in section.items()}
    return [without_weights(value) for value in section] if isinstance(section, list) else section


@pytest.mark.parametrize(
    "name", ["cityscapes", "cityscapes-c2vkd", "cityscapes-segformer", "ade20k-apd", "voc-hfd-bsd"]
)  # fmt: skip
def test_each_experiment_of_a_published_protocol_takes_a_step(name: str) -> None:
    params = without_weights(read_yaml(PRESETS / f"{name}.yaml"))
    layout: Any = LAYOUTS[params["prepare"]["layout"]]
    classes = len(layout.published_classes)
    config = parse(TeacherConfig, params["train_teacher"], "train_teacher")
    teacher = Teacher(build_learner({"teacher": config.model}, seed=0, num_classes=classes).students["teacher"])
    images, target = torch.rand(2, 3, 64, 64), torch.randint(0, classes, (2, 64, 64))
    outputs = teacher(images)
    for label, experiment in experiments({key: params["experiments"][key] for key in params["run"]}).items():
        kind, methods = parse_methods(label, experiment)
        learner = build_learner(
            {student: entry.model for student, entry in experiment.students.items()}, [method for _, method in methods],
            seed=0, num_classes=classes, teacher=teacher.info if kind == "offline" else None,
            supervised=experiment.supervised, auxiliary=experiment.auxiliary,
        )  # fmt: skip
        terms = learner(images, target, None, outputs if learner.needs_teacher else None)
        loss = learner.total(terms, 0.5)
        loss.backward()
        assert loss.isfinite(), label
        for student in learner.students.values():
            assert any(weight.grad is not None and weight.grad.any() for weight in student.parameters()), label
