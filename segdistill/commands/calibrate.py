"""How strong each term of an experiment is, and which weight would make it as strong as one wants.

A short training of the experiment as it stands gives the median of the cross-entropy and of every raw term. A term's
strength is its weighted median over the cross-entropy's; its factor for strength r is r * median(CE) / median(term).
Only the training split is looked at, so that calibrating is not tuning on held-out data.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from segdistill.config import Seed, parse, read_yaml, to_dict
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError, nearest
from segdistill.plan import TEACHER, DistillConfig, ExperimentConfig, parse_methods
from segdistill.stages import BY_NAME

Steps = Annotated[int, Field(ge=1, le=1_000_000)]
Strength = Annotated[float, Field(ge=1e-6, le=1e6)]


@dataclass(frozen=True)
class Calibration:
    """One term of one student."""

    student: str
    term: str
    path: str  # of the weight that scales it, in params.yaml
    weight: float  # its value there, as it is
    raw: float  # median over the steps
    factor: float  # what multiplies the raw term at present, published weight and translation included
    strength: float  # factor * raw / median cross-entropy
    gradient_share: float | None  # median, at the last feature; None where the term does not pass there

    def weight_for(self, strength: float) -> float:
        """The value at :attr:`path` that gives the term this strength."""
        return self.weight * strength / self.strength if self.strength else float("inf")


@dataclass
class _Recorder(Tracker):
    """Keeps what is logged."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float | None:
        return statistics.median(self.values[name]) if name in self.values else None


def run(
    config: DistillConfig,
    *,
    experiment: str,
    settings: ExperimentConfig,
    seed: int,
    steps: int,
    prepared: Path,
    teacher: Path,
    device: str = "auto",
) -> list[Calibration]:
    """Trains for a few hundred steps, with the learning rates of a whole run that short, and reports every term.

    Raises:
        UserError: the experiment has no method, or no teacher was trained yet.
    """
    from segdistill.data.memory import Memory
    from segdistill.data.shards import ShardDataset, read_dataset_info
    from segdistill.engine.building import build_learner
    from segdistill.engine.cohort import Cohort
    from segdistill.engine.distributed import processes as join
    from segdistill.engine.progress import TrainingBar
    from segdistill.engine.supervision import class_weights
    from segdistill.engine.trainer import Diverged, Training
    from segdistill.models.export import load_model
    from segdistill.models.teacher import Teacher
    from segdistill.stages._training import unlabelled_set

    if not settings.methods:
        raise UserError(f"experiments.{experiment}.methods: empty; there is nothing to calibrate")
    train = replace(
        config.train, iterations=steps, seconds=None, log_every=1, gradient_share_every=5, compile=False,
        validate_every=steps + 1, checkpoint_every=steps + 1, select="last",
    )  # fmt: skip
    recorders = {name: _Recorder() for name in settings.students}
    with join(device) as processes, tempfile.TemporaryDirectory() as work:
        info, frozen = read_dataset_info(prepared), None
        kind, methods = parse_methods(experiment, settings)
        if kind == "offline":
            frozen = Teacher(load_model(teacher, TEACHER, classes=[item.name for item in info.classes])[0]).to(
                processes.device
            )
        learner = build_learner(
            {name: student.model for name, student in settings.students.items()}, [method for _, method in methods],
            seed=seed, num_classes=info.num_classes, images=info.images, teacher=frozen.info if frozen else None,
            supervised=settings.supervised, auxiliary=settings.auxiliary, pseudo_labels=settings.pseudo_labels,
            loss=train.loss, class_weights=class_weights(train.loss, prepared, "distill.train.loss"),
        )  # fmt: skip
        optimizers = {name: student.optimizer for name, student in settings.students.items()}
        memory = Memory(train.cache_gib)
        train_set = ShardDataset(prepared, "train", memory)
        training = Training(experiment, learner, optimizers, "calibration", Path(work), recorders)
        with TrainingBar("calibration", [[experiment]], [1], enabled=processes.is_main) as bar:
            cohort = Cohort(
                [training], train_set, None, train, inference=config.inference, seed=seed, teacher=frozen,
                processes=processes, unlabelled_set=unlabelled_set(prepared, train.unlabelled, memory),
                advanced=bar.update,
            )  # fmt: skip
            outcome = cohort.run()[experiment]
        if isinstance(outcome, Diverged):
            raise outcome
    calibrations = []
    for name, recorder in recorders.items():
        cross_entropy = recorder.median("train/loss/ce") or float("nan")
        for index, (label, method) in enumerate(learner.methods.items()):
            for term, factor in method.weights.items():
                raw = recorder.median(f"train/loss/{label}.{term}")
                if raw is None:
                    continue
                key = f"{term}_weight" if hasattr(method.config, f"{term}_weight") else "weight"
                own = getattr(method.config, key)  # None where the published value depends on another setting
                calibrations.append(
                    Calibration(
                        student=name,
                        term=f"{label}.{term}",
                        path=f"experiments.{experiment}.methods.{index}.{key}",
                        weight=factor if own is None else own,
                        raw=raw,
                        factor=factor,
                        strength=factor * raw / cross_entropy,
                        gradient_share=recorder.median(f"train/gradient_share/{label}.{term}"),
                    )
                )
    return calibrations


