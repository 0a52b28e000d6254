"""A training step with a frozen teacher, against the sum of its parts in the same run. Prints Markdown.

    python benchmarks/step.py [--experiments none kd apd dml] [--steps 20] [--device auto]

The parts are the teacher's forward pass, and each student's forward and backward pass with its cross-entropy. What a
step costs beyond them is the method and the optimiser. Rounds of step and parts alternate, so that a slow minute of the
machine falls on both.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _table import machine, markdown

from segdistill.config import parse, read_yaml
from segdistill.engine.learner import Learner
from segdistill.engine.optim import build_optimizer, student_optimizer
from segdistill.engine.settings import OptimizerConfig
from segdistill.losses import cross_entropy
from segdistill.methods import build_offline, build_online
from segdistill.models.segmenter import build_segmenter
from segdistill.models.teacher import Teacher
from segdistill.stages.distill import ExperimentConfig, parse_methods
from segdistill.stages.train_teacher import Config as TeacherConfig

CLASSES = 11


def seconds(action: Callable[[], object], repeats: int, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    wait()
    return (time.perf_counter() - started) / repeats


def measure(params: dict, name: str, steps: int, size: tuple[int, int], batch: int, device: torch.device) -> list[str]:
    settings = parse(ExperimentConfig, params["experiments"][name], name)
    kind, parsed = parse_methods(name, settings)
    students = {key: build_segmenter(one.model, CLASSES).to(device) for key, one in settings.students.items()}
    config = parse(TeacherConfig, params["train_teacher"], "train_teacher")
    teacher = Teacher(build_segmenter(config.model, CLASSES)).to(device) if kind == "offline" else None
    infos = {key: student.info for key, student in students.items()}
    configs = [item for _, item in parsed]
    if teacher is None:
        methods = build_online(configs, infos)
    else:
        methods = build_offline(configs, infos["cnn"], teacher.info)
    learner = Learner(students, methods, teacher).to(device)
    optimizers = [
        student_optimizer(one.optimizer, students[key], methods.values(), key) for key, one in settings.students.items()
    ]
    for method in methods.values():
        for parameters, own in method.own_optimizers().values():
            optimizers.append(build_optimizer(parse(OptimizerConfig, own, "own"), [(parameters, 1.0)]))
    images = torch.rand(batch, 3, *size, device=device)
    target = torch.randint(0, CLASSES, (batch, *size), device=device)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        learner.total(learner(images, target)).backward()
        for optimizer in optimizers:
            optimizer.step()

    def parts() -> None:
        if teacher is not None:
            teacher(images)
        for student in students.values():
            student.zero_grad(set_to_none=True)
            cross_entropy(student(images).logits, target).backward()

    step(), parts()
    rounds = [(seconds(step, 3, device), seconds(parts, 3, device)) for _ in range(max(1, steps // 3))]
    whole, sum_of_parts = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(one / other for one, other in rounds)
    return [name, f"{1000 * whole:.0f}", f"{1000 * sum_of_parts:.0f}", f"{ratio:.2f}", f"{batch / whole:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--experiments", nargs="+", default=["none", "none_vit", "kd", "apd", "dml"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    device, params = torch.device(given.device), read_yaml(given.params)
    rows = [measure(params, name, given.steps, tuple(given.size), given.batch, device) for name in given.experiments]
    height, width = given.size
    print(f"One training step, batch {given.batch} of {width}x{height}, float32, {device.type}. {machine(['torch'])}\n")
    print(markdown(["experiment", "step, ms", "sum of its parts, ms", "ratio (median of rounds)", "images/s"], rows))


if __name__ == "__main__":
    main()
