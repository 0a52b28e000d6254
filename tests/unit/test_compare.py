import csv
import html
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow
import pytest
from _folders import prepare
from PIL import Image
from pyarrow import parquet
from rich.console import Console
from sklearn.metrics import jaccard_score

from segdistill.config import parse, to_dict
from segdistill.data.shards import read_dataset_info
from segdistill.engine.tracker import JsonLinesTracker, Tracker
from segdistill.errors import UserError
from segdistill.files import seal
from segdistill.metrics.confusion import iou_counts, mean_iou, per_class_iou
from segdistill.plan import Job
from segdistill.report import charts, page
from segdistill.report.inputs import Diverged
from segdistill.report.intervals import differences
from segdistill.report.overlays import Scene, Tile
from segdistill.report.results import Comparison, find_reference, find_twins
from segdistill.stages import compare
from segdistill.stages._cohort import write_record

CLASSES = {"sky": [70, 130, 180], "road & rail": [128, 64, 128], "car": [0, 0, 142], "bicyclist": [119, 11, 32]}
CNN, VIT = {"model": {"encoder": "mobilenet"}}, {"model": {"encoder": "mit_b0"}}
EXPERIMENTS: dict[str, Any] = {
    "none": {"students": {"cnn": CNN}, "methods": []},
    "none_vit": {"students": {"vit": VIT}, "methods": []},
    "kd": {"students": {"cnn": CNN}, "methods": [{"name": "kd", "weight": 1.0}]},
    "dml": {"students": {"cnn": CNN, "vit": VIT}, "methods": [{"name": "dml"}]},
}
ACCURACY = {"teacher": 0.95, "none": 0.70, "none_vit": 0.75, "kd": 0.85, "dml": 0.74}
PARAMS = {"teacher": 12_000_000, "cnn": 900_000, "vit": 3_700_000}
CONFIG = compare.Config(confidence=0.95, block=1, overlays=2, min_test_miou=0.0)


COHORTS = ("artifacts/students", "reports/evaluation")


def place(job: str) -> str:
    """``s0/kd`` for the job ``kd-s0``."""
    experiment, _, seed = job.rpartition("-")
    return f"{seed}/{experiment}"


