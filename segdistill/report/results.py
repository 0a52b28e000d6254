"""The comparison itself: rows with mean, spread and interval, from what was measured.

Scores are shares (0..1), as everywhere; only what a person reads is in percent. :class:`Comparison` is what
``results.json`` holds: ``config.to_dict`` makes it, :func:`read_results` reads it back.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from segdistill.config import parse
from segdistill.engine.settings import InferenceConfig
from segdistill.errors import UserError
from segdistill.files import read_sealed_json
from segdistill.metrics.confusion import iou, mean_over_present
from segdistill.report.inputs import Diverged, Measured
from segdistill.report.intervals import Difference, Estimate, block_starts, differences, estimate
from segdistill.report.mistakes import Confusion, HardImage

RESULTS = "results.json"
AGAIN = "run the stage 'compare' again"
ENOUGH = 0.95  # share of a row's training time that is as long: clocks are not exact


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
    ece: float | None = None
    cpu_seconds: float | None = None  # of all threads while it trained


@dataclass(frozen=True)
class Gain(Difference):
    """Difference in test mIoU to the undistilled student, with its interval."""

    per_class: dict[str, float | None]


@dataclass(frozen=True)
class Row:
    """One network of the table: the teacher, or one student of one experiment."""

    experiment: str
    student: str
    methods: tuple[str, ...]
    distilled: bool
    # The experiment that trained the same network undistilled on the same budget; None where this run has none.
    reference: str | None
    # The one that trained it undistilled for as long.
    equal_time_reference: str | None
    seeds: tuple[SeedResult, ...]
    diverged: tuple[Diverged, ...]
    # None, as all scores, where every seed diverged.
    test_miou: Spread | None
    val_miou: Spread | None
    test_pixel_accuracy: Spread | None
    per_class_iou: dict[str, float | None]
    # Further ways to evaluate (flip, multi_scale, boundary), where every seed has them.
    views: dict[str, Spread]
    params: int | None
    macs: int | None
    latency_ms: float | None
    images_per_second: float | None
    training_seconds: float | None  # mean over seeds
    step_seconds: float | None  # of training, by iteration
    gain: Gain | None
    equal_time_gain: Difference | None
    cpu_seconds: float | None = None  # mean over seeds; None where one has none
    ece: Spread | None = None  # expected calibration error on test
    latency_median_ms: float | None = None
    # On the second test set, where there is one, by which nothing is chosen.
    out_of_domain: Estimate | None = None
    out_of_domain_gain: Difference | None = None

    @property
    def busy_seconds(self) -> float | None:
        """What training took whatever else the machine did: CPU seconds, or the GPU's own where it trained on one."""
        return self.training_seconds if self.cpu_seconds is None else self.cpu_seconds

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
class OutOfDomainSet:
    """The second test set: the hash of its files and of what its classes stand for, and those of ours that it has."""

    content: str
    samples: int
    classes: tuple[str, ...]


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
    block: int
    # The content hash of the prepared data.
    data_content: str
    # Of the teacher's weights.
    teacher_sha256: str
    # What it is, in words; None where its evaluation does not say.
    teacher_network: str | None = None
    # Of an imported teacher's weights, in its folder's words; None where it does not say.
    teacher_licence: str | None = None
    # How an image of the test split was shown to every network.
    inference: InferenceConfig | None = None
    # What ``busy_seconds`` are of: "CPU", "GPU", or "wall" where a training does not say.
    clock: str = "wall"
    # Where this comparison was made: the data's version and the code's commit, where they are known.
    data_md5: str | None = None
    git_commit: str | None = None
    # Blocks of the test split, of which none is of two sequences; None: it was compared when sequences did not count.
    blocks: int | None = None
    out_of_domain: OutOfDomainSet | None = None


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
    # Of the best student: the classes that it most often takes for others, and the images on which it is worst.
    confused: tuple[Confusion, ...] = ()
    hardest: tuple[HardImage, ...] = ()

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


def find_twins(experiment: str, student: str, run: Sequence[str], experiments: Mapping[str, Any]) -> list[str]:
    """The experiments of ``run`` that trained this very network alone and without methods, whatever their budget.

    "This very network" has the same name and model. Where experiments are tuned each has an optimiser of its own, so
    that may differ; twins with the same one come first. An undistilled student has no twins.
    """
    settings = experiments.get(experiment) or {}
    if student not in settings.get("students", {}) or not settings.get("methods"):
        return []

    def network(config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != "optimizer"}

    config = settings["students"][student]
    twins = []
    for name in run:
        other = experiments.get(name) or {}
        is_alone = not other.get("methods") and list(other.get("students", {})) == [student]
        if is_alone and network(other["students"][student]) == network(config):
            twins.append(name)
    return sorted(twins, key=lambda name: experiments[name]["students"][student] != config)


