"""From a quarter of the labels to scores: methods learn from the other images too, a student without one does not."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from test_cohort import Names, content, evaluated
from tiny_params import tiny

from segdistill.config import parse, read_yaml
from segdistill.data.shards import read_dataset_info
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.plan import Job, cohort_plan, teacher_plan
from segdistill.stages import distill, prepare, train_teacher
from segdistill.stages.plan import as_text

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ("none", "none_longer", "kd", "pseudo", "pair")


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    whole = read_yaml(ROOT / "params.yaml")
    small = copy.deepcopy(tiny(whole))
    small["prepare"] |= {"labelled": 0.25, "shard_samples": 4}
    small["distill"]["train"]["unlabelled"] = 2
    # Every loss against the labels, none of which may mind images that have none.
    small["train_teacher"]["train"]["loss"] = {
        "class_weights": {"name": "median_frequency"}, "ohem": {"threshold": 0.7, "min_kept": 100},
    }  # fmt: skip
    small["distill"]["train"]["loss"] = {"class_weights": {"name": "effective_number"}, "dice": 0.5, "lovasz": 0.5}
    student = small["experiments"]["none"]["students"]["cnn"]
    small["experiments"] |= {
        "none_longer": {"students": {"cnn": student}, "methods": [], "budget": 1.5},
        "pseudo": {"students": {"cnn": student}, "methods": [{"name": "pseudo", "threshold": 0.1}]},
        "pair": {
            "students": {"one": student, "other": whole["experiments"]["none_vit"]["students"]["vit"]},
            "methods": [{"name": "kdcl"}], "pseudo_labels": 0.0,
        },
    }  # fmt: skip
    return small


@pytest.fixture(scope="module")
def made(params: dict[str, Any], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the prepared data and a teacher, which has seen the labelled quarter alone."""
    folder = tmp_path_factory.mktemp("few_labels")
    (folder / "report").mkdir()
    (folder / "report/summary.json").write_text('{"success": true, "layout": "folder"}')
    prepare.run(
        parse(prepare.Config, params["prepare"], "prepare"), data=tiny_data, report=folder / "report",
        prepared=folder / "prepared", tracker=Tracker(),
    )  # fmt: skip
    (folder / "teacher.json").write_text(as_text(teacher_plan(params["train_teacher"])))
    train_teacher.run(
        plan=folder / "teacher.json", prepared=folder / "prepared", teacher=folder / "teacher", tracker=Tracker()
    )
    return folder


def train(params: dict[str, Any], made: Path, students: Path) -> Names:
    tracker, plan = Names(), students.with_suffix(".json")
    plan.write_text(
        as_text(cohort_plan(params["distill"], params["experiments"], [Job(name, 0) for name in EXPERIMENTS]))
    )
    distill.run(
        plan=plan, prepared=made / "prepared", teacher=made / "teacher", students=students, tracker=tracker
    )  # fmt: skip
    return tracker


def test_methods_learn_from_images_without_labels_and_the_undistilled_student_stays_what_it_is(
    params: dict[str, Any], made: Path, tmp_path: Path
) -> None:
    assert read_dataset_info(made / "prepared").splits == {"train": 3, "val": 4, "test": 4, "unlabelled": 9}
    train(params, made, tmp_path / "mixed")
    alone = copy.deepcopy(params)
    alone["distill"]["train"]["unlabelled"] = 0
    train(alone, made, tmp_path / "alone")
    same = {
        name: all(
            (tmp_path / "mixed" / path).read_bytes() == (tmp_path / "alone" / path).read_bytes()
            for path in (f"{name}/{weights}.safetensors" for weights in params["experiments"][name]["students"])
        )
        for name in EXPERIMENTS
    }
    assert same == {"none": True, "none_longer": True, "kd": False, "pseudo": False, "pair": False}
    facts = {name: json.loads((tmp_path / "mixed" / name / "metrics.json").read_text()) for name in EXPERIMENTS}
    assert {name: fact["iterations"] for name, fact in facts.items()} == dict.fromkeys(EXPERIMENTS, 2) | {
        "none_longer": 3
    }
    assert len({fact["identity"] for fact in facts.values()}) == len(EXPERIMENTS)
    runs = evaluated(params, made / "prepared", tmp_path / "mixed", tmp_path / "measured").runs
    assert len(runs) == len(EXPERIMENTS) + 1, "a run for each student"


def test_the_same_cohort_again_is_the_same_and_nothing_is_trained_twice(
    params: dict[str, Any], made: Path, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        train(params, made, tmp_path / name)
    assert content(tmp_path / "first") == content(tmp_path / "second")
    assert not train(params, made, tmp_path / "first").runs


def test_images_without_labels_that_the_data_do_not_have_are_named_before_anything_is_trained(
    params: dict[str, Any], made: Path, tiny_prepared: Path, tmp_path: Path
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made/prepared").symlink_to(tiny_prepared)
    (tmp_path / "made/teacher").symlink_to(made / "teacher")
    with pytest.raises(UserError, match=r"^distill\.train\.unlabelled: 2, but .*dataset\.json has no split"):
        train(params, tmp_path / "made", tmp_path / "students")
    assert not [path for path in (tmp_path / "students").iterdir() if path.is_dir()]
