"""A cohort's folders: what is there already stays, what the plan no longer has goes, what diverged says so."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from tiny_params import tiny

from segdistill.config import parse, read_yaml, to_dict
from segdistill.data.shards import ShardDataset, read_dataset_info
from segdistill.engine.tracker import Tracker
from segdistill.files import file_hash
from segdistill.plan import Job, cohort_plan, teacher_plan
from segdistill.report.highlights import Highlights
from segdistill.report.inputs import read_networks
from segdistill.stages import compare, distill, evaluate, train_teacher
from segdistill.stages._cohort import job_folders
from segdistill.stages.plan import as_text

ROOT = Path(__file__).resolve().parents[2]


class Names(Tracker):
    """Keeps the names of the runs, what they are tagged with, and how they end."""

    def __init__(self) -> None:
        self.runs: dict[str, Names] = {}
        self.told: dict[str, str] = {}
        self.status = ""

    def child(self, name: str, *, ended: bool = False) -> "Names":
        return self.runs.setdefault(name, Names())

    def tags(self, values: Any) -> None:
        self.told |= values

    def close(self, status: str = "FINISHED") -> None:
        self.status = status


@pytest.fixture
def params() -> dict[str, Any]:
    return copy.deepcopy(tiny(read_yaml(ROOT / "params.yaml")))


@pytest.fixture(scope="module")
def teacher(tiny_prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    (folder / "plan.json").write_text(as_text(teacher_plan(tiny(read_yaml(ROOT / "params.yaml"))["train_teacher"])))
    places = {"plan": folder / "plan.json", "prepared": tiny_prepared, "teacher": folder / "teacher"}
    train_teacher.run(**places, tracker=Tracker())
    again = Names()
    train_teacher.run(**places, tracker=again)
    assert not again.runs, "it is there with the same identity"
    return folder / "teacher"


@pytest.fixture
def train(params: dict[str, Any], teacher: Path, tiny_prepared: Path, tmp_path: Path) -> Callable[..., Names]:
    """Runs the stage with some of the experiments of ``params``, into the folder ``s0``."""

    def run(*experiments: str) -> Names:
        jobs, tracker = [Job(name, 0) for name in experiments], Names()
        (tmp_path / "s0.json").write_text(as_text(cohort_plan(params["distill"], params["experiments"], jobs)))
        distill.run(plan=tmp_path / "s0.json", prepared=tiny_prepared, teacher=teacher, students=tmp_path / "s0",
                    tracker=tracker)  # fmt: skip
        return tracker

    return run


def content(folder: Path) -> dict[str, str]:
    """The hashes of all files, but for those that hold the time it took."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): file_hash(path) for path in files
            if path.name not in ("metrics.json", "evaluation.json", "checksums.json")}  # fmt: skip


def test_one_changed_experiment_trains_one_student(
    params: dict[str, Any], train: Callable[..., Names], tmp_path: Path
) -> None:
    assert set(train("none", "kd").runs) == {"none-s0", "kd-s0"}
    before = content(tmp_path / "s0/none")
    changed_at = (tmp_path / "s0/none").stat().st_ino
    assert not train("none", "kd").runs, "nothing has changed"
    params["experiments"]["kd"]["methods"] = [{"name": "kd", "weight": 2.0}]
    assert set(train("none", "kd").runs) == {"kd-s0"}
    assert content(tmp_path / "s0/none") == before and (tmp_path / "s0/none").stat().st_ino == changed_at
    assert not (tmp_path / "s0.work").exists()


def test_parts_of_a_cohort_in_processes_of_their_own_give_what_one_process_gives(
    params: dict[str, Any], train: Callable[..., Names], tiny_prepared: Path, tmp_path: Path
) -> None:
    train("none", "kd")
    evaluated(params, tiny_prepared, tmp_path / "s0", tmp_path / "measured")
    trained, measured = content(tmp_path / "s0"), content(tmp_path / "measured")
    for name in ("s0", "measured"):
        (tmp_path / name).rename(tmp_path / f"former-{name}")
    torch.set_num_threads(2)
    assert not train("none", "kd").runs, "the runs are of the processes that train"
    assert content(tmp_path / "s0") == trained
    assert not (tmp_path / "s0.work").exists()
    assert not evaluated(params, tiny_prepared, tmp_path / "s0", tmp_path / "measured").runs, "as above"
    assert content(tmp_path / "measured") == measured and "kd/cnn.npz" in measured
    for experiment in ("none", "kd"):
        reports = [tmp_path / folder / experiment / "evaluation.json" for folder in ("measured", "former-measured")]
        now, before = (json.loads(report.read_text())["models"]["cnn"] for report in reports)
        assert now["latency_ms"] <= now["latency_median_ms"]
        assert {key: now[key] for key in ("test/miou", "test/ece", "macs")}.items() <= before.items()


