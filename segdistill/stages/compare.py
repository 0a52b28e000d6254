"""Mean and spread over seeds, what a difference to the undistilled student is worth, and one page that shows it."""

import csv
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from segdistill.config import config as config_class
from segdistill.config import flatten, parse, to_dict
from segdistill.engine.settings import InferenceConfig
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.files import disk_errors, new_folder, read_sealed, seal, write_file
from segdistill.plan import TEACHER, Job, jobs
from segdistill.report.highlights import Highlights, scores_of
from segdistill.stages._cohort import folders_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

    from segdistill.data.shards import DatasetInfo, ShardDataset
    from segdistill.report.inputs import Measured
    from segdistill.report.overlays import Scene
    from segdistill.report.results import Comparison, Protocol, Row

PAGE_LIMIT = 2**30  # bytes; the page holds its pictures


@config_class
class Config:
    """Section ``compare`` of params.yaml."""

    confidence: Annotated[float, Field(ge=0.5, le=0.9999)]
    """That all intervals of a table hold at once."""

    block: Annotated[int, Field(ge=1, le=1_000_000)]
    """Consecutive test images that count as one, since frames of a drive resemble each other; 1 where they do not.
    Where the data set names sequences, as Cityscapes and CamVid do, those of two are never one."""

    overlays: Annotated[int, Field(ge=0, le=1000)]
    """Test images shown in the report; evaluate must have kept at least as many."""

    hardest: Annotated[int, Field(ge=0, le=100)] = 4
    """Test images shown on which the best student is worst, with it and its undistilled twin."""

    min_test_miou: Annotated[float, Field(ge=0, le=100)]
    """The gate: points of test mIoU (0..100) that a student must reach, or nothing is registered."""


def run(
    config: Config,
    *,
    run: list[str],
    seeds: list[int],
    prepared: Path,
    teacher: Path,
    teacher_evaluation: Path,
    students: list[Path],
    evaluations: list[Path],
    report: Path,
    metrics: Path,
    tracker: Tracker,
    data_md5: str | None = None,
    git_commit: str | None = None,
) -> dict[str, float]:
    """Writes the folder ``report`` and the small file ``metrics``; returns seconds by activity.

    Args:
        config: section ``compare``.
        run: the experiments; with ``seeds`` the matrix. No other job is looked at.
        seeds: the seeds.
        prepared: the prepared data set.
        teacher: the teacher's folder.
        teacher_evaluation: the teacher's evaluation.
        students: each cohort's trained students; their metrics.json tells the experiment's settings, and by them each
            student's reference.
        evaluations: each cohort's evaluations.
        report: results.json, report.md, report.html and plots/ for DVC.
        metrics: flat numbers for ``dvc metrics``.
        tracker: of the pipeline's run.
        data_md5: the data's version, where it is known.
        git_commit: of the code that compares, where it is known.
    """
    from segdistill.data.shards import ShardDataset, read_dataset_info
    from segdistill.report import text
    from segdistill.report.inputs import Diverged, check_same_images, read_job, read_networks, read_settings
    from segdistill.report.intervals import block_starts
    from segdistill.report.mistakes import hardest_images, most_confused
    from segdistill.report.results import Comparison, best_row, compare_runs, warnings

    started = time.monotonic()
    matrix = jobs(run, seeds)
    models = folders_of(matrix, students, "run the stage 'distill' again")
    counts = folders_of(matrix, evaluations, "run the stage 'evaluate' again")
    info = read_dataset_info(prepared)
    names = [item.name for item in info.classes]
    (taught,) = read_networks(teacher, teacher_evaluation, TEACHER, None, [TEACHER], names)
    folders = [(job.experiment, model) for job, model in models.items()]
    experiments = read_settings(folders, info.content_hash, teacher)
    measured: list[Measured] = []
    diverged: list[Diverged] = []
    for job, model in models.items():
        expected = list(experiments[job.experiment]["students"])
        networks = read_job(
            model, counts[job] if counts[job].is_dir() else None, job.experiment, job.seed, expected, names
        )
        if isinstance(networks, Diverged):
            diverged.append(networks)
        else:
            measured += networks
    if not measured:
        raise UserError(f"{students[0]}: every job diverged, and nothing is left to compare; {diverged[0].reason}")
    check_same_images([taught, *measured])
    test_set = ShardDataset(prepared, "test")
    sequence_of = {test_set.sample_id(index): test_set.sequence(index) for index in range(len(test_set))}
    sequences = [sequence_of.get(image) for image in taught.accuracies]
    blocks = len(block_starts(len(sequences), config.block, sequences))
    if blocks < 2:
        images = text.plural(info.splits["test"], "test image")
        raise UserError(f"compare.block: {config.block}, but there are {images}, and an interval needs two blocks")
    teacher_row, rows = compare_runs(
        taught, measured, diverged, run, experiments, names, confidence=config.confidence, block=config.block,
        sequences=sequences,
    )  # fmt: skip
    best = best_row(rows)
    students_best = [network for network in measured if (network.experiment, network.student) == best]
    reference = next(row.reference for row in rows if (row.experiment, row.student) == best)
    twins = [network for network in measured if (network.experiment, network.student) == (reference, best[1])]
    twin = next((network for network in twins if network.seed == students_best[0].seed), None)
    comparison = Comparison(
        teacher=teacher_row,
        rows=tuple(rows),
        best=best,
        protocol=replace(
            _protocol(config, seeds, info, taught, measured), data_md5=data_md5, git_commit=git_commit, blocks=blocks
        ),
        warnings=tuple(warnings(rows, experiments)),
        passed=100 * max(row.test_miou.mean for row in rows if row.test_miou) >= config.min_test_miou,
        confused=most_confused(students_best, twins, names),
        hardest=hardest_images(students_best[0], twin, config.hardest),
    )
    pair = [
        (network, models[Job(network.experiment, network.seed or 0)]) for network in (students_best[0], twin) if network
    ]
    _write(config, comparison, [taught, *measured], [item.color for item in info.classes], prepared, report, pair)
    summary = metrics_of(comparison)
    with disk_errors(metrics):
        metrics.parent.mkdir(parents=True, exist_ok=True)
        _write_text(metrics, json.dumps(summary, indent=2) + "\n")
    tracker.metrics({"compare/" + "/".join(name.rsplit(".", 1)): value for name, value in flatten(summary).items()})
    tracker.artifact(report, "comparison")
    _tell(tracker.parent(), comparison)
    return {"evaluation": time.monotonic() - started}


