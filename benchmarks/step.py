"""A training step with a frozen teacher, against the sum of its parts in the same run. Prints Markdown.

    python benchmarks/step.py [--experiments none kd apd dml] [--steps 20] [--device auto]
    python benchmarks/step.py --methods [kd apd ...]

The first form takes experiments as params.yaml has them (by default those that it runs); the second puts each method,
in its default config, between the networks of params.yaml: an offline one between the teacher and the CNN student
(``c2vkd``: the ViT student), an online one between the two students.

On a GPU, every method between networks of the size that papers use, in some minutes and without a network:

    python benchmarks/step.py --methods --params benchmarks/full_size.yaml --size 512 1024 --classes 19 \
        --precision bf16 --channels-last --steps 12

The parts are the teacher's forward pass, and each student's forward and backward pass with its cross-entropy, in the
same precision. What a step costs beyond them is the method and the optimiser. Rounds of step and parts alternate, so
that a slow minute of the machine falls on both.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The compiler's own processes would start while the first methods are timed.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from _cost import peak_bytes, seconds
from _table import machine, markdown

from segdistill.config import parse, read_yaml
from segdistill.engine.learner import Learner
from segdistill.engine.optim import build_optimizer, student_optimizer
from segdistill.engine.settings import OptimizerConfig
from segdistill.losses.masks import IGNORE_INDEX
from segdistill.losses.supervised import cross_entropy
from segdistill.methods import METHODS, build_offline, build_online, load
from segdistill.models.config import ModelConfig
from segdistill.models.segmenter import build_segmenter
from segdistill.models.teacher import Teacher
from segdistill.plan import ExperimentConfig, parse_methods

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
    params: Mapping[str, Any], name: str, settings: ExperimentConfig, classes: int
) -> tuple[Learner, Teacher | None]:
    """The experiment's learner, as stage ``distill`` makes it, and its teacher."""
    kind, parsed = parse_methods(name, settings)
    students = {key: build_segmenter(one.model, classes) for key, one in settings.students.items()}
    model: ModelConfig = parse(ModelConfig, params["train_teacher"]["model"], "train_teacher.model")
    teacher = Teacher(build_segmenter(model, classes)) if kind == "offline" else None
    infos = {key: student.info for key, student in students.items()}
    configs = [item for _, item in parsed]
    if teacher is None:
        methods = build_online(configs, infos)
    else:
        methods = build_offline(configs, infos[next(iter(infos))], teacher.info)
    return Learner(students, methods, supervised=settings.supervised, auxiliary=settings.auxiliary), teacher


def optimizers_of(learner: Learner, settings: ExperimentConfig) -> list[torch.optim.Optimizer]:
    """As the trainer makes them."""
    students, methods = learner.students, learner.methods
    optimizers = [
        student_optimizer(one.optimizer, students[key], methods.values(), key) for key, one in settings.students.items()
    ]
    for method in methods.values():
        for parameters, own in method.own_optimizers().values():
            optimizers.append(build_optimizer(parse(OptimizerConfig, own, "own"), [(parameters, 1.0)]))
    return optimizers


def blocks(batch: int, size: Sequence[int], classes: int, device: torch.device) -> torch.Tensor:
    """Labels in blocks of 32 pixels, one in twenty without a label: [B, H, W]."""
    generator = torch.Generator().manual_seed(0)
    cells = [-(-side // 32) for side in size]
    coarse = torch.randint(0, classes, (batch, *cells), generator=generator)
    coarse[torch.rand(coarse.shape, generator=generator) < 0.05] = IGNORE_INDEX
    return coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, : size[0], : size[1]].contiguous().to(device)


def measure(
    params: Mapping[str, Any], name: str, experiment: Mapping[str, Any], *, steps: int, size: Sequence[int],
    batch: int, precision: str, device: torch.device, classes: int, channels_last: bool,
) -> list[str]:  # fmt: skip
    """One row of the table."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    settings = parse(ExperimentConfig, experiment, f"experiments.{name}")
    learner, teacher = build(params, name, settings, classes)
    learner.to(device, memory_format=layout)
    if teacher is not None:
        teacher.to(device, memory_format=layout)
    optimizers = optimizers_of(learner, settings)
    images = torch.rand(batch, 3, *size, device=device).contiguous(memory_format=layout)
    target = blocks(batch, size, classes, device)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        with autocast():
            terms = learner(images, target, None, teacher(images) if teacher is not None else None)
        learner.total(terms).backward()
        for optimizer in optimizers:
            optimizer.step()

    def parts() -> None:
        if teacher is not None:
            with autocast():
                teacher(images)
        for student in learner.students.values():
            student.zero_grad(set_to_none=True)
            with autocast():
                loss = cross_entropy(student(images).logits, target)
            loss.backward()

    step(), parts()
    rounds = [(seconds(step, device, 3), seconds(parts, device, 3)) for _ in range(max(1, steps // 3))]
    whole, sum_of_parts = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(one / other for one, other in rounds)
    row = [name, f"{1000 * whole:.1f}", f"{1000 * sum_of_parts:.1f}", f"{ratio:.2f}", f"{batch / whole:.1f}"]
    if device.type == "cuda":
        row += [f"{peak_bytes(action, device) / 2**30:.1f}" for action in (step, parts)]
    print(*row, file=sys.stderr, flush=True)
    return row


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
    parser.add_argument("--classes", type=int, default=11)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    device, params = torch.device(given.device), read_yaml(given.params)
    if given.methods is None:
        experiments = {name: params["experiments"][name] for name in given.experiments or params["run"]}
    else:
        experiments = of_methods(params, given.methods or list(METHODS))
    rows = [
        measure(params, name, experiment, steps=given.steps, size=given.size, batch=given.batch,
                precision=given.precision, device=device, classes=given.classes, channels_last=given.channels_last)
        for name, experiment in experiments.items()
    ]  # fmt: skip
    height, width = given.size
    layout = ", channels_last" if given.channels_last else ""
    print(
        f"One training step, batch {given.batch} of {width}x{height}, {given.precision}{layout}, "
        f"{given.classes} classes, {device.type}. "
        f"{machine(['torch'])}\n"
    )
    first = "experiment" if given.methods is None else "method"
    header = [first, "step, ms", "sum of its parts, ms", "ratio (median of rounds)", "images/s"]
    print(markdown(header + ["GiB", "of its parts"][: len(rows[0]) - len(header)], rows))


if __name__ == "__main__":
    main()