def find_reference(experiment: str, student: str, run: Sequence[str], experiments: Mapping[str, Any]) -> str | None:
    """The first of :func:`find_twins` with the same budget; None if there is none."""
    twins = find_twins(experiment, student, run, experiments)
    return next((name for name in twins if _budget(experiments[name]) == _budget(experiments[experiment])), None)


def _budget(settings: Mapping[str, Any]) -> float:
    return float(settings.get("budget", 1.0))


def compare_runs(
    teacher: Measured,
    measured: Sequence[Measured],
    diverged: Sequence[Diverged],
    run: Sequence[str],
    experiments: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    confidence: float,
    block: int,
    sequences: Sequence[str | None] = (),
) -> tuple[Row, list[Row]]:
    """The teacher's row, and one for each student of each experiment, in the order of ``run``.

    Args:
        teacher: the frozen teacher.
        measured: every network of every job that has some.
        diverged: the other jobs.
        run: names of the experiments.
        experiments: their configurations, for the references.
        class_names: the classes of the data set.
        confidence: of all intervals to one kind of reference at once.
        block: consecutive test images that count as one.
        sequences: the drive or film of each test image, where that is known.
    """
    networks: dict[tuple[str, str], dict[int | None, Measured]] = {
        (experiment, student): {} for experiment in run for student in experiments[experiment]["students"]
    }
    for network in measured:
        networks[network.experiment, network.student][network.seed] = network
    rows = {
        (experiment, student): replace(
            _row(experiment, student, [*seeds.values()], experiments[experiment].get("methods") or [], class_names),
            diverged=tuple(job for job in diverged if job.experiment == experiment),
            reference=find_reference(experiment, student, run, experiments),
        )
        for (experiment, student), seeds in networks.items()
    }
    for (experiment, student), row in rows.items():
        twins = [rows[name, student] for name in find_twins(experiment, student, run, experiments)]
        rows[experiment, student] = replace(row, equal_time_reference=_trained_as_long(row, twins))
    counts = {name: {seed: network.counts for seed, network in seeds.items()} for name, seeds in networks.items()}
    references = {name: row.reference for name, row in rows.items()}

    def gains(
        references: Mapping[tuple[str, str], str | None], counts: Any, sequences: Sequence[str | None]
    ) -> dict[tuple[str, str], Difference]:
        pairs = {name: (reference, name[1]) for name, reference in references.items() if reference}
        return differences(counts, pairs, confidence=confidence, block=block, sequences=sequences)

    equal_time = gains({name: row.equal_time_reference for name, row in rows.items()}, counts, sequences)
    for name, difference in gains(references, counts, sequences).items():
        reference = networks[str(rows[name].reference), name[1]]
        system, other = ([side[seed] for seed in difference.seeds] for side in (networks[name], reference))
        per_class = _by_class(class_names, _mean_iou_by_class(system) - _mean_iou_by_class(other))
        rows[name] = replace(rows[name], gain=Gain(**vars(difference), per_class=per_class))
    rows = {name: replace(row, equal_time_gain=equal_time.get(name)) for name, row in rows.items()}
    teacher_row = _row(teacher.experiment, teacher.student, [teacher], [], class_names)
    if teacher.elsewhere is None:
        return teacher_row, [*rows.values()]
    second = teacher.elsewhere.sequences
    if len(block_starts(len(second), block, second)) < 2:
        raise UserError(f"compare.block: {block}, but an interval of evaluate.out_of_domain needs two blocks of its "
                        f"{len(second)} images")  # fmt: skip
    second_counts = {
        name: {seed: network.elsewhere.counts for seed, network in seeds.items() if network.elsewhere}
        for name, seeds in networks.items()
    }
    second_gains = gains(references, second_counts, second)

    def estimated(seeds: Iterable[Any]) -> Estimate | None:
        counts = [*seeds]
        return estimate(counts, confidence=confidence, block=block, sequences=second) if counts else None

    for name, row in rows.items():
        score = estimated(second_counts[name].values())
        rows[name] = replace(row, out_of_domain=score, out_of_domain_gain=second_gains.get(name))
    return replace(teacher_row, out_of_domain=estimated([teacher.elsewhere.counts])), [*rows.values()]


def _trained_as_long(row: Row, twins: Sequence[Row]) -> str | None:
    """The twin whose training took least time among those that took as long as the row's."""
    if row.busy_seconds is None:
        return None
    times = {twin.experiment: twin.busy_seconds for twin in twins if twin.busy_seconds is not None}
    enough = {name: seconds for name, seconds in times.items() if seconds >= ENOUGH * row.busy_seconds}
    return min(enough, key=enough.__getitem__, default=None)