def _tell(pipeline: Tracker, comparison: "Comparison") -> None:
    """What opens first in the tracker: the table as the pipeline run's description, and the best student's numbers.

    They have the names that the students' runs give them, so that they stand in the same columns.
    """
    from segdistill.report import page, text

    best = next(row for row in comparison.rows if (row.experiment, row.student) == comparison.best)
    protocol, teacher = comparison.protocol, comparison.teacher
    # MLflow shows the first lines only until one asks for more, so it begins with the finding, without a title.
    summary = page.markdown(comparison).partition("\n## ")[0].removeprefix("# Comparison").strip()
    pipeline.describe(
        f"{summary}\n\nThe whole of it: `comparison/report.html` among the artifacts of the run `compare`."
    )
    numbers: dict[str, Any] = {
        "test/miou": best.test_miou and best.test_miou.mean,
        "test/ece": best.ece and best.ece.mean,
        "val/miou": best.val_miou and best.val_miou.mean,
        "perf/params": best.params,
        "perf/latency_ms": best.latency_ms,
        "compare/gain": best.gain and best.gain.mean,
        "compare/gain_low": best.gain and best.gain.low,
        "compare/gain_high": best.gain and best.gain.high,
        "compare/teacher_test_miou": teacher.test_miou and teacher.test_miou.mean,
    }
    pipeline.metrics({name: value for name, value in numbers.items() if value is not None})
    pipeline.params({
        "best_student": text.name(best),
        "experiments": ", ".join(dict.fromkeys(row.experiment for row in comparison.rows)),
        "seeds": ", ".join(map(str, protocol.seeds)),
        "iterations": ", ".join(map(str, protocol.iterations)),
        "data_content": protocol.data_content[:16],
        "teacher_sha256": protocol.teacher_sha256[:16],
    })  # fmt: skip


