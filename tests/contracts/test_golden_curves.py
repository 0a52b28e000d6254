"""Golden loss curves: 20 CPU steps of the teacher and of every experiment in params.yaml, against recorded ones.

A change that is not meant to change numbers leaves golden_curves.json as it is. One that is meant to says so in
CHANGELOG.md, with before and after, and records anew: ``python tests/contracts/test_golden_curves.py``.

Settings are those of params.yaml but for the size, and without resizing and colour jitter: with them, the first
step already differs by up to 3e-2 (apd) where torch uses other instructions, without them by 5e-6. The augmented
batches are recorded by their means instead (9e-4 seen, 5e-3 allowed). The teacher of offline methods
is its network as seed 0 draws it.

Tolerances. Largest relative deviations of any term with ATEN_CPU_CAPABILITY=default from AVX512, one thread each:

* none_vit, c2vkd_ce: 8e-6 at every step, so 1e-4 is allowed.
* all others: 2e-6 at steps 1 and 2 (1e-4 allowed), 4e-4 at step 3 (4e-3), 2e-3 at step 4 (8e-3); it grows to 1e-1 by
  step 8 and 3e-1 (hfd_bsd) by step 19: 1.0 is allowed, which NaN and divergence leave.
* Validation mIoU: 0.013; 0.05 is allowed.

On the machine that recorded, runs repeat to the last recorded digit: EXACT_GOLDEN_CURVES=1 allows 1e-5 at all
steps, the rounding of the file, and leaves the mIoU its 0.05. Use it for refactoring:
record on the commit before, in a scratch copy, if the machine is another.
"""

import copy
import json
import os
import sys
from collections import defaultdict
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from segdistill.config import parse
from segdistill.data.loader import Share, training_batches
from segdistill.data.settings import AugmentationConfig
from segdistill.data.shards import ShardDataset, read_dataset_info
from segdistill.engine.building import build_learner
from segdistill.engine.cohort import Cohort
from segdistill.engine.distributed import Processes
from segdistill.engine.tracker import Tracker
from segdistill.engine.trainer import Training
from segdistill.models.export import load_model, save_model
from segdistill.models.teacher import Teacher
from segdistill.plan import TEACHER, DistillConfig, ExperimentConfig, TeacherConfig, parse_methods

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden_curves.json"
PARAMS = yaml.safe_load((HERE.parents[1] / "params.yaml").read_text())
STEPS = 20

EXPERIMENTS = [TEACHER, *PARAMS["experiments"]]
EXACT = {"crop_size": [48, 64], "scale": [1.0, 1.0], "color_jitter": 0.0}
MIOU = "val/miou"
MIOU_TOLERANCE = 0.05
CALM = ("none_vit", "c2vkd_ce")  # experiments in which rounding does not grow
BATCHES = "batches"
RECORDING, EXACTLY = "RECORD_GOLDEN_CURVES", "EXACT_GOLDEN_CURVES"

Curves = dict[str, dict[str, list[float]]]


class RecordingTracker(Tracker):
    """Keeps each raw term, their weighted sum and the validation mIoU, in the order of the steps."""

    def __init__(self) -> None:
        self.curves: dict[str, list[float]] = defaultdict(list)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        for name, value in values.items():
            if name.startswith("train/loss/") or name == MIOU:
                self.curves[name.removeprefix("train/loss/")].append(value)


def train(section: Mapping[str, Any], experiment: str, prepared: Path, work: Path) -> Curves:
    """The curves of one training: {student: {term: values by step}}. What follows the engine's interface is here.

    Args:
        section: ``train_teacher`` of params.yaml for the teacher, ``distill`` for an experiment.
        experiment: its name, or "teacher".
        prepared: the data set.
        work: an empty folder.
    """
    smaller = {
        "iterations": STEPS, "batch_size": 4, "log_every": 1, "validate_every": STEPS, "checkpoint_every": STEPS,
        "augmentation": section["train"]["augmentation"] | EXACT,
    }  # fmt: skip
    section = dict(section) | {"train": section["train"] | smaller}
    info, alone = read_dataset_info(prepared), Processes(0, 1, torch.device("cpu"))
    teacher_config = parse(TeacherConfig, PARAMS["train_teacher"], "train_teacher")
    learner = build_learner({TEACHER: teacher_config.model}, seed=0, num_classes=info.num_classes)
    teacher = None
    if experiment == TEACHER:
        config: Any = parse(TeacherConfig, section, "train_teacher")
        optimizers = {TEACHER: config.optimizer}
    else:
        config = parse(DistillConfig, section, "distill")
        settings = parse(ExperimentConfig, PARAMS["experiments"][experiment], f"experiments.{experiment}")
        kind, methods = parse_methods(experiment, settings)
        if kind == "offline":
            save_model(work / TEACHER, TEACHER, learner.students[TEACHER], {})
            teacher = Teacher(load_model(work / TEACHER, TEACHER)[0])
        learner = build_learner(
            {name: student.model for name, student in settings.students.items()}, [method for _, method in methods],
            seed=0, num_classes=info.num_classes, teacher=teacher.info if teacher else None,
            supervised=settings.supervised, auxiliary=settings.auxiliary,
        )  # fmt: skip
        optimizers = {name: student.optimizer for name, student in settings.students.items()}
    trackers = {name: RecordingTracker() for name in optimizers}
    Cohort(
        [Training(experiment, learner, optimizers, "golden", work, trackers)],
        ShardDataset(prepared, "train"), ShardDataset(prepared, "val"), config.train,
        inference=config.inference, seed=0, teacher=teacher, processes=alone,
    ).run()  # fmt: skip
    return {name: dict(tracker.curves) for name, tracker in trackers.items()}