def table(calibrations: Sequence[Calibration], steps: int, strengths: Sequence[float]) -> Table:
    """The terms, how strong they are, and the weights for other strengths."""
    terms = Table(
        title=f"Medians over {steps} steps; strength is the weighted term over the cross-entropy",
        title_justify="left",
    )
    terms.add_column("student", no_wrap=True)
    terms.add_column("term", no_wrap=True)
    for column in ("raw", "factor", "strength", "gradient", "weight"):
        terms.add_column(column, justify="right")
    for strength in strengths:
        terms.add_column(f"for {strength:g}", justify="right")
    for row in calibrations:
        share = "–" if row.gradient_share is None else f"{100 * row.gradient_share:.0f} %"
        terms.add_row(
            row.student, row.term, f"{row.raw:.3g}", f"{row.factor:.3g}", f"{row.strength:.2g}", share,
            f"{row.weight:.3g}", *(f"{row.weight_for(strength):.3g}" for strength in strengths),
        )  # fmt: skip
    return terms


def paths(calibrations: Sequence[Calibration]) -> list[str]:
    """Where the weights stand in params.yaml, one line each."""
    return sorted({f"{row.term}: {row.path}" for row in calibrations})


def as_json(calibrations: Sequence[Calibration], strengths: Sequence[float]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [to_dict(row) | {"weights": {f"{r:g}": row.weight_for(r) for r in strengths}} for row in calibrations]


def command(arguments: argparse.Namespace) -> None:
    """Calibrates one experiment of params.yaml and prints what came of it."""
    from segdistill import execution

    params, name = read_yaml(arguments.params), arguments.experiment
    execution.check_params(params, networks="named", here=True)
    if name not in params["experiments"]:
        raise UserError(f"--experiment: '{name}' is unknown{nearest(name, params['experiments'])}")
    seed = parse(Seed, arguments.seed, "--seed")
    steps = parse(Steps, arguments.steps, "--steps")
    strengths = parse(list[Strength], arguments.strengths, "--strengths")
    inputs = {key: Path(BY_NAME["distill"].inputs[key]) for key in ("prepared", "teacher")}
    for path in inputs.values():
        if not path.exists():
            raise UserError(f"{path}: calibrate needs it; run what makes it first: dvc repro")
    calibrations = run(
        parse(DistillConfig, params["distill"], "distill"), experiment=name, seed=seed, steps=steps,
        settings=parse(ExperimentConfig, params["experiments"][name], f"experiments.{name}"),
        prepared=inputs["prepared"], teacher=inputs["teacher"], device=arguments.device,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(as_json(calibrations, strengths), indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(calibrations, steps, strengths))
    for line in paths(calibrations):
        console.print(line, soft_wrap=True)