class Inputs:
    """A folder with everything compare reads, written as prepare, distill and evaluate write it."""

    def __init__(self, root: Path, *, images: int = 12, size: tuple[int, int] = (24, 32)) -> None:
        self.root, self.prepared = root, root / "artifacts/prepared"
        generator = np.random.default_rng(0)
        blocks = generator.integers(0, len(CLASSES), size=(images, size[0] // 4, size[1] // 4))
        self.truth = blocks.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
        self.truth[:, :2] = 255
        self.ids = [f"scene-{index:03d}" for index in range(images)]
        self.predictions: dict[str, np.ndarray] = {}
        self._write_prepared(generator)
        self.write_job("teacher", None, ["teacher"])

    def write_job(self, experiment: str, seed: int | None, names: list[str], accuracy: float | None = None) -> None:
        job = experiment if seed is None else f"{experiment}-s{seed}"
        model, evaluation = self.model(job), self.evaluation(job)
        (model / "curves").mkdir(parents=True, exist_ok=True)
        evaluation.mkdir(parents=True, exist_ok=True)
        trained, evaluated = {}, {}
        for name in names:
            generator = np.random.default_rng([len(job), *job.encode(), *name.encode()])
            chance = ACCURACY[experiment] if accuracy is None else accuracy
            wrong = generator.random(self.truth.shape) > chance
            guesses = generator.integers(0, len(CLASSES), size=self.truth.shape)
            prediction = np.where(wrong | (self.truth == 255), guesses, self.truth).astype(np.uint8)
            self.predictions[f"{job}/{name}"] = prediction
            evaluated[name] = self._write_evaluation(evaluation, name, prediction)
            trained[name] = {"val/miou": chance - 0.02, "val/pixel_accuracy": chance, "params": PARAMS[name]}
            rows = [f"{step},{2 / step:.3f},{1 / step:.3f},{chance * (1 - 10 / step):.4f}" for step in (20, 40, 80)]
            text = "\n".join(["step,train/loss/total,train/loss/ce,val/miou", "10,1.2,1.1,", *rows])
            (model / "curves" / f"{name}.csv").write_text(text + "\n")
            weights = f"weights of {job}/{name}"
            (model / f"{name}.json").write_text(json.dumps({"sha256": weights}))
            evaluated[name]["weights_sha256"] = weights
        settings = EXPERIMENTS.get(job.rpartition("-s")[0], {})
        facts = {
            "students": trained, "iterations": 80, "seconds": 75.0, "images_per_second": 20.0, "settings": settings,
            "config": {"train": {"select": "last"}}, "data_content": read_dataset_info(self.prepared).content_hash,
            "identity": f"{job} identity", "code": "code of all",
        }  # fmt: skip
        (model / "metrics.json").write_text(json.dumps(facts))
        report = {"models": evaluated, "split": "test", "samples": len(self.ids), "classes": list(CLASSES)}
        (evaluation / "evaluation.json").write_text(json.dumps(report))

    def write_diverged(self, experiment: str, seed: int, iteration: int = 120) -> None:
        """In place of the job's networks and their evaluation."""
        job, settings = f"{experiment}-s{seed}", EXPERIMENTS[experiment]
        for folder in (self.model(job), self.evaluation(job)):
            shutil.rmtree(folder, ignore_errors=True)
        self.model(job).mkdir(parents=True)
        facts = {
            "experiment": experiment, "seed": seed, "students": list(settings["students"]), "iteration": iteration,
            "reason": "cnn: kd.kl is not finite", "settings": settings, "config": {"train": {"select": "last"}},
            "data_content": read_dataset_info(self.prepared).content_hash, "identity": f"{job} identity",
        }  # fmt: skip
        (self.model(job) / "diverged.json").write_text(json.dumps(facts))

    def model(self, job: str) -> Path:
        return self.root / ("artifacts/teacher" if job == "teacher" else f"artifacts/students/{place(job)}")

    def evaluation(self, job: str) -> Path:
        return self.root / f"reports/evaluation/{job if job == 'teacher' else place(job)}"

    def score(self, job: str, name: str) -> float:
        valid = self.truth != 255
        truth, guess = self.truth[valid], self.predictions[f"{job}/{name}"][valid]
        return float(jaccard_score(truth, guess, average="macro"))

    def compare(
        self,
        run: list[str],
        seeds: list[int],
        *,
        config: compare.Config = CONFIG,
        tracker: Any = None,
        seals: bool = True,
        **changes: Any,
    ) -> Comparison:
        cohorts = {kind: [self.root / kind / f"s{seed}" for seed in seeds] for kind in COHORTS}
        for folder, seed in [
            (folder, seed) for kind in COHORTS for folder, seed in zip(cohorts[kind], seeds, strict=True)
        ]:
            folder.mkdir(parents=True, exist_ok=True)
            write_record(folder, [Job(experiment, seed) for experiment in run])
        arguments: dict[str, Any] = {
            "run": run,
            "seeds": seeds,
            "prepared": self.prepared,
            "teacher": self.model("teacher"),
            "teacher_evaluation": self.evaluation("teacher"),
            "students": cohorts["artifacts/students"],
            "evaluations": cohorts["reports/evaluation"],
            "report": self.report,
            "metrics": self.root / "reports/metrics.json",
            "tracker": tracker or Tracker(),
        }
        if seals:
            self.seal()
        with patch.object(compare, "predicted_masks", self._predicted_masks):  # the weights are none
            compare.run(config, **(arguments | changes))
        return parse(Comparison, self.results(), "results.json")

    def seal(self) -> None:
        """As the stages do at their ends."""
        for folder in (self.model("teacher"), self.evaluation("teacher")):
            seal(folder)
        for folder in (*self.root.glob("artifacts/students/*/*/"), *self.root.glob("reports/evaluation/s*/*/")):
            seal(folder)

    @property
    def report(self) -> Path:
        return self.root / "reports/comparison"

    def results(self) -> dict[str, Any]:
        return json.loads((self.report / "results.json").read_text())

    def _predicted_masks(
        self, network: Any, folder: Path, classes: Any, test_set: Any, indices: list[int]
    ) -> list[np.ndarray]:
        assert folder == self.model(f"{network.experiment}-s{network.seed}")
        return list(self.predictions[f"{network.experiment}-s{network.seed}/{network.student}"][indices])

    def _write_evaluation(self, folder: Path, name: str, prediction: np.ndarray) -> dict[str, Any]:
        classes = len(CLASSES)
        prediction = np.where(np.isin(prediction, self.truth), prediction, 0)  # a class that is nowhere is not found
        per_image = np.zeros((len(self.ids), classes, classes), dtype=np.int64)
        for matrix, truth, guess in zip(per_image, self.truth, prediction, strict=True):
            np.add.at(matrix, (truth[truth != 255], guess[truth != 255]), 1)
        confusion = per_image.sum(axis=0)
        counts = np.stack(iou_counts(per_image), axis=-2)
        np.savez_compressed(folder / f"{name}.npz", confusion=confusion, counts=counts, ids=np.array(self.ids))
        overlays = folder / "overlays" / name
        overlays.mkdir(parents=True, exist_ok=True)
        for index in (0, 4, 8, len(self.ids) - 1):
            Image.fromarray(prediction[index]).save(overlays / f"{self.ids[index]}.png")
        return {
            "test/miou": mean_iou(confusion),
            "test/pixel_accuracy": np.trace(confusion) / confusion.sum(),
            "test/ece": 0.05,
            "per_class_iou": per_class_iou(confusion, list(CLASSES)),
            "params": PARAMS[name],
            "macs": 300 * PARAMS[name],
            "latency_ms": PARAMS[name] / 1e5,
            "latency_median_ms": PARAMS[name] / 0.9e5,
            "images_per_second": 1e8 / PARAMS[name],
            "input_size": list(self.truth.shape[1:]),
            "inference": {"batch_size": 4, "input_scale": 0.5, "window": None, "window_stride": 0.67},
            "flip": None,
            "multi_scale": None,
        }

    def _write_prepared(self, generator: np.random.Generator) -> None:
        colors = np.zeros((256, 3), dtype=np.int64)
        colors[: len(CLASSES)] = list(CLASSES.values())
        photographs = colors[self.truth] + generator.integers(0, 60, size=(*self.truth.shape, 3))
        source = self.root / "data"
        classes = [{"name": name, "color": color} for name, color in CLASSES.items()]
        for kind, pictures in (("images", photographs.clip(0, 255).astype(np.uint8)), ("masks", self.truth)):
            (source / kind / "test").mkdir(parents=True)
            for name, pixels in zip(self.ids, pictures, strict=True):
                Image.fromarray(pixels).save(source / kind / "test" / f"{name}.png")
        (source / "classes.json").write_text(json.dumps({"classes": classes}))
        prepare(source, self.prepared)


def all_jobs(root: Path) -> Inputs:
    made = Inputs(root)
    for experiment, settings in EXPERIMENTS.items():
        for seed in (0, 1):
            made.write_job(experiment, seed, list(settings["students"]))
    return made


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return all_jobs(tmp_path)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inputs, Comparison]:
    """All experiments, compared once for the tests that only look."""
    made = all_jobs(tmp_path_factory.mktemp("compared"))
    return made, made.compare(list(EXPERIMENTS), [0, 1])


def row_of(comparison: Comparison, experiment: str, student: str = "cnn") -> Any:
    return next(row for row in comparison.rows if (row.experiment, row.student) == (experiment, student))


def test_numbers_are_those_of_a_direct_computation(compared: tuple[Inputs, Comparison]) -> None:
    inputs, comparison = compared
    assert comparison.teacher.test_miou.mean == pytest.approx(inputs.score("teacher", "teacher"))
    for row in comparison.rows:
        scores = [inputs.score(f"{row.experiment}-s{seed}", row.student) for seed in (0, 1)]
        assert [item.test_miou for item in row.seeds] == pytest.approx(scores)
        assert row.test_miou.mean == pytest.approx(np.mean(scores))
        assert row.test_miou.std == pytest.approx(np.std(scores, ddof=1))
        assert row.val_miou.mean == pytest.approx(ACCURACY[row.experiment] - 0.02)
        assert row.params == PARAMS[row.student]
    order = [(row.experiment, row.student) for row in comparison.rows]
    assert order == [("none", "cnn"), ("none_vit", "vit"), ("kd", "cnn"), ("dml", "cnn"), ("dml", "vit")]
    assert comparison.best == ("kd", "cnn")


def test_differences_and_intervals_are_those_of_the_counts_with_the_rows_of_each_student_together(
    compared: tuple[Inputs, Comparison],
) -> None:
    inputs, comparison = compared
    networks: dict[tuple[str, str], dict[int | None, Any]] = {
        (name, student): {
            seed: np.load(inputs.evaluation(f"{name}-s{seed}") / f"{student}.npz")["counts"] for seed in (0, 1)
        }
        for name, settings in EXPERIMENTS.items()
        for student in settings["students"]
    }
    pairs = {("kd", "cnn"): ("none", "cnn"), ("dml", "cnn"): ("none", "cnn"), ("dml", "vit"): ("none_vit", "vit")}
    for (experiment, student), expected in differences(networks, pairs, confidence=0.95, block=1).items():
        row = row_of(comparison, experiment, student)
        assert {key: getattr(row.gain, key) for key in vars(expected)} == vars(expected)
        reference = row_of(comparison, row.reference, student)
        for name in CLASSES:
            change = row.per_class_iou[name] - reference.per_class_iou[name]
            assert row.gain.per_class[name] == pytest.approx(change)


def test_metrics_file_is_small_and_flat(inputs: Inputs) -> None:
    comparison = inputs.compare(["none", "kd"], [0, 1])
    metrics = json.loads((inputs.root / "reports/metrics.json").read_text())
    gain = row_of(comparison, "kd").gain
    assert metrics == {
        "teacher": {"test_miou": round(comparison.teacher.test_miou.mean, 4), "test_ece": 0.05},
        "none": {"cnn": {"test_miou": round(row_of(comparison, "none").test_miou.mean, 4), "test_ece": 0.05}},
        "kd": {
            "cnn": {
                "test_miou": round(row_of(comparison, "kd").test_miou.mean, 4),
                "test_ece": 0.05,
                "difference": round(gain.mean, 4),
                "low": round(gain.low, 4),
                "high": round(gain.high, 4),
                # "none" took as long, so the numbers are the same.
                "equal_time_difference": round(gain.mean, 4),
                "equal_time_low": round(gain.low, 4),
                "equal_time_high": round(gain.high, 4),
            }
        },
    }


@pytest.mark.parametrize(
    ("experiment", "student", "expected"),
    [
        ("kd", "cnn", "none"),
        ("dml", "cnn", "none"),
        ("dml", "vit", "none_vit"),
        ("none", "cnn", None),
        ("new", "x", None),
    ],
)
def test_reference_is_the_same_student_alone_without_methods(
    experiment: str, student: str, expected: str | None
) -> None:
    assert find_reference(experiment, student, list(EXPERIMENTS), EXPERIMENTS) == expected


def test_reference_must_be_part_of_the_run() -> None:
    assert find_reference("kd", "cnn", ["kd", "none_vit"], EXPERIMENTS) is None


def test_a_student_of_another_configuration_is_no_reference() -> None:
    other = {**EXPERIMENTS, "none": {"students": {"cnn": VIT}, "methods": []}}
    assert find_reference("kd", "cnn", list(other), other) is None
    pair = {**EXPERIMENTS, "none": {"students": {"cnn": CNN, "vit": VIT}, "methods": []}}
    assert find_reference("kd", "cnn", list(pair), pair) is None


def test_the_reference_is_the_twin_with_the_same_budget() -> None:
    longer = {"none_long": {**EXPERIMENTS["none"], "budget": 2.0}}
    experiments = longer | EXPERIMENTS | {"kd_long": {**EXPERIMENTS["kd"], "budget": 2.0}}
    assert find_reference("kd", "cnn", list(experiments), experiments) == "none"
    assert find_reference("kd_long", "cnn", list(experiments), experiments) == "none_long"
    assert find_reference("kd", "cnn", ["kd", "none_long"], experiments) is None
    assert find_twins("kd", "cnn", list(experiments), experiments) == ["none_long", "none"]


def test_a_twin_with_another_optimiser_is_taken_where_none_has_the_same() -> None:
    tuned = {"students": {"cnn": {**CNN, "optimizer": {"lr": 0.1}}}, "methods": []}
    assert find_reference("kd", "cnn", ["tuned", "kd"], EXPERIMENTS | {"tuned": tuned}) == "tuned"
    assert find_reference("kd", "cnn", ["tuned", "none", "kd"], EXPERIMENTS | {"tuned": tuned}) == "none"


def test_a_run_without_reference_says_so_and_claims_nothing(inputs: Inputs) -> None:
    comparison = inputs.compare(["kd"], [0, 1])
    assert row_of(comparison, "kd").gain is None
    assert comparison.warnings[0].startswith("No undistilled reference in this run for kd (cnn): ")
    markdown = (inputs.report / "report.md").read_text()
    assert "nothing can be said" in markdown
    assert "no reference" in markdown


def test_only_the_runs_of_the_list_are_read(inputs: Inputs) -> None:
    inputs.write_job("none", 7, ["cnn"])
    (inputs.evaluation("stale-s0")).mkdir()
    (inputs.evaluation("stale-s0") / "evaluation.json").write_text("broken")
    (inputs.evaluation("none-s7") / "evaluation.json").write_text("broken")
    inputs.compare(["none", "kd"], [0, 1])
    text = "".join(path.read_text() for path in inputs.report.rglob("*.*") if path.suffix in (".json", ".csv", ".md"))
    assert "stale" not in text and "dml" not in text


def test_a_single_seed_has_no_standard_deviation(inputs: Inputs) -> None:
    comparison = inputs.compare(["none", "kd"], [0])
    assert row_of(comparison, "kd").test_miou.std is None
    assert inputs.results()["rows"][0]["test_miou"]["std"] is None
    assert "±" not in shown_table(inputs.results())
    assert "with one there is no telling" in (inputs.report / "report.html").read_text()


def test_page_is_self_contained_and_escapes_names(compared: tuple[Inputs, Comparison]) -> None:
    inputs, _ = compared
    page = (inputs.report / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page) + re.findall(r"url\(['\"]?([^)'\"]*)", page)
    assert len(sources) > 10
    assert {source[:5] for source in sources if not source.startswith("#")} == {"data:"}
    assert page.count("<script>") == page.count("<script") == 1 and "@import" not in page and "fetch(" not in page
    assert "http" not in page
    assert "road &amp; rail" in page and "road & rail" not in page
    assert page.count("<svg") == page.count("</svg>") == 3 * 2  # wide and narrow


def test_no_text_of_a_user_reaches_the_page_unescaped(compared: tuple[Inputs, Comparison]) -> None:
    hostile = "<script>"
    kd = row_of(compared[1], "kd")
    row = replace(
        kd,
        experiment=hostile,
        student=hostile,
        reference=hostile,
        diverged=(Diverged(hostile, 2, 120, hostile, None, None),),
    )
    comparison = replace(compared[1], rows=(row,), best=(hostile, hostile), warnings=(hostile,))
    scene = Scene(hostile, (4, 3), "data:", (Tile(hostile, hostile, "data:", "data:", hostile),))
    drawings = {shape: charts.draw_all(comparison, [], narrow=shape == "narrow") for shape in ("wide", "narrow")}
    text = page.page(comparison, np.eye(len(CLASSES)), drawings, [scene], [(0, 0, 0)] * len(CLASSES))
    assert text.count("&lt;script&gt;") > 10
    assert text.count("<script") == 1  # our own


def test_page_has_the_pictures_of_truth_teacher_and_every_student(compared: tuple[Inputs, Comparison]) -> None:
    inputs, _ = compared
    page = (inputs.report / "report.html").read_text()
    assert page.count('class="scene"') == 2 + 4  # config.overlays of the four that evaluate kept, and the worst
    labels = ["truth", "teacher", "none · cnn", "none_vit · vit", "kd · cnn", "dml · cnn", "dml · vit"]
    of_the_worst = ["truth", "none · cnn", "kd · cnn"]
    assert all(page.count(f"<figcaption>{label}<") == (6 if label in of_the_worst else 2) for label in labels)
    assert page.count('class="layer errors prediction"') == 2 * 6 + 4 * 2


def test_the_worst_images_and_the_most_confused_classes_are_those_of_the_scores_beside_the_twin(
    compared: tuple[Inputs, Comparison],
) -> None:
    inputs, comparison = compared
    student, twin = (inputs.predictions[f"{experiment}-s0/cnn"] for experiment in ("kd", "none"))

    def score(prediction: np.ndarray, index: int) -> float:
        valid = inputs.truth[index] != 255
        return float(jaccard_score(inputs.truth[index][valid], prediction[index][valid], average="macro"))

    order = sorted(range(len(inputs.ids)), key=lambda index: score(student, index))[:4]
    assert [image.sample for image in comparison.hardest] == [inputs.ids[index] for index in order]
    for index, image in zip(order, comparison.hardest, strict=True):
        assert (image.miou, image.twin) == pytest.approx((score(student, index), score(twin, index)))
    assert len(comparison.confused) == 10 and comparison.confused[0].share == max(
        one.share for one in comparison.confused
    )
    for one in comparison.confused:
        truth, guess = (list(CLASSES).index(name) for name in (one.truth, one.prediction))
        for share, experiment in ((one.share, "kd"), (one.twin, "none")):
            both = np.stack([inputs.predictions[f"{experiment}-s{seed}/cnn"] for seed in (0, 1)])
            assert share == pytest.approx((both[:, inputs.truth == truth] == guess).mean())
    markdown = (inputs.report / "report.md").read_text()
    assert f"| {inputs.ids[order[0]]} | {100 * comparison.hardest[0].miou:.1f} |" in markdown
    assert f"| {comparison.confused[0].truth} | {comparison.confused[0].prediction} |" in markdown


def test_a_best_student_without_a_twin_is_shown_alone(inputs: Inputs) -> None:
    comparison = inputs.compare(["none_vit"], [0])
    assert {one.twin for one in (*comparison.confused, *comparison.hardest)} == {None}
    assert "undistilled, %" not in (inputs.report / "report.html").read_text()


def test_no_picture_is_asked_for_and_none_is_shown(inputs: Inputs) -> None:
    inputs.compare(["none", "kd"], [0, 1], config=replace(CONFIG, overlays=0, hardest=0))
    assert 'class="scene"' not in (inputs.report / "report.html").read_text()


def test_ids_of_the_drawings_do_not_meet(compared: tuple[Inputs, Comparison]) -> None:
    inputs, _ = compared
    page = (inputs.report / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_the_same_inputs_give_the_same_bytes(inputs: Inputs) -> None:
    inputs.compare(["none", "kd"], [0, 1])
    first = {path.name: path.read_bytes() for path in inputs.report.rglob("*.*")}
    inputs.compare(["none", "kd"], [0, 1])
    assert {path.name: path.read_bytes() for path in inputs.report.rglob("*.*")} == first


def test_the_headline_says_what_gains_and_the_rest_follows_by_verdict(inputs: Inputs) -> None:
    for seed in (0, 1):  # a student like its reference
        inputs.write_job("dml", seed, ["cnn", "vit"], accuracy=0.75)
        inputs.write_job("none", seed, ["cnn"], accuracy=0.75)
    comparison = inputs.compare(list(EXPERIMENTS), [0, 1])
    verdicts = [row.gain.verdict for row in comparison.rows if row.gain]
    assert verdicts == ["gains", "not shown", "not shown"]
    kd = row_of(comparison, "kd").gain
    for text in said(inputs)[:2]:
        start = "1 of 3 distilled students gains over the same student undistilled, kd (cnn)"
        assert f"{start} {100 * kd.mean:+.2f} points; 2 are not shown to differ." in text
        interval = f"{100 * kd.mean:+.2f} [{100 * kd.low:+.2f}, {100 * kd.high:+.2f}]"
        assert f"Better than the same student undistilled, in points: kd (cnn) {interval}." in text
        assert "Not shown either way, in points: dml (cnn) " in text and "Worse" not in text


def test_a_gain_of_one_seed_that_another_does_not_have_is_not_claimed(inputs: Inputs) -> None:
    for seed, accuracy in ((0, 0.99), (1, 0.71)):
        inputs.write_job("kd", seed, ["cnn"], accuracy=accuracy)
    comparison = inputs.compare(["none", "kd"], [0, 1])
    assert row_of(comparison, "kd").gain.verdict == "not shown"
    assert "No distilled student is shown to be better than the" in (inputs.report / "report.md").read_text()
    inputs.compare(["none", "kd"], [0])
    markdown = (inputs.report / "report.md").read_text()
    assert "1 of 1 distilled student gains" in markdown and "a single seed may be luck" in markdown


def test_frames_of_a_drive_count_as_blocks_of_which_there_must_be_two(inputs: Inputs) -> None:
    frames = row_of(inputs.compare(["none", "kd"], [0]), "kd").gain
    blocks = row_of(inputs.compare(["none", "kd"], [0], config=replace(CONFIG, block=4)), "kd").gain
    assert (frames.degrees_of_freedom, blocks.degrees_of_freedom) == (11, 2)
    assert "3 blocks of 4 test images" in (inputs.report / "report.md").read_text()
    with pytest.raises(UserError, match=r"compare\.block: 12, but there are 12 test images, and"):
        inputs.compare(["none", "kd"], [0], config=replace(CONFIG, block=12))


def test_a_block_of_frames_is_of_one_sequence(inputs: Inputs) -> None:
    manifest = inputs.prepared / "manifest.parquet"
    rows = [row | {"sequence": "ab"[row["id"] > "scene-004"]} for row in parquet.read_table(manifest).to_pylist()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), manifest)
    seal(inputs.prepared, leave=["shards"])
    gain = row_of(inputs.compare(["none", "kd"], [0], config=replace(CONFIG, block=4)), "kd").gain
    assert gain.degrees_of_freedom == 3  # 4 + 1 and 4 + 3 frames
    assert "4 blocks of at most 4 test images, each of one sequence" in (inputs.report / "report.md").read_text()


def test_the_number_of_rows_is_corrected_for_and_said(inputs: Inputs) -> None:
    inputs.compare(["none", "kd"], [0, 1])
    assert "is a 95 % interval over other seeds and other test images" in (inputs.report / "report.md").read_text()
    inputs.compare(list(EXPERIMENTS), [0, 1])
    for text in said(inputs):
        assert "all 3 of the table hold at once with 95 %" in text
    assert "for each row at 1 - 0.05 / 3 (Bonferroni)" in said(inputs)[0]


def with_longer_training(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """kd takes twice as long as none; of two undistilled students with larger budgets one takes just as long."""
    for name, budget, seconds in (("none_2x", 2.0, 148.0), ("none_4x", 4.0, 300.0), ("kd", 1.0, 150.0)):
        settings = {**EXPERIMENTS["kd" if name == "kd" else "none"], "budget": budget}
        monkeypatch.setitem(EXPERIMENTS, name, settings)
        for seed in (0, 1):
            inputs.write_job(name, seed, ["cnn"], accuracy=0.85 if name == "kd" else 0.84)
            change(inputs.model(f"{name}-s{seed}") / "metrics.json", seconds=seconds, iterations=int(80 * budget))


def test_at_equal_wall_clock_a_row_is_compared_with_the_twin_that_trained_just_as_long(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_longer_training(inputs, monkeypatch)
    comparison = inputs.compare(["none", "none_4x", "none_2x", "kd"], [0, 1])
    kd = row_of(comparison, "kd")
    assert (kd.reference, kd.equal_time_reference) == ("none", "none_2x")
    pairs = [inputs.score(f"kd-s{seed}", "cnn") - inputs.score(f"none_2x-s{seed}", "cnn") for seed in (0, 1)]
    assert kd.equal_time_gain.per_seed == pytest.approx(pairs)
    assert (kd.gain.verdict, kd.equal_time_gain.verdict) == ("gains", "not shown")
    assert kd.step_seconds == pytest.approx(150 / 80)
    assert comparison.warnings == ()
    markdown, page, _ = said(inputs)
    line = next(line for line in markdown.split("## Equal training time")[1].splitlines() if line.startswith("| kd"))
    assert "| kd | cnn | 2.5 min | 1875 | none_2x | 2.5 min | " in line and "**" not in line
    assert ">none_2x</td>" in page.split("<h2>Equal training time</h2>")[1]


def test_a_row_that_trained_longer_than_any_twin_says_so(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    with_longer_training(inputs, monkeypatch)
    kd = row_of(inputs.compare(["none", "kd"], [0, 1]), "kd")
    assert kd.gain is not None and kd.equal_time_reference is None and kd.equal_time_gain is None
    assert all("none trained as long" in text for text in said(inputs)[:2])


def test_what_a_busy_machine_adds_to_the_clock_is_not_training_time(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_longer_training(inputs, monkeypatch)
    run = ["none", "none_4x", "none_2x", "kd"]
    for name in run:  # each worked as long as before, and waited for others three times as long
        for seed in (0, 1):
            path = inputs.model(f"{name}-s{seed}") / "metrics.json"
            worked = json.loads(path.read_text())["seconds"]
            change(path, cpu_seconds=worked, seconds=worked * (4 if name == "kd" else 1))
    change(inputs.model("teacher") / "metrics.json", cpu_seconds=75.0)
    comparison = inputs.compare(run, [0, 1])
    kd = row_of(comparison, "kd")
    assert comparison.protocol.clock == "CPU" and kd.equal_time_reference == "none_2x"
    assert (kd.busy_seconds, kd.training_seconds, kd.step_seconds) == (150, 600, pytest.approx(150 / 80))
    markdown, page, _ = said(inputs)
    assert "CPU time of training" in markdown and "| kd | cnn | 2.5 min | 1875 | none_2x | 2.5 min | " in markdown
    assert '2.5 min<span class="small">10 min wall</span>' in page


def test_the_page_says_from_which_data_and_commit_it_is(inputs: Inputs) -> None:
    inputs.compare(["none", "kd"], [0], data_md5="0123456789abcdef.dir", git_commit="fedcba9876543210")
    assert (inputs.results()["protocol"]["data_md5"], inputs.results()["protocol"]["git_commit"][:6]) == (
        "0123456789abcdef.dir",
        "fedcba",
    )
    page = (inputs.report / "report.html").read_text()
    assert "data version&nbsp;<code>0123456789ab</code>" in page and "commit&nbsp;<code>fedcba987654</code>" in page


def test_the_gain_is_shown_class_by_class_where_there_is_any(compared: tuple[Inputs, Comparison]) -> None:
    inputs, comparison = compared
    kd = row_of(comparison, "kd")
    assert page.best_distilled(comparison) == kd
    shown = (inputs.report / "report.html").read_text().split('class="bars"')[1].split("</dl>")[0]
    assert all(
        f"</span>{100 * gain:+.1f}</dd>" in re.sub(r"\s*\n\s*", "", shown) for gain in kd.gain.per_class.values()
    )
    alike = replace(kd, gain=replace(kd.gain, per_class=dict.fromkeys(kd.gain.per_class, 0.0)))
    assert page._largest(alike) == []


def test_two_validations_are_no_curve_and_the_page_says_so(inputs: Inputs) -> None:
    inputs.compare(["none", "kd"], [0])
    page = (inputs.report / "report.html").read_text()
    assert "cnn: validation mIoU, %" in page and "No curve of the validation" not in page
    for name in ("none", "kd"):
        rows = "".join(f"{step},1,{1 / step},{0.5 if step > 20 else ''}\n" for step in (10, 20, 40, 80))
        (inputs.model(f"{name}-s0") / "curves/cnn.csv").write_text(
            f"step,train/loss/total,train/loss/ce,val/miou\n{rows}"
        )
    inputs.compare(["none", "kd"], [0])
    page = (inputs.report / "report.html").read_text()
    assert "cnn: cross-entropy of training batches" in page and "cnn: validation mIoU, %" not in page
    assert "No curve of the validation: there were 2 (validate_every)." in page


def test_optimisers_of_their_own_are_said_once(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = {**CNN, "optimizer": {"lr": 0.1}}
    monkeypatch.setitem(EXPERIMENTS, "none", {"students": {"cnn": tuned}, "methods": []})
    for seed in (0, 1):
        inputs.write_job("none", seed, ["cnn"])
    comparison = inputs.compare(["none", "kd", "dml"], [0, 1])
    sentence = "Each has optimiser settings of its own: kd (cnn) and none; dml (cnn) and none."
    assert [warning for warning in comparison.warnings if "optimiser" in warning] == [sentence]


def test_unequal_budgets_are_said(inputs: Inputs) -> None:
    path = inputs.model("kd-s0") / "metrics.json"
    path.write_text(path.read_text().replace('"iterations": 80', '"iterations": 160'))
    comparison = inputs.compare(["none", "kd"], [0, 1])
    assert comparison.protocol.iterations == (80, 160)
    assert any("budgets differ, so that" in warning for warning in comparison.warnings)
    assert "budgets differ" in (inputs.report / "report.html").read_text()


def said(inputs: Inputs) -> list[str]:
    """Whatever a person may read of a comparison."""
    page = html.unescape((inputs.report / "report.html").read_text())
    return [(inputs.report / "report.md").read_text(), page, shown_table(inputs.results(), width=300)]


def test_an_experiment_of_which_one_seed_diverged_has_the_mean_of_the_others_and_says_so(inputs: Inputs) -> None:
    inputs.write_diverged("kd", 1)
    comparison = inputs.compare(["none", "kd"], [0, 1])
    kd = row_of(comparison, "kd")
    assert kd.test_miou.mean == pytest.approx(inputs.score("kd-s0", "cnn")) and kd.test_miou.std is None
    pair = inputs.score("kd-s0", "cnn") - inputs.score("none-s0", "cnn")
    assert kd.gain.seeds == (0,) and kd.gain.per_seed == pytest.approx([pair]), "paired on the seed that both have"
    for text in said(inputs):
        assert "1 of 2 seeds diverged (seed 1 at iteration 120: cnn: kd.kl is not finite)" in text
    assert comparison.warnings[0].startswith("kd: 1 of 2 seeds diverged")
    assert comparison.warnings[1] == "Compared on the seeds that both have: kd (cnn) and none: 0."
    assert json.loads((inputs.root / "reports/metrics.json").read_text())["kd"]["cnn"]["diverged"] == 1
    assert comparison.best == ("kd", "cnn")


def test_an_experiment_that_diverged_is_a_row_without_scores_and_never_the_best(inputs: Inputs) -> None:
    for seed in (0, 1):
        inputs.write_diverged("kd", seed)
    comparison = inputs.compare(["none", "kd", "dml"], [0, 1])
    kd = row_of(comparison, "kd")
    assert (kd.seeds, kd.test_miou, kd.val_miou, kd.gain, kd.params) == ((), None, None, None, None)
    assert comparison.best == ("dml", "cnn")
    for text in said(inputs):
        assert "diverged at iteration 120: cnn: kd.kl is not finite" in text
    metrics = (inputs.root / "reports/metrics.json").read_text()
    assert json.loads(metrics)["kd"] == {"cnn": {"diverged": 2}} and "NaN" not in metrics
    assert compare.highlights({"report": inputs.report}).scores.keys() == {
        "teacher/test/miou", "none.cnn/test/miou", "dml.cnn/test/miou", "dml.vit/test/miou",
    }  # fmt: skip


def test_seeds_that_diverged_for_different_reasons_are_told_apart(inputs: Inputs) -> None:
    for seed in (0, 1):
        inputs.write_diverged("kd", seed, iteration=120 + seed)
    inputs.compare(["none", "kd"], [0, 1])
    reason = "cnn: kd.kl is not finite"
    for text in said(inputs):
        assert f"every seed diverged (seed 0 at iteration 120: {reason}; seed 1 at iteration 121: {reason})" in text


def test_a_row_whose_undistilled_twin_diverged_has_no_reference(inputs: Inputs) -> None:
    for seed in (0, 1):
        inputs.write_diverged("none", seed)
    comparison = inputs.compare(["none", "kd"], [0, 1])
    assert row_of(comparison, "kd").gain is None
    assert (
        "kd (cnn) and its undistilled reference, none, have nothing to compare: the reference diverged."
        in comparison.warnings
    )
    assert all("no reference" in text for text in said(inputs))


def test_rows_whose_seeds_do_not_meet_are_not_paired(inputs: Inputs) -> None:
    inputs.write_diverged("none", 0)
    inputs.write_diverged("kd", 1)
    comparison = inputs.compare(["none", "kd"], [0, 1])
    assert row_of(comparison, "kd").gain is None
    assert "kd (cnn) and its undistilled reference, none, have no seed in common." in comparison.warnings


def test_jobs_that_all_diverged_give_no_comparison(inputs: Inputs) -> None:
    inputs.write_diverged("kd", 0)
    with pytest.raises(UserError, match=r"every job diverged, .*; cnn: kd\.kl is not finite"):
        inputs.compare(["kd"], [0])


def test_a_job_without_evaluation_that_did_not_diverge_is_named(inputs: Inputs) -> None:
    shutil.rmtree(inputs.evaluation("kd-s0"))
    with pytest.raises(UserError, match=r"students/s0/kd: not evaluated; run the stage 'evaluate' again"):
        inputs.compare(["kd"], [0])


def test_results_name_the_identity_code_and_weights_of_every_network(compared: tuple[Inputs, Comparison]) -> None:
    inputs, comparison = compared
    kd = row_of(comparison, "kd")
    assert [(seed.identity, seed.code) for seed in kd.seeds] == [
        ("kd-s0 identity", "code of all"),
        ("kd-s1 identity", "code of all"),
    ]
    assert kd.seeds[1].weights_sha256 == "weights of kd-s1/cnn"
    assert comparison.protocol.teacher_sha256 == "weights of teacher/teacher"
    for text in said(inputs)[:2]:
        assert f"data {comparison.protocol.data_content}, teacher weights , code code of " in text
        assert "kd (cnn) kd-s0 id kd-s1 id" in text


def test_plots_for_dvc_hold_every_measured_step_and_class(compared: tuple[Inputs, Comparison]) -> None:
    inputs, _ = compared
    curves = {path.stem: list(csv.DictReader(path.open())) for path in (inputs.report / "plots/curves").iterdir()}
    assert len(curves) == 1 + 2 * 5 and {"teacher", "kd.cnn-s1"} <= set(curves)
    assert all(list(rows[0]) == ["step", "val_miou"] and len(rows) == 3 for rows in curves.values())
    with (inputs.report / "plots/per_class_iou.csv").open() as file:
        per_class = list(csv.DictReader(file))
    assert len(per_class) == len(CLASSES) * 6
    for name in ("confusion", "scatter", "curves", "gains"):
        with Image.open(inputs.report / "plots" / f"{name}.png") as picture:
            assert min(picture.size) > 100


def test_results_can_be_read_back(compared: tuple[Inputs, Comparison]) -> None:
    inputs, comparison = compared
    assert json.loads(json.dumps(to_dict(comparison))) == inputs.results()


def shown_table(results: dict[str, Any], width: int = 140) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(compare.table(parse(Comparison, results, "results.json")))
    return console.export_text()


def test_terminal_table_has_the_teacher_first_and_all_students(compared: tuple[Inputs, Comparison]) -> None:
    inputs, comparison = compared
    lines = shown_table(inputs.results()).splitlines()
    names = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert names == ["teacher", "none", "none_vit", "kd", "dml", "dml"]
    kd = next(line for line in lines if line.startswith("│ kd"))
    gain = row_of(comparison, "kd").gain
    assert f"{100 * gain.mean:+.2f} [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]" in kd
    assert "0.90" in kd
    assert "gains or loses where its interval excludes zero" in " ".join(shown_table(inputs.results()).split())


def test_flip_multi_scale_and_boundary_iou_are_columns_of_their_own(inputs: Inputs) -> None:
    for seed in (0, 1):
        path = inputs.evaluation(f"kd-s{seed}") / "evaluation.json"
        content = json.loads(path.read_text())
        content["models"]["cnn"]["flip"] = {"test/miou": 0.9, "test/pixel_accuracy": 0.95}
        content["models"]["cnn"]["boundary"] = {"test/miou": 0.7}
        path.write_text(json.dumps(content))
    comparison = inputs.compare(["none", "kd"], [0, 1])
    assert row_of(comparison, "kd").views["flip"].mean == pytest.approx(0.9)
    assert row_of(comparison, "kd").views["boundary"].mean == pytest.approx(0.7)
    assert row_of(comparison, "none").views == {}
    page = (inputs.report / "report.html").read_text()
    assert ">with flip</button></th>" in page and 'data-label="with flip"' in page and "multi-scale" not in page
    assert ">boundary IoU</button></th>" in page


def on_a_second_set(inputs: Inputs, *jobs: str) -> None:
    """As if the first six images were a second test set, with two of the classes."""
    for job in jobs:
        folder = inputs.evaluation(job)
        report = json.loads((folder / "evaluation.json").read_text())
        report["out_of_domain"] = {"content": "abc", "classes": ["sky", "car"], "sequences": [None] * 6}
        (folder / "evaluation.json").write_text(json.dumps(report))
        for name in report["models"]:
            with np.load(folder / f"{name}.npz") as file:
                arrays = dict(file)
            np.savez_compressed(folder / f"{name}.npz", **arrays, out_of_domain=arrays["counts"][:6, :, [0, 2]])


def test_the_second_test_set_is_a_column_with_intervals_of_its_own(inputs: Inputs) -> None:
    jobs = [f"{experiment}-s{seed}" for experiment in ("none", "kd") for seed in (0, 1)]
    without = inputs.compare(["none", "kd"], [0, 1])
    assert "ut of domain" not in (inputs.report / "report.html").read_text() + (inputs.report / "report.md").read_text()
    on_a_second_set(inputs, "teacher", *jobs)
    comparison = inputs.compare(["none", "kd"], [0, 1])
    scores = {}
    for job in jobs:
        student, truth = inputs.predictions[f"{job}/cnn"][:6], inputs.truth[:6]
        valid = truth != 255
        scores[job] = jaccard_score(truth[valid], student[valid], average="macro", labels=[0, 2])
    expected = {name: np.mean([scores[f"{name}-s{seed}"] for seed in (0, 1)]) for name in ("none", "kd")}
    for row in comparison.rows:
        assert row.out_of_domain.mean == pytest.approx(expected[row.experiment])
        assert row.out_of_domain.low < row.out_of_domain.mean < row.out_of_domain.high
    assert comparison.teacher.out_of_domain.low < comparison.teacher.out_of_domain.mean
    kd = row_of(comparison, "kd")
    assert kd.out_of_domain_gain.mean == pytest.approx(expected["kd"] - expected["none"])
    assert kd.out_of_domain_gain.low > 0 and row_of(comparison, "none").out_of_domain_gain is None
    assert comparison.protocol.out_of_domain.content == "abc"
    bare = replace(kd, out_of_domain=None, out_of_domain_gain=None)
    assert (bare, comparison.best) == (row_of(without, "kd"), without.best), "nothing else depends on it"
    assert "## Out of domain" in (inputs.report / "report.md").read_text()
    page = (inputs.report / "report.html").read_text()
    assert page.count('data-label="out of domain, %"') == 3 and "by which nothing is" in page
    metrics = json.loads((inputs.root / "reports/metrics.json").read_text())
    assert metrics["kd"]["cnn"]["out_of_domain_miou"] == round(kd.out_of_domain.mean, 4)


def test_networks_that_met_different_second_sets_are_not_compared(inputs: Inputs) -> None:
    on_a_second_set(inputs, "teacher", "none-s0")
    with pytest.raises(UserError, match="not all networks were scored on the same second test set"):
        inputs.compare(["none", "kd"], [0])


def test_a_class_absent_from_truth_and_predictions_is_null(inputs: Inputs) -> None:
    inputs.truth[inputs.truth == 3] = 255
    inputs.write_job("teacher", None, ["teacher"])
    for job in ("none", "kd"):
        inputs.write_job(job, 0, ["cnn"])
    comparison = inputs.compare(["none", "kd"], [0])
    assert row_of(comparison, "kd").per_class_iou["bicyclist"] is None
    assert row_of(comparison, "kd").gain.per_class["bicyclist"] is None
    assert "1 of them have no pixel in the test split (bicyclist)" in (inputs.report / "report.md").read_text()


def test_tracker_gets_the_numbers_and_the_report(inputs: Inputs) -> None:
    path = inputs.root / "log.jsonl"
    inputs.compare(["none", "kd"], [0, 1], tracker=JsonLinesTracker(path))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert set(records[0]["values"]) >= {"compare/teacher/test_miou", "compare/kd.cnn/difference"}
    assert records[1]["kind"] == "artifact"


def test_the_pipeline_run_is_described_by_the_table_and_has_the_best_students_numbers(inputs: Inputs) -> None:
    path = inputs.root / "log.jsonl"
    comparison = inputs.compare(["none", "kd"], [0, 1], tracker=JsonLinesTracker(path))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    of_parent = {record["kind"]: record["values"] for record in records if record.get("run") == "pipeline"}
    best = row_of(comparison, "kd")
    assert of_parent["metrics"]["test/miou"] == pytest.approx(best.test_miou.mean)
    assert of_parent["metrics"]["compare/gain_low"] == pytest.approx(best.gain.low)
    assert of_parent["params"]["best_student"] == "kd (cnn)" and of_parent["params"]["seeds"] == "0, 1"
    text = of_parent["tags"]["description"]
    assert "| experiment | student | test mIoU |" in text and "| kd | cnn |" in text
    assert "## " not in text, "the protocol stands on the page"


def test_calibration_latency_and_protocol_of_the_evaluation_reach_the_results(
    compared: tuple[Inputs, Comparison],
) -> None:
    _, comparison = compared
    row = row_of(comparison, "kd")
    assert row.ece.mean == pytest.approx(0.05) and [seed.ece for seed in row.seeds] == [0.05, 0.05]
    assert row.latency_median_ms == pytest.approx(PARAMS["cnn"] / 0.9e5)
    assert row.latency_ms < row.latency_median_ms
    assert comparison.protocol.inference.input_scale == 0.5


@pytest.mark.parametrize("missing", ["evaluation.json", "cnn.npz", "overlays/cnn/scene-000.png"])
def test_a_missing_file_is_named_and_the_old_report_stays(inputs: Inputs, missing: str) -> None:
    inputs.compare(["none", "kd"], [0, 1])
    before = (inputs.report / "results.json").read_bytes()
    path = inputs.evaluation("kd-s0") / missing
    path.unlink()
    with pytest.raises(UserError, match=re.escape(str(path))):
        inputs.compare(["none", "kd"], [0, 1])
    assert (inputs.report / "results.json").read_bytes() == before


def test_a_student_that_was_not_evaluated_is_named(inputs: Inputs) -> None:
    inputs.write_job("dml", 0, ["cnn"])
    with pytest.raises(UserError, match=r"s0/dml/metrics\.json: nothing about 'vit'; it holds cnn"):
        inputs.compare(["dml"], [0])


def test_counts_of_other_images_cannot_be_compared(inputs: Inputs) -> None:
    inputs.ids[3] = "scene-999"
    inputs.write_job("kd", 1, ["cnn"])
    with pytest.raises(UserError, match=r"s1/kd/cnn\.npz: evaluated on other test images"):
        inputs.compare(["none", "kd"], [0, 1])


def test_a_folder_that_mixes_two_evaluations_is_refused(inputs: Inputs) -> None:
    path = inputs.evaluation("kd-s1") / "evaluation.json"
    content = json.loads(path.read_text())
    content["models"]["cnn"]["test/miou"] += 0.01
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="mixes two evaluations"):
        inputs.compare(["none", "kd"], [0, 1])


def change(path: Path, **values: Any) -> None:
    """Gives keys of a JSON file other values; None takes a key out."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("file", "values", "sentence"),
    [
        ("metrics.json", {"settings": None}, "no 'settings' in it; run the stage that trains it again"),
        ("metrics.json", {"config": None}, "no 'config' in it"),
        ("metrics.json", {"students": None}, "no 'students' in it"),
        ("metrics.json", {"settings": EXPERIMENTS["none"]}, "'kd' was trained with other settings than .*s0/kd"),
        ("metrics.json", {"data_content": "other"}, "trained on other data than is prepared"),
        ("metrics.json", {"teacher_sha256": "other"}, "learnt from another teacher than the one in"),
        ("cnn.json", {"sha256": "other"}, "not of the weights in .*s1/kd/cnn.safetensors; run the stage 'evaluate'"),
    ],
)
def test_students_of_other_settings_data_teacher_or_weights_are_not_compared_without_a_word(
    inputs: Inputs, file: str, values: dict[str, Any], sentence: str
) -> None:
    change(inputs.model("kd-s1") / file, **values)
    with pytest.raises(UserError, match=sentence):
        inputs.compare(["kd"], [0, 1])


def test_an_evaluation_of_other_classes_is_refused_with_both_lists(inputs: Inputs) -> None:
    path = inputs.evaluation("kd-s1") / "evaluation.json"
    change(path, classes=list(CLASSES)[::-1])
    with pytest.raises(UserError, match=r"in another order: bicyclist, car, .*; the data set has sky, road & rail"):
        inputs.compare(["kd"], [0, 1])


def test_what_changed_after_its_stage_ended_is_not_compared(inputs: Inputs) -> None:
    inputs.seal()
    change(inputs.model("kd-s1") / "metrics.json", seconds=76.0)
    with pytest.raises(UserError, match=r"s1/kd/metrics\.json: damaged: not the content that"):
        inputs.compare(["kd"], [0, 1], seals=False)


def test_pickled_counts_are_never_loaded(inputs: Inputs) -> None:
    path = inputs.evaluation("kd-s1") / "cnn.npz"
    content = dict(np.load(path))
    content["ids"] = np.array(inputs.ids, dtype=object)
    np.savez(path, **content)
    with pytest.raises(UserError, match=r"cnn\.npz: not the counts that this version of evaluate writes"):
        inputs.compare(["none", "kd"], [0, 1])


def test_an_experiment_may_not_be_called_teacher(inputs: Inputs) -> None:
    with pytest.raises(UserError, match="the name 'teacher' is taken"):
        inputs.compare(["teacher"], [0])


def test_module_is_cheap_to_import() -> None:
    import subprocess

    heavy = "[name for name in ('torch', 'pyarrow', 'matplotlib', 'numpy') if name in sys.modules]"
    code = f"import sys, segdistill.stages.compare; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