def metrics_of(comparison: "Comparison") -> dict[str, Any]:
    """What ``dvc metrics show`` prints: shares, four decimals; of seeds that diverged their number."""
    summary: dict[str, Any] = {}
    for row in (comparison.teacher, *comparison.rows):
        entry: dict[str, float] = {}
        if row.test_miou is not None:
            entry["test_miou"] = round(row.test_miou.mean, 4)
        if row.ece is not None:
            entry["test_ece"] = round(row.ece.mean, 4)
        if row.diverged:
            entry["diverged"] = len(row.diverged)
        if row.out_of_domain is not None:
            entry["out_of_domain_miou"] = round(row.out_of_domain.mean, 4)
        gains = (("", row.gain), ("equal_time_", row.equal_time_gain), ("out_of_domain_", row.out_of_domain_gain))
        for prefix, gain in gains:
            if gain is not None:
                numbers = {"difference": gain.mean, "low": gain.low, "high": gain.high}
                entry |= {prefix + key: round(value, 4) for key, value in numbers.items()}
        if row is comparison.teacher:
            summary[TEACHER] = entry
        else:
            summary.setdefault(row.experiment, {})[row.student] = entry
    return summary


def table(comparison: "Comparison") -> "Table":
    """The comparison for a terminal."""
    from rich.table import Table
    from rich.text import Text

    from segdistill.report import text

    table = Table(
        title="Test mIoU in percent, differences in percentage points",
        title_justify="left",
        caption=Text(text.caption(comparison), "table.caption"),
        caption_justify="left",
    )
    seeds = text.plural(len(comparison.protocol.seeds), "seed")
    table.add_column("experiment", no_wrap=True)
    table.add_column("student", no_wrap=True)
    table.add_column(f"test mIoU ({seeds})", justify="right")
    for name in ("to undistilled", "params (M)", "images/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in (comparison.teacher, *comparison.rows):
        cells = (
            row.experiment,
            text.NOTHING if row is comparison.teacher else row.student,
            text.score(row),
            Text(text.gain(row), "bold" if text.is_shown(row.gain) else ""),
            text.millions(row.params),
            text.rounded(row.images_per_second),
        )
        table.add_row(*(Text.assemble(cell) for cell in cells), end_section=row is comparison.teacher)
    return table


def _protocol(
    config: Config, seeds: Sequence[int], info: "DatasetInfo", taught: "Measured", measured: Sequence["Measured"]
) -> "Protocol":
    """How the numbers came about."""
    from segdistill.report.results import OutOfDomainSet, Protocol

    selections = {network.training.get("config", {}).get("train", {}).get("select") for network in measured}
    iterations = {int(network.training.get("iterations") or 0) for network in measured} - {0}
    size = taught.test.get("input_size")
    return Protocol(
        seeds=tuple(seeds),
        iterations=tuple(sorted(iterations)),
        classes=tuple(item.name for item in info.classes),
        splits=dict(info.splits),
        input_size=(size[0], size[1]) if size else None,
        selection=selections.pop() if len(selections) == 1 else None,
        confidence=config.confidence,
        block=config.block,
        data_content=info.content_hash,
        teacher_sha256=taught.test["weights_sha256"],
        teacher_network=taught.test.get("network"),
        teacher_licence=taught.training.get("licence"),
        inference=parse(InferenceConfig, inference, "inference")
        if (inference := taught.test.get("inference"))
        else None,
        clock=_clock(measured),
        out_of_domain=OutOfDomainSet(second.content, len(second.sequences), second.classes)
        if (second := taught.elsewhere)
        else None,
    )


def _clock(measured: Sequence["Measured"]) -> str:
    """Whose seconds the trainings count: on a GPU its own, and none of the CPU's."""
    if not all("cpu_seconds" in network.training for network in measured):
        return "wall"
    clocks = {"GPU" if network.training["cpu_seconds"] is None else "CPU" for network in measured}
    return clocks.pop() if len(clocks) == 1 else "wall"


def _write(
    config: Config,
    comparison: "Comparison",
    networks: Sequence["Measured"],
    colors: Sequence[tuple[int, int, int]],
    prepared: Path,
    report: Path,
    pair: "Sequence[tuple[Measured, Path]]",
) -> None:
    """Everything in ``report``, sealed, which appears complete or not at all; the teacher is the first network.

    The pair is the best student and its undistilled twin, where it has one, each with the folder of its weights.
    """
    import numpy as np

    from segdistill.report import charts as drawing
    from segdistill.report import overlays, page
    from segdistill.report.confusion import confusion_map

    best = [network.confusion for network in networks if (network.experiment, network.student) == comparison.best]
    confusion = np.sum(best, axis=0)
    scenes = overlays.read(prepared, networks, colors, config.overlays)
    hardest = _hardest_scenes(comparison, pair, prepared, colors)
    charts = {shape: drawing.draw_all(comparison, networks, narrow=shape == "narrow") for shape in ("wide", "narrow")}
    with new_folder(report) as partial:
        plots = partial / "plots"
        plots.mkdir()
        _write_text(partial / "results.json", json.dumps(to_dict(comparison), indent=2, allow_nan=False) + "\n")
        _write_text(partial / "report.md", page.markdown(comparison))
        _write_text(
            partial / "report.html",
            page.page(comparison, confusion, charts, scenes, colors, drawing.few_validations(networks), hardest),
        )
        _write_curves(plots / "curves", networks)
        _write_per_class(plots / "per_class_iou.csv", [comparison.teacher, *comparison.rows])
        confusion_map(confusion, comparison.protocol.classes, plots / "confusion.png")
        for name, figure in charts["wide"].items():
            figure.savefig(plots / f"{name}.png", dpi=130)
        seal(partial)


def _hardest_scenes(
    comparison: "Comparison", pair: "Sequence[tuple[Measured, Path]]", prepared: Path,
    colors: Sequence[tuple[int, int, int]],
) -> "list[Scene]":  # fmt: skip
    """The images on which the best student is worst; of these few, chosen by their scores, predictions are made."""
    from segdistill.data.shards import ShardDataset
    from segdistill.report import overlays, text

    if not comparison.hardest:
        return []
    test_set, samples = ShardDataset(prepared, "test"), list(pair[0][0].accuracies)
    indices = [samples.index(image.sample) for image in comparison.hardest]
    classes = comparison.protocol.classes
    masks = [predicted_masks(network, folder, classes, test_set, indices) for network, folder in pair]
    scenes = []
    for place, (index, image) in enumerate(zip(indices, comparison.hardest, strict=True)):
        scores = [f"mIoU {text.percent(score)} %" for score in (image.miou, image.twin)]
        predictions = [(network, masks[n][place], scores[n]) for n, (network, _) in enumerate(pair)]
        scenes.append(overlays.scene(image.sample, *test_set[index], predictions, colors))
    return scenes


def predicted_masks(
    network: "Measured", folder: Path, classes: Sequence[str], test_set: "ShardDataset", indices: Sequence[int]
) -> "list[NDArray[np.uint8]]":
    """What a network, read from its folder, takes some test images for, shown as they were for its scores.

    Shape:
        each: [H, W] uint8, of the label's size.
    """
    from segdistill.engine.evaluate import masks
    from segdistill.engine.inference import Views
    from segdistill.models.export import load_model

    segmenter, _ = load_model(folder, network.student, classes=classes)
    views = Views(parse(InferenceConfig, network.test["inference"], f"{network.overlays.parent.parent}: inference"))
    return [mask for _, _, mask in masks(segmenter, test_set, indices, views)]


def _write_text(path: Path, text: str) -> None:
    write_file(path, text.encode())


def _write_curves(folder: Path, networks: Sequence["Measured"]) -> None:
    """One file a run, as ``dvc plots`` draws one line a file."""
    folder.mkdir()
    for network in networks:
        job = network.experiment if network.seed is None else f"{network.experiment}.{network.student}-s{network.seed}"
        _write_table(
            folder / f"{job}.csv",
            ["step", "val_miou"],
            ([step, f"{value:.6f}"] for step, value in network.curve.items()),
        )


def _write_per_class(path: Path, rows: Sequence["Row"]) -> None:
    cells = []
    for row in rows:
        for name, value in row.per_class_iou.items():
            numbers = (value, row.gain.per_class[name] if row.gain else None)
            texts = ("" if number is None else f"{number:.6f}" for number in numbers)
            cells.append([row.experiment, row.student, name, *texts])
    _write_table(path, ["experiment", "student", "class", "iou", "difference"], cells)


def _write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def highlights(paths: Mapping[str, Any]) -> Highlights:
    """The table and the page."""
    from segdistill.report.results import AGAIN, read_results

    report = paths["report"]
    results = read_results(report)
    networks = {TEACHER: results.teacher} | {f"{row.experiment}.{row.student}": row for row in results.rows}
    scores = {name: {"test/miou": row.test_miou.mean} for name, row in networks.items() if row.test_miou}
    return Highlights(
        scores=scores_of(scores, ("test/miou",)),
        page=read_sealed(report, "report.html", mend=AGAIN, limit=PAGE_LIMIT).decode(),
        summary=read_sealed(report, "report.md", mend=AGAIN).decode(),
    )