def test_how_a_training_is_watched_is_no_part_of_its_identity(
    params: dict[str, Any], train: Callable[..., Names]
) -> None:
    train("none")
    params["distill"]["train"] |= {"log_every": 7, "workers": 1}
    assert not train("none").runs


def test_a_damaged_student_is_trained_again(train: Callable[..., Names], tmp_path: Path) -> None:
    train("none", "kd")
    weights = tmp_path / "s0/kd/cnn.safetensors"
    expected = weights.read_bytes()
    weights.write_bytes(expected[:-1] + bytes([expected[-1] ^ 1]))
    assert set(train("none", "kd").runs) == {"kd-s0"}
    assert weights.read_bytes() == expected


def test_what_the_plan_no_longer_has_goes(train: Callable[..., Names], tmp_path: Path) -> None:
    train("none", "kd")
    train("none")
    assert job_folders(tmp_path / "s0", "") == {Job("none", 0): tmp_path / "s0/none"}
    assert not (tmp_path / "s0/kd").exists()


def test_a_job_that_diverges_says_so_and_leaves_the_others_alone(
    params: dict[str, Any], train: Callable[..., Names], tiny_prepared: Path, tmp_path: Path
) -> None:
    train("none")
    alone = content(tmp_path / "s0/none")
    params["experiments"]["wild"] = copy.deepcopy(params["experiments"]["kd"])
    params["experiments"]["wild"]["methods"] = [{"name": "kd", "weight": 1e9}]
    params["experiments"]["wild"]["students"]["cnn"]["optimizer"] = {"name": "sgd", "lr": 100.0}
    params["distill"]["train"]["iterations"] = 12
    tracker = train("none", "wild")
    assert (tracker.runs["none-s0"].status, tracker.runs["wild-s0"].status) == ("FINISHED", "FAILED")
    record = json.loads((tmp_path / "s0/wild/diverged.json").read_text())
    assert (record["experiment"], record["seed"], record["students"]) == ("wild", 0, ["cnn"])
    assert 0 < record["iteration"] <= 12 and "not finite" in record["reason"]
    assert tracker.runs["wild-s0"].told["diverged"] == f"at iteration {record['iteration']}: {record['reason']}"
    assert not train("none", "wild").runs, "it would only diverge again"
    (tmp_path / "s0").rename(tmp_path / "both")
    train("none")
    assert content(tmp_path / "s0/none") == content(tmp_path / "both/none") != alone
    assert distill.highlights({"students": tmp_path / "both"}).scores.keys() == {"val/miou", "val/pixel_accuracy"}
    measured = evaluated(params, tiny_prepared, tmp_path / "both", tmp_path / "measured")
    assert set(measured.runs) == {"none-s0"} and not (tmp_path / "measured/wild").exists()


def test_runs_are_tagged_with_what_they_come_from_when_they_begin(train: Callable[..., Names], tmp_path: Path) -> None:
    tags = train("kd").runs["kd-s0"].told
    known = json.loads((tmp_path / "s0/kd/metrics.json").read_text())
    assert {key: known[key] for key in ("identity", "data_content", "teacher_sha256", "code")}.items() <= tags.items()
    assert (tags["experiment"], tags["student"], tags["seed"], tags["methods"]) == ("kd", "cnn", "0", "kd")


def evaluated(params: dict[str, Any], prepared: Path, students: Path, evaluations: Path) -> Names:
    tracker = Names()
    config = parse(evaluate.Config, params["evaluate"], "evaluate")
    evaluate.run(config, prepared=prepared, students=students, evaluations=evaluations, tracker=tracker, device="cpu")
    return tracker


def test_an_evaluation_of_the_same_weights_by_the_same_settings_stays(
    params: dict[str, Any], train: Callable[..., Names], tiny_prepared: Path, tmp_path: Path
) -> None:
    train("none", "kd")
    places = (tiny_prepared, tmp_path / "s0", tmp_path / "measured")
    assert set(evaluated(params, *places).runs) == {"none-s0", "kd-s0"}
    assert not evaluated(params, *places).runs
    params["experiments"]["kd"]["methods"] = [{"name": "kd", "weight": 2.0}]
    train("none", "kd")
    assert set(evaluated(params, *places).runs) == {"kd-s0"}
    params["evaluate"]["overlays"] = 2
    assert set(evaluated(params, *places).runs) == {"none-s0", "kd-s0"}
    shown: Highlights = evaluate.highlights({"evaluations": tmp_path / "measured"})
    assert set(shown.scores) >= {"none.cnn/test/miou", "kd.cnn/test/miou"} and shown.confusion
    train("none")
    evaluated(params, *places)
    assert not (tmp_path / "measured/kd").exists()


