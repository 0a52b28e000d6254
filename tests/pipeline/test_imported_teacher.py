"""A teacher from a Hugging Face folder, from import to a student that learnt from it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from tiny_params import tiny
from versioned import commit_data

from segdistill.__main__ import main
from segdistill.config import parse, read_yaml
from segdistill.data.shards import read_dataset_info
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.files import read_json
from segdistill.plan import Job, TeacherConfig, cohort_plan, experiments, teacher_plan
from segdistill.stages import STAGES, distill, evaluate, evaluate_teacher, train_teacher
from segdistill.stages._networks import check
from segdistill.stages.plan import as_text

ROOT = Path(__file__).resolve().parents[2]


def segformer(folder: Path, names: Sequence[str]) -> None:
    """A tiny one, drawn at random, as transformers saves it and the hub shows it."""
    transformers = pytest.importorskip("transformers")
    labels = dict(enumerate(names))
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=16,
        id2label=labels, label2id={name: index for index, name in labels.items()},
    )  # fmt: skip
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: for-research\ntags: [vision]\n---\n# Streets\n"
    )


@pytest.mark.slow  # every stage, and the student is traced
def test_a_teacher_of_hugging_face_is_named_with_its_licence_by_the_student_that_is_registered(
    tiny_data: Path, tmp_path: Path, database: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("great_expectations")
    repository = commit_data(tmp_path / "repository", tiny_data)
    project = tmp_path / "project"
    segformer(
        project / "teachers/segformer", [item["name"] for item in read_json(tiny_data / "classes.json")["classes"]]
    )
    params = tiny(read_yaml(ROOT / "params.yaml"))
    params["train_teacher"]["import_from"] = "teachers/segformer"
    params["compare"]["min_test_miou"] = 0
    (project / "params.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(params))))
    (project / "mlflow.db").write_bytes(database)
    monkeypatch.chdir(project)
    monkeypatch.setenv("SEGDISTILL_PIPELINE_RUN", "all")
    assert main(["data", "fetch", str(repository), "--out", "data"]) == 0
    for stage in STAGES:
        assert main([stage.name, *(["--seed", "0"] if stage.per_cohort else [])]) == 0, stage.name

    results = read_json(project / "reports/comparison/results.json")
    teacher = read_json(project / "artifacts/teacher/teacher.json")
    assert results["teacher"]["test_miou"]["mean"] is not None and results["teacher"]["params"] == teacher["params"]
    assert "| teacher | " in (project / "reports/comparison/report.md").read_text()
    (version,) = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}").search_model_versions("")
    assert "SegformerForSemanticSegmentation from 'segformer'" in version.description
    assert "licence of the teacher's weights | other, for-research (of 'segformer')" in version.description
    student = read_json(project / "artifacts/students/s0" / version.tags["experiment"] / "metrics.json")
    assert student.get("teacher_sha256", teacher["sha256"]) == teacher["sha256"]


def test_a_segformer_of_hugging_face_teaches_a_student(tiny_prepared: Path, tmp_path: Path) -> None:
    classes = [item.name for item in read_dataset_info(tiny_prepared).classes]
    segformer(tmp_path / "segformer", [*(name.upper() for name in reversed(classes[1:])), "what else"])
    params = tiny(read_yaml(ROOT / "params.yaml"))
    section = {
        **params["train_teacher"], "import_from": str(tmp_path / "segformer"), "labels": {"what else": classes[0]},
    }  # fmt: skip
    (tmp_path / "teacher.json").write_text(as_text(teacher_plan(section)))
    places = {"plan": tmp_path / "teacher.json", "prepared": tiny_prepared, "teacher": tmp_path / "teacher"}
    assert train_teacher.run(**places, tracker=Tracker())
    assert not train_teacher.run(**places, tracker=Tracker()), "it is there with the same identity"
    document = json.loads((tmp_path / "teacher/teacher.json").read_text())
    assert document["model"]["architecture"] == "SegformerForSemanticSegmentation"
    assert document["model"]["origin"] == "segformer" and 0 <= document["val/miou"] <= 1

    (tmp_path / "s0.json").write_text(as_text(cohort_plan(params["distill"], params["experiments"], [Job("kd", 0)])))
    distill.run(
        plan=tmp_path / "s0.json", prepared=tiny_prepared, teacher=tmp_path / "teacher", students=tmp_path / "s0",
        tracker=Tracker(),
    )  # fmt: skip
    metrics = json.loads((tmp_path / "s0/kd/metrics.json").read_text())
    assert metrics["teacher_sha256"] == document["sha256"]
    settings = parse(evaluate.Config, params["evaluate"], "evaluate")
    evaluate_teacher.run(
        settings, prepared=tiny_prepared, model=tmp_path / "teacher", evaluation=tmp_path / "evaluation",
        tracker=Tracker(),
    )  # fmt: skip
    evaluated = json.loads((tmp_path / "evaluation/evaluation.json").read_text())["models"]["teacher"]
    assert evaluated["network"] == "SegformerForSemanticSegmentation from 'segformer'" and evaluated["params"] > 0


def test_labels_without_an_imported_teacher_are_refused() -> None:
    section = {**tiny(read_yaml(ROOT / "params.yaml"))["train_teacher"], "labels": {"a": "b"}}
    with pytest.raises(UserError, match="labels: are those of an imported teacher"):
        parse(TeacherConfig, section, "train_teacher")


def test_a_method_whose_feature_the_teacher_has_not_is_refused_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    (tmp_path / "torchvision.json").write_text('{"model": "lraspp_mobilenet_v3_large", "classes": ["a", "b"]}')
    params = tiny(read_yaml(ROOT / "params.yaml"))
    teacher = parse(TeacherConfig, {**params["train_teacher"], "import_from": str(tmp_path)}, "train_teacher")
    entry = {**params["experiments"]["kd"], "methods": [{"name": "at"}]}
    with pytest.raises(UserError, match=r"experiments\.at: the teacher has no feature 'last_feature'"):
        check(teacher, experiments({"at": entry}), outlines=True, files=True)
    check(teacher, experiments({"kd": params["experiments"]["kd"]}), outlines=True, files=True)