def batches(section: Mapping[str, Any], prepared: Path) -> Curves:
    """Mean image value and mean label of the first batches, augmented as params.yaml says."""
    augmentation = parse(AugmentationConfig, section["train"]["augmentation"], "augmentation")
    endless = training_batches(
        ShardDataset(prepared, "train"), augmentation, seed=0, share=Share(4), first_iteration=0, workers=0
    )
    means = [
        (images.double().mean().item(), labels.double().mean().item()) for images, labels in islice(endless, STEPS)
    ]
    return {BATCHES: {"images": [image for image, _ in means], "labels": [label for _, label in means]}}


def tolerance(experiment: str, step: int) -> float:
    """The largest relative deviation at a step, counted from 1."""
    if EXACTLY in os.environ:
        return 1e-5  # the file has six digits
    if experiment == BATCHES:
        return 5e-3
    if experiment in CALM:
        return 1e-4
    early = (1e-4, 1e-4, 4e-3, 8e-3)
    return early[step - 1] if step <= len(early) else 1.0


def deviations(experiment: str, golden: Curves, found: Curves) -> list[str]:
    """A line for each curve that leaves the recorded one: where first, and how far."""
    assert {name: set(curves) for name, curves in found.items()} == {name: set(golden[name]) for name in golden}
    lines = []
    for student, curves in golden.items():
        for term, expected in curves.items():
            values = found[student][term]
            assert len(values) == len(expected), f"{student}/{term}: {len(values)} values, {len(expected)} recorded"
            if term == MIOU:
                if not abs(values[-1] - expected[-1]) <= MIOU_TOLERANCE:
                    lines.append(f"{student}/{term}: {values[-1]:.6g}, recorded {expected[-1]:.6g}")
                continue
            for step, (value, record) in enumerate(zip(values, expected, strict=True), start=1):
                if not abs(value - record) <= tolerance(experiment, step) * abs(record):  # NaN too
                    lines.append(
                        f"{student}/{term}, step {step}: {value:.6g}, recorded {record:.6g}, apart by "
                        f"{abs(value / record - 1):.1e}, allowed {tolerance(experiment, step):.1e}"
                    )
                    break
    return lines


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_training_gives_the_recorded_losses_step_by_step(
    experiment: str, tiny_prepared: Path, tmp_path: Path
) -> None:
    section = PARAMS["train_teacher" if experiment == TEACHER else "distill"]
    found = train(section, experiment, tiny_prepared, tmp_path)
    compare(experiment, found)


def test_augmented_batches_have_the_recorded_brightness_and_labels(tiny_prepared: Path) -> None:
    compare(BATCHES, batches(PARAMS["train_teacher"], tiny_prepared))


def compare(experiment: str, found: Curves) -> None:
    if RECORDING in os.environ:
        write(recorded() | {experiment: found})
    assert not deviations(experiment, recorded()[experiment], found)


def test_every_experiment_of_the_settings_is_recorded_and_no_other() -> None:
    assert set(recorded()) == {BATCHES, *EXPERIMENTS}


def test_a_term_that_is_one_percent_larger_is_seen_before_rounding_has_grown() -> None:
    for experiment, golden in recorded().items():
        for student, curves in golden.items():
            for term in curves.keys() - {MIOU}:
                for step in range(STEPS if experiment in CALM else 4):
                    if not golden[student][term][step]:
                        continue  # nothing was selected, say: no part of nothing can be seen
                    changed = copy.deepcopy(golden)
                    changed[student][term][step] *= 1.01
                    assert deviations(experiment, golden, changed), f"{experiment}: {student}/{term} at step {step + 1}"


def recorded() -> dict[str, Curves]:
    """By experiment."""
    found: dict[str, Curves] = {}
    for experiment, lines in json.loads(GOLDEN.read_text()).items():
        found[experiment] = defaultdict(dict)
        for key, values in lines.items():
            student, _, term = key.partition("/")
            found[experiment][student][term] = values
    return found


def write(curves: Mapping[str, Curves]) -> None:
    """The file, a line a curve, six significant digits a value."""
    experiments = []
    for experiment, students in curves.items():
        lines = [
            f'  "{student}/{term}": [{", ".join(f"{value:.6g}" for value in values)}]'
            for student, terms in students.items()
            for term, values in terms.items()
        ]
        experiments.append(f'"{experiment}": {{\n' + ",\n".join(lines) + "\n}")
    GOLDEN.write_text("{\n" + ",\n".join(experiments) + "\n}\n")


if __name__ == "__main__":
    GOLDEN.write_text("{}")
    os.environ[RECORDING] = "1"
    sys.exit(pytest.main([__file__, "-n", "0"]))
