"""The comparison itself: rows with mean, spread and interval, from what was measured.

Scores are shares (0..1), as everywhere; only what a person reads is in percent. :class:`Comparison` is what
``results.json`` holds: ``config.to_dict`` makes it, :func:`read_results` reads it back.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from segdistill.config import parse
from segdistill.errors import UserError
from segdistill.files import read_sealed_json
from segdistill.metrics import Difference, iou, paired_difference_of_counts
from segdistill.metrics.confusion import mean_over_present
from segdistill.report.inputs import Diverged, Measured

RESULTS = "results.json"
AGAIN = "run the stage 'compare' again"


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and their sample standard deviation; a single seed has none."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Of at least one value; None without."""
        if not values:
            return None
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


@dataclass(frozen=True)
class SeedResult:
    """What one seed gave."""

    seed: int | None
    test_miou: float
    test_pixel_accuracy: float
    val_miou: float
    iterations: int | None
    training_seconds: float | None
    # Provenance: of the training, of the code that it used, and of its result.
    identity: str | None
    code: str | None
    weights_sha256: str


@dataclass(frozen=True)
class Gain(Difference):
    """Difference in test mIoU to the undistilled student, with its bootstrap interval."""

    seeds: tuple[int | None, ...]  # those that both have
    per_class: dict[str, float | None]

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
    # The experiment that trained the same student undistilled; None where this run has none.
    reference: str | None
    seeds: tuple[SeedResult, ...]
    diverged: tuple[Diverged, ...]
    # None, as all scores, where every seed diverged.
    test_miou: Spread | None
    val_miou: Spread | None
    test_pixel_accuracy: Spread | None
    per_class_iou: dict[str, float | None]
    # Further ways to evaluate (flip, multi_scale), where every seed has them.
    views: dict[str, Spread]
    params: int | None
    macs: int | None
    latency_ms: float | None
    images_per_second: float | None
    training_seconds: float | None
    gain: Gain | None

    @property
    def divergence(self) -> str:
        """Which seeds diverged, where and why; empty if none did."""
        causes = {f"at iteration {job.iteration}: {job.reason}" for job in self.diverged}
        each = "; ".join(f"seed {job.seed} at iteration {job.iteration}: {job.reason}" for job in self.diverged)
        if not self.diverged:
            return ""
        if self.seeds:
            number = len(self.diverged)
            return f"{number} of {number + len(self.seeds)} seeds diverged ({each})"
        return f"diverged {causes.pop()}" if len(causes) == 1 else f"every seed diverged ({each})"


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
    # Of the teacher's weights.
    teacher_sha256: str


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

    @property
    def scored(self) -> tuple[Row, ...]:
        """The teacher and the rows of which not every seed diverged."""
        return (self.teacher, *(row for row in self.rows if row.seeds))


def read_results(folder: Path) -> Comparison:
    """What the stage ``compare`` found.

    Raises:
        UserError: its folder has no results, or damaged or incomplete ones.
    """
    results = read_sealed_json(folder, RESULTS, mend=AGAIN)
    try:
        return parse(Comparison, results, str(folder / RESULTS))
    except UserError as error:
        raise UserError(f"{error}; {AGAIN}") from None


def find_reference(experiment: str, student: str, run: Sequence[str], experiments: Mapping[str, Any]) -> str | None:
    """The experiment of ``run`` that trained this very student alone and without methods; None if there is none.

    "This very student" has the same name and an equal configuration. An undistilled student has no reference.
    """
    settings = experiments.get(experiment) or {}
    if student not in settings.get("students", {}) or not settings.get("methods"):
        return None
    alone = {student: settings["students"][student]}
    for name in run:
        candidate = experiments.get(name) or {}
        if not candidate.get("methods") and candidate.get("students") == alone:
            return name
    return None


def compare_runs(
    teacher: Measured,
    measured: Sequence[Measured],
    diverged: Sequence[Diverged],
    run: Sequence[str],
    experiments: Mapping[str, Any],
    class_names: Sequence[str],
    bootstrap: Mapping[str, Any],
) -> tuple[Row, list[Row]]:
    """The teacher's row, and one for each student of each experiment, in the order of ``run``.

    Args:
        teacher: the frozen teacher.
        measured: every network of every job that has some.
        diverged: the other jobs.
        run: names of the experiments.
        experiments: their configurations, for the references.
        class_names: the classes of the data set.
        bootstrap: its ``resamples``, ``confidence`` and ``seed``.
    """
    networks: dict[tuple[str, str], list[Measured]] = {}
    for network in measured:
        networks.setdefault((network.experiment, network.student), []).append(network)
    rows = []
    for experiment in run:
        for student in experiments[experiment]["students"]:
            seeds = networks.get((experiment, student), [])
            reference = find_reference(experiment, student, run, experiments)
            gain = _gain(seeds, networks.get((str(reference), student), []), class_names, bootstrap)
            row = _row(experiment, student, seeds, experiments[experiment].get("methods") or [], class_names)
            failures = tuple(job for job in diverged if job.experiment == experiment)
            rows.append(replace(row, reference=reference, diverged=failures, gain=gain))
    return _row(teacher.experiment, teacher.student, [teacher], [], class_names), rows