def test_a_second_test_set_is_scored_beside_and_the_evaluation_is_made_again_where_it_changes(
    params: dict[str, Any], train: Callable[..., Names], tiny_prepared: Path, tiny_data: Path, tmp_path: Path
) -> None:
    train("none")
    places = (tiny_prepared, tmp_path / "s0", tmp_path / "measured")
    evaluated(params, *places)
    report = tmp_path / "measured/none/evaluation.json"
    without = json.loads(report.read_text())
    shutil.copytree(tiny_data, tmp_path / "second")
    params["evaluate"]["out_of_domain"] = {"data": str(tmp_path / "second"), "layout": "folder"}
    assert evaluated(params, *places).runs
    result = json.loads(report.read_text())
    network = result["models"]["cnn"]
    assert network["out_of_domain"] == {key: network[key] for key in ("test/miou", "test/pixel_accuracy")}
    assert {key: network[key] for key in ("test/miou", "weights_sha256")}.items() <= without["models"]["cnn"].items()
    assert "out_of_domain" not in without["models"]["cnn"] and "out_of_domain" not in without
    assert not evaluated(params, *places).runs
    image = next((tmp_path / "second/images/test").iterdir())
    Image.new("RGB", Image.open(image).size).save(image)
    assert evaluated(params, *places).runs
    changed = json.loads(report.read_text())
    assert changed["out_of_domain"]["content"] != result["out_of_domain"]["content"]
    classes = [entry.name for entry in read_dataset_info(tiny_prepared).classes]
    (network,) = read_networks(tmp_path / "s0/none", report.parent, "none", 0, ["cnn"], classes)
    assert network.elsewhere is not None and network.elsewhere.counts.shape == (4, 3, len(network.elsewhere.classes))
    test_set = ShardDataset(tiny_prepared, "test")
    (mask,) = compare.predicted_masks(network, tmp_path / "s0/none", classes, test_set, [0])
    assert np.array_equal(mask, np.array(Image.open(network.overlays / f"{test_set.sample_id(0)}.png")))


def test_a_budget_in_seconds_is_each_jobs_own(
    params: dict[str, Any], train: Callable[..., Names], tmp_path: Path
) -> None:
    params["distill"]["train"] |= {"iterations": None, "seconds": 0.2}
    assert set(train("none", "kd").runs) == {"none-s0", "kd-s0"}
    for name in ("none", "kd"):
        assert json.loads((tmp_path / f"s0/{name}/metrics.json").read_text())["seconds"] >= 0.2


def test_a_plan_says_all_that_decides_a_job(params: dict[str, Any]) -> None:
    plan = to_dict(cohort_plan(params["distill"], params["experiments"], [Job("kd", 0)]))
    (job,) = plan["jobs"]
    assert plan["protocol"]["train"]["iterations"] == 2
    assert job["settings"]["methods"][0]["temperature"] == 1.0, "defaults are spelled out"
    assert len(job["code"]) == 16
    assert job["settings"]["budget"] == 1.0, "how long it trains is part of its identity"


def test_the_scores_of_every_test_image_lie_beside_those_of_the_split(
    params: dict[str, Any], train: Callable[..., Names], tiny_prepared: Path, tmp_path: Path
) -> None:
    train("none")
    evaluated(params, tiny_prepared, tmp_path / "s0", tmp_path / "measured")
    table = pyarrow.parquet.read_table(tmp_path / "measured/none/per_image.parquet")
    test_set, classes = ShardDataset(tiny_prepared, "test"), read_dataset_info(tiny_prepared).classes
    assert table["id"].to_pylist() == [test_set.sample_id(index) for index in range(len(test_set))]
    assert set(table["network"].to_pylist()) == {"cnn"}
    with np.load(tmp_path / "measured/none/cnn.npz") as counted:
        counts = counted["counts"]
    image = table.slice(1, 1).to_pylist()[0]
    ious = [image[f"iou/{entry.name}"] for entry in classes]
    unions = counts[1, 1] + counts[1, 2] - counts[1, 0]
    assert ious == [right / union if union else None for right, union in zip(counts[1, 0], unions, strict=True)]
    assert image["miou"] == pytest.approx(np.mean([iou for iou in ious if iou is not None]))
    assert image["pixel_accuracy"] == counts[1, 0].sum() / counts[1, 1].sum()
