"""The comparison itself: rows with mean, spread and interval, from what was measured. No file is read or written here.

Scores are shares (0..1), as everywhere; only what a person reads is in percent. :class:`Comparison` is what
``results.json`` holds: ``config.to_dict`` writes it, ``config.parse`` reads it back.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from segdistill.metrics import iou, paired_difference_of_counts
from segdistill.metrics.confusion import mean_over_present
from segdistill.report.inputs import Measured


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and their sample standard deviation; a single seed has none."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class SeedResult:
    """What one seed gave."""

    seed: int | None
    test_miou: float
    test_pixel_accuracy: float
    val_miou: float
    iterations: int | None
    training_seconds: float | None


@dataclass(frozen=True)
class Gain:
    """Difference in test mIoU to the undistilled student, with its bootstrap interval."""

    reference: str
    mean: float
    low: float
    high: float
    per_seed: tuple[float, ...]
    per_class: dict[str, float | None]

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    @property
    def seeds_agree(self) -> bool:
        """Whether every seed's difference has the sign of their mean."""
        return all(value * self.mean > 0 for value in self.per_seed)

    @property
    def is_disputed(self) -> bool:
        """Whether the interval excludes zero, and the seeds disagree about the sign all the same."""
        return self.excludes_zero and not self.seeds_agree

    @property
    def is_evidence(self) -> bool:
        """Whether other test images and other seeds both tell the same story."""
        return self.excludes_zero and self.seeds_agree


@dataclass(frozen=True)
class Row:
    """One network of the table: the teacher, or one student of one experiment."""

    experiment: str
    student: str
    methods: tuple[str, ...]
    distilled: bool
    seeds: tuple[SeedResult, ...]
    test_miou: Spread
    val_miou: Spread
    test_pixel_accuracy: Spread
    per_class_iou: dict[str, float | None]
    # Further ways to evaluate (flip, multi_scale), where every seed has them.
    views: dict[str, Spread]
    params: int | None
    macs: int | None
    latency_ms: float | None
    images_per_second: float | None
    training_seconds: float | None
    gain: Gain | None


@dataclass(frozen=True)
class Protocol:
    """How the numbers came about."""

    seeds: tuple[int, ...]
    iterations: tuple[int, ...]
    classes: tuple[str, ...]
    splits: dict[str, int]
    input_size: tuple[int, int] | None
    selection: str | None
    confidence: float
    resamples: int
    bootstrap_seed: int
    # The content hash of the prepared data.
    data_content: str


@dataclass(frozen=True)
class Comparison:
    """Everything the table, the report and the registry need."""

    teacher: Row
    rows: tuple[Row, ...]
    # (experiment, student) with the best mean validation score.
    best: tuple[str, str]
    protocol: Protocol
    # What makes a number of this comparison less comparable than it looks.
    warnings: tuple[str, ...]
    # The gate: whether a student is good enough to be registered.
    passed: bool


def find_reference(experiment: str, student: str, run: Sequence[str], experiments: Mapping[str, Any]) -> str | None:
    """The experiment of ``run`` that trained this very student alone and without methods; None if there is none.

    "This very student" has the same name and an equal configuration. An undistilled student has no reference.
    """
    mine = experiments.get(experiment) or {}
    if student not in mine.get("students", {}) or is_undistilled(mine):
        return None
    for name in run:
        other = experiments.get(name) or {}
        if is_undistilled(other) and other["students"] == {student: mine["students"][student]}:
            return name
    return None


def is_undistilled(experiment: Mapping[str, Any]) -> bool:
    """Whether an experiment is one student without any method."""
    return not experiment.get("methods") and len(experiment.get("students", {})) == 1


def compare_runs(
    teacher: Measured,
    measured: Sequence[Measured],
    run: Sequence[str],
    experiments: Mapping[str, Any],
    class_names: Sequence[str],
    settings: Mapping[str, Any],
) -> tuple[Row, list[Row]]:
    """The teacher's row, and one for each student of each experiment, in the order of ``run``.

    Args:
        teacher: the frozen teacher.
        measured: every network of every job.
        run: names of the experiments.
        experiments: their configurations, for the references.
        class_names: the classes of the data set.
        settings: ``resamples``, ``confidence`` and ``seed`` of the bootstrap.
    """
    groups: dict[tuple[str, str], list[Measured]] = {}
    for item in measured:
        groups.setdefault((item.experiment, item.student), []).append(item)
    rows = []
    for (experiment, student), items in groups.items():
        reference = find_reference(experiment, student, run, experiments)
        against = groups.get((reference, student)) if reference else None
        gain = _gain(items, against, class_names, settings) if against else None
        rows.append(_row(items, experiments.get(experiment) or {}, class_names, gain))
    return _row([teacher], {}, class_names, None), rows