def warnings(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before comparing these rows."""
    sentences = []
    by_name = {(row.experiment, row.student): row for row in rows}
    for row in rows:
        name = f"{row.experiment} ({row.student})"
        if row.diverged:
            rest = "; its numbers are of the others" if row.seeds else ""
            sentences.append(f"{name}: {row.divergence}{rest}.")
        if not row.seeds:
            continue
        if row.distilled and row.reference is None:
            sentences.append(
                f"{name} has no undistilled reference in this run: add an experiment with the same student and no "
                f"methods to say what distillation did."
            )
        if row.reference is None:
            continue
        reference = by_name[row.reference, row.student]
        if row.gain is None:
            why = "have no seed in common" if reference.seeds else "have nothing to compare: the reference diverged"
            sentences.append(f"{name} and its undistilled reference, {row.reference}, {why}.")
            continue
        if len(row.gain.seeds) < max(len(row.seeds), len(reference.seeds)):
            common = ", ".join(str(seed) for seed in row.gain.seeds)
            sentences.append(f"{name} is compared with {row.reference} on the seeds that both have: {common}.")
        budgets = [[seed.iterations for seed in one.seeds if seed.seed in row.gain.seeds] for one in (row, reference)]
        if budgets[0] != budgets[1]:
            sentences.append(
                f"{name} trained {budgets[0]} iterations, its reference {budgets[1]}: the budgets differ, so the "
                f"difference is not distillation's alone."
            )
        if row.gain.is_disputed:
            sentences.append(
                f"{name}: the interval excludes zero, but the seeds disagree about the sign; more seeds are needed."
            )
    return sentences


def best_row(rows: Sequence[Row]) -> tuple[str, str]:
    """The student with the best mean validation score: what registration would choose without a budget."""
    scores = {(row.experiment, row.student): row.val_miou.mean for row in rows if row.val_miou}
    return max(scores, key=scores.__getitem__)


def _gain(
    networks: Sequence[Measured],
    references: Sequence[Measured],
    class_names: Sequence[str],
    bootstrap: Mapping[str, Any],
) -> Gain | None:
    """Of the seeds that both have; None if there is none."""
    by_seed = {reference.seed: reference for reference in references}
    systems = [network for network in networks if network.seed in by_seed]
    if not systems:
        return None
    references = [by_seed[network.seed] for network in systems]
    counts = [np.stack([network.counts for network in side]) for side in (systems, references)]
    difference = paired_difference_of_counts(*counts, **bootstrap)
    per_class = _by_class(class_names, _mean_iou_by_class(systems) - _mean_iou_by_class(references))
    return Gain(**vars(difference), seeds=tuple(network.seed for network in systems), per_class=per_class)


def _row(
    experiment: str,
    student: str,
    networks: Sequence[Measured],
    methods: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
) -> Row:
    """What one student's networks, one a seed, did by themselves; without any, a row without scores."""
    seeds = tuple(
        SeedResult(
            seed=network.seed,
            test_miou=network.miou,
            test_pixel_accuracy=network.test["test/pixel_accuracy"],
            val_miou=network.validation["val/miou"],
            iterations=network.training.get("iterations"),
            training_seconds=network.training.get("seconds"),
            identity=network.training.get("identity"),
            code=network.training.get("code"),
            weights_sha256=network.test["weights_sha256"],
        )
        for network in networks
    )
    views = {}
    for view in ("flip", "multi_scale"):
        scores = [network.test[view]["test/miou"] for network in networks if network.test.get(view)]
        if len(scores) == len(seeds) and (spread := Spread.of(scores)):
            views[view] = spread
    # The fastest pass of all seeds: the network is the same, and slower passes tell what else the machine was doing.
    latencies = [network.test["latency_ms"] for network in networks if network.test.get("latency_ms")]
    latency = min(latencies, default=None)
    durations = [seed.training_seconds for seed in seeds if seed.training_seconds is not None]
    first = networks[0].test if networks else {}
    return Row(
        experiment=experiment,
        student=student,
        methods=tuple(str(method.get("name", "?")) for method in methods),
        distilled=bool(methods),
        reference=None,
        seeds=seeds,
        diverged=(),
        test_miou=Spread.of([seed.test_miou for seed in seeds]),
        val_miou=Spread.of([seed.val_miou for seed in seeds]),
        test_pixel_accuracy=Spread.of([seed.test_pixel_accuracy for seed in seeds]),
        per_class_iou=_by_class(class_names, _mean_iou_by_class(networks)) if seeds else {},
        views=views,
        params=first.get("params"),
        macs=first.get("macs"),
        latency_ms=latency,
        images_per_second=1000 / latency if latency else None,
        training_seconds=float(np.mean(durations)) if durations else None,
        gain=None,
    )


def _mean_iou_by_class(networks: Sequence[Measured]) -> Any:  # [K], nan where no seed has the class
    return mean_over_present(np.stack([iou(network.confusion) for network in networks], axis=-1))


def _by_class(class_names: Sequence[str], values: Any) -> dict[str, float | None]:
    pairs = zip(class_names, values.tolist(), strict=True)
    return {name: None if math.isnan(value) else value for name, value in pairs}
