"""A training step with a frozen teacher, against the sum of its parts in the same run. Prints Markdown.

    python benchmarks/step.py [--experiments none kd apd dml] [--steps 20] [--device auto]
    python benchmarks/step.py --methods [kd apd ...]

The first form takes experiments as params.yaml has them (by default those that it runs); the second puts each method,
in its default config, between the networks of params.yaml: an offline one between the teacher and the CNN student
(``c2vkd``: the ViT student), an online one between the two students.

The parts are the teacher's forward pass, and each student's forward and backward pass with its cross-entropy, in the
same precision. What a step costs beyond them is the method and the optimiser. Rounds of step and parts alternate, so
that a slow minute of the machine falls on both.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _cost import seconds
from _table import machine, markdown

from segdistill.config import parse, read_yaml
from segdistill.engine.learner import Learner
from segdistill.engine.optim import build_optimizer, student_optimizer
from segdistill.engine.settings import OptimizerConfig
from segdistill.losses import cross_entropy
from segdistill.methods import METHODS, build_offline, build_online, load
from segdistill.models.segmenter import build_segmenter
from segdistill.models.teacher import Teacher
from segdistill.stages.distill import ExperimentConfig, parse_methods
from segdistill.stages.train_teacher import Config as TeacherConfig

CLASSES = 11
FOR_A_VIT = ("c2vkd",)  # a CNN teaches a ViT


def of_methods(params: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """An experiment for each method in its default config, with the students of params.yaml."""
    students: dict[str, Any] = {}
    for experiment in params["experiments"].values():
        students = experiment["students"] | students
    experiments = {}
    for name in names:
        takes = ("cnn", "vit") if load(name).kind == "online" else ("vit",) if name in FOR_A_VIT else ("cnn",)
        chosen = {student: students[student] for student in takes}
        experiments[name] = {"students": chosen, "methods": [{"name": name}]}
    return experiments


def build(
    params: Mapping[str, Any], name: str, experiment: Mapping[str, Any], device: torch.device
) -> tuple[Learner, list[torch.optim.Optimizer]]:
    """The experiment's learner and optimisers, as stage ``distill`` makes them."""
    settings = parse(ExperimentConfig, experiment, f"experiments.{name}")
    kind, parsed = parse_methods(name, settings)
    students = {key: build_segmenter(one.model, CLASSES) for key, one in settings.students.items()}
    config = parse(TeacherConfig, params["train_teacher"], "train_teacher")
    teacher = Teacher(build_segmenter(config.model, CLASSES)) if kind == "offline" else None
    infos = {key: student.info for key, student in students.items()}
    configs = [item for _, item in parsed]
    if teacher is None:
        methods = build_online(configs, infos)
    else:
        methods = build_offline(configs, infos[next(iter(infos))], teacher.info)
    learner = Learner(students, methods, teacher, supervised=settings.supervised, auxiliary=settings.auxiliary).to(
        device
    )
    optimizers = [
        student_optimizer(one.optimizer, students[key], methods.values(), key) for key, one in settings.students.items()
    ]
    for method in methods.values():
        for parameters, own in method.own_optimizers().values():
            optimizers.append(build_optimizer(parse(OptimizerConfig, own, "own"), [(parameters, 1.0)]))
    return learner, optimizers


def measure(
    params: Mapping[str, Any], name: str, experiment: Mapping[str, Any], *, steps: int, size: Sequence[int],
    batch: int, precision: str, device: torch.device,
) -> list[str]:  # fmt: skip
    """One row of the table."""
    torch.manual_seed(0)
    learner, optimizers = build(params, name, experiment, device)
    images = torch.rand(batch, 3, *size, device=device)
    target = torch.randint(0, CLASSES, (batch, *size), device=device)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        with autocast():
            terms = learner(images, target)
        learner.total(terms).backward()
        for optimizer in optimizers:
            optimizer.step()

    def parts() -> None:
        if learner.teacher is not None:
            with autocast():
                learner.teacher(images)
        for student in learner.students.values():
            student.zero_grad(set_to_none=True)
            with autocast():
                loss = cross_entropy(student(images).logits, target)
            loss.backward()

    step(), parts()
    rounds = [(seconds(step, device, 3), seconds(parts, device, 3)) for _ in range(max(1, steps // 3))]
    whole, sum_of_parts = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(one / other for one, other in rounds)
    return [name, f"{1000 * whole:.0f}", f"{1000 * sum_of_parts:.0f}", f"{ratio:.2f}", f"{batch / whole:.1f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--experiments", nargs="+", help="(those that params.yaml runs)")
    parser.add_argument(
        "--methods", nargs="*", choices=list(METHODS), help="methods in their default config; none: all"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    device, params = torch.device(given.device), read_yaml(given.params)
    if given.methods is None:
        experiments = {name: params["experiments"][name] for name in given.experiments or params["run"]}
    else:
        experiments = of_methods(params, given.methods or list(METHODS))
    rows = [
        measure(params, name, experiment, steps=given.steps, size=given.size, batch=given.batch,
                precision=given.precision, device=device)
        for name, experiment in experiments.items()
    ]  # fmt: skip
    height, width = given.size
    print(
        f"One training step, batch {given.batch} of {width}x{height}, {given.precision}, {device.type}. "
        f"{machine(['torch'])}\n"
    )
    first = "experiment" if given.methods is None else "method"
    print(markdown([first, "step, ms", "sum of its parts, ms", "ratio (median of rounds)", "images/s"], rows))


if __name__ == "__main__":
    main()