def warnings(rows: Sequence[Row], experiments: Mapping[str, Any]) -> list[str]:
    """What a reader must know before comparing these rows, a sentence for each kind of trouble."""
    sentences: list[str] = []
    alone, seeds, budgets, own_optimizer = list[str](), list[str](), list[str](), list[str]()
    by_name = {(row.experiment, row.student): row for row in rows}
    for row in rows:
        name = f"{row.experiment} ({row.student})"
        if row.diverged:
            rest = "; its numbers are of the others" if row.seeds else ""
            sentences.append(f"{row.experiment}: {row.divergence}{rest}.")
        if row.seeds and row.distilled and row.reference is None:
            alone.append(name)
        if not row.seeds or row.reference is None:
            continue
        reference = by_name[row.reference, row.student]
        if row.gain is None:
            why = "have no seed in common" if reference.seeds else "have nothing to compare: the reference diverged"
            sentences.append(f"{name} and its undistilled reference, {row.reference}, {why}.")
            continue
        if len(row.gain.seeds) < max(len(row.seeds), len(reference.seeds)):
            common = ", ".join(str(seed) for seed in row.gain.seeds)
            seeds.append(f"{name} and {row.reference}: {common}")
        iterations = [
            [seed.iterations for seed in one.seeds if seed.seed in row.gain.seeds] for one in (row, reference)
        ]
        if iterations[0] != iterations[1]:
            budgets.append(f"{name} trained {iterations[0]} iterations, {row.reference} {iterations[1]}")
        configs = [experiments[one.experiment]["students"][one.student] for one in (row, reference)]
        if configs[0] != configs[1]:
            own_optimizer.append(f"{name} and {row.reference}")
    for sentence, members in (
        (
            "No undistilled reference in this run for {}: add an experiment with the same student, budget and no "
            "methods to say what distillation did.",
            alone,
        ),
        ("Compared on the seeds that both have: {}.", seeds),
        ("The budgets differ, so that the difference is not distillation's alone: {}.", budgets),
        ("Each has optimiser settings of its own: {}.", own_optimizer),
    ):
        if members:
            sentences.append(sentence.format("; ".join(members)))
    return list(dict.fromkeys(sentences))  # students of one job diverge together


def best_row(rows: Sequence[Row]) -> tuple[str, str]:
    """The student with the best mean validation score: what registration would choose without a budget."""
    scores = {(row.experiment, row.student): row.val_miou.mean for row in rows if row.val_miou}
    return max(scores, key=scores.__getitem__)


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
            ece=network.test.get("test/ece"),
            cpu_seconds=network.training.get("cpu_seconds"),
        )
        for network in networks
    )
    views = {}
    for view in ("flip", "multi_scale", "boundary"):
        scores = [network.test[view]["test/miou"] for network in networks if network.test.get(view)]
        if len(scores) == len(seeds) and (spread := Spread.of(scores)):
            views[view] = spread
    # The fastest pass of all seeds: the network is the same, and slower passes tell what else the machine was doing.
    latencies = [network.test["latency_ms"] for network in networks if network.test.get("latency_ms")]
    latency = min(latencies, default=None)
    medians = [network.test["latency_median_ms"] for network in networks if network.test.get("latency_median_ms")]
    errors = [seed.ece for seed in seeds if seed.ece is not None]
    durations = [seed.training_seconds for seed in seeds if seed.training_seconds is not None]
    worked = [seed.cpu_seconds for seed in seeds if seed.cpu_seconds is not None]
    cpu_seconds = float(np.mean(worked)) if worked and len(worked) == len(seeds) else None
    busy = [(seed.training_seconds if cpu_seconds is None else seed.cpu_seconds, seed.iterations) for seed in seeds]
    steps = [seconds / iterations for seconds, iterations in busy if seconds and iterations]
    first = networks[0].test if networks else {}
    return Row(
        experiment=experiment,
        student=student,
        methods=tuple(str(method.get("name", "?")) for method in methods),
        distilled=bool(methods),
        reference=None,
        equal_time_reference=None,
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
        step_seconds=float(np.mean(steps)) if steps else None,
        gain=None,
        equal_time_gain=None,
        ece=Spread.of(errors),
        latency_median_ms=float(np.median(medians)) if medians else None,
        cpu_seconds=cpu_seconds,
    )


def _mean_iou_by_class(networks: Sequence[Measured]) -> Any:  # [K], nan where no seed has the class
    return mean_over_present(np.stack([iou(network.confusion) for network in networks], axis=-1))


def _by_class(class_names: Sequence[str], values: Any) -> dict[str, float | None]:
    pairs = zip(class_names, values.tolist(), strict=True)
    return {name: None if math.isnan(value) else value for name, value in pairs}