def warnings(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before comparing these rows."""
    found = []
    by_name = {(row.experiment, row.student): row for row in rows}
    for row in rows:
        if row.gain is None:
            if row.distilled:
                found.append(
                    f"{row.experiment} ({row.student}) has no undistilled reference in this run: add an experiment "
                    f"with the same student and no methods to say what distillation did."
                )
            continue
        reference = by_name[row.gain.reference, row.student]
        budgets = ([item.iterations for item in row.seeds], [item.iterations for item in reference.seeds])
        if budgets[0] != budgets[1]:
            found.append(
                f"{row.experiment} ({row.student}) trained {budgets[0]} iterations, its reference {budgets[1]}: the "
                f"budgets differ, so the difference is not distillation's alone."
            )
        if row.gain.is_disputed:
            found.append(
                f"{row.experiment} ({row.student}): the interval excludes zero, but the seeds disagree about the sign; "
                f"more seeds are needed."
            )
    return found


def best_row(rows: Sequence[Row]) -> tuple[str, str]:
    """The student with the best mean validation score: what registration would choose without a budget."""
    best = max(rows, key=lambda row: row.val_miou.mean)
    return best.experiment, best.student


def _gain(
    items: Sequence[Measured], against: Sequence[Measured], class_names: Sequence[str], settings: Mapping[str, Any]
) -> Gain:
    system, reference = np.stack([item.counts for item in items]), np.stack([item.counts for item in against])
    found = paired_difference_of_counts(system, reference, **settings)
    per_class = _mean_iou_by_class(items) - _mean_iou_by_class(against)
    return Gain(
        reference=against[0].experiment,
        mean=found.mean,
        low=found.low,
        high=found.high,
        per_seed=found.per_seed,
        per_class=_by_class(class_names, per_class),
    )


def _row(
    items: Sequence[Measured], experiment: Mapping[str, Any], class_names: Sequence[str], gain: Gain | None
) -> Row:
    seeds = tuple(
        SeedResult(
            seed=item.seed,
            test_miou=item.miou,
            test_pixel_accuracy=item.test["test/pixel_accuracy"],
            val_miou=item.validation["val/miou"],
            iterations=item.training.get("iterations"),
            training_seconds=item.training.get("seconds"),
        )
        for item in items
    )
    first = items[0].test
    methods = tuple(str(method.get("name", "?")) for method in experiment.get("methods") or [])
    views = {}
    for view in ("flip", "multi_scale"):
        if all(item.test.get(view) for item in items):
            views[view] = spread([item.test[view]["test/miou"] for item in items])
    # The fastest pass of all seeds: the network is the same, and slower passes tell what else the machine was doing.
    latency = min((known for item in items if (known := item.test.get("latency_ms"))), default=None)
    return Row(
        experiment=items[0].experiment,
        student=items[0].student,
        methods=methods,
        distilled=bool(methods),
        seeds=seeds,
        test_miou=spread([item.test_miou for item in seeds]),
        val_miou=spread([item.val_miou for item in seeds]),
        test_pixel_accuracy=spread([item.test_pixel_accuracy for item in seeds]),
        per_class_iou=_by_class(class_names, _mean_iou_by_class(items)),
        views=views,
        params=first.get("params"),
        macs=first.get("macs"),
        latency_ms=latency,
        images_per_second=1000 / latency if latency else None,
        training_seconds=_mean([item.training_seconds for item in seeds]),
        gain=gain,
    )


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), std)


def _mean_iou_by_class(items: Sequence[Measured]) -> Any:  # [K], nan where no seed has the class
    return mean_over_present(np.stack([iou(item.confusion) for item in items], axis=-1))


def _by_class(class_names: Sequence[str], values: Any) -> dict[str, float | None]:
    pairs = zip(class_names, values.tolist(), strict=True)
    return {name: None if math.isnan(value) else value for name, value in pairs}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
