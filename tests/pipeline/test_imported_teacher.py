"""A teacher from a Hugging Face folder, from import to a student that learnt from it."""

import json
from pathlib import Path

import pytest
import torch
from tiny_params import tiny

from segdistill.config import parse, read_yaml
from segdistill.data.shards import read_dataset_info
from segdistill.engine.tracker import NullTracker
from segdistill.errors import UserError
from segdistill.plan import Job, TeacherConfig, cohort_plan, experiments, teacher_plan
from segdistill.stages import distill, evaluate, evaluate_teacher, train_teacher
from segdistill.stages._networks import check
from segdistill.stages.plan import as_text

ROOT = Path(__file__).resolve().parents[2]


def test_a_segformer_of_hugging_face_teaches_a_student(tiny_prepared: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    classes = [item.name for item in read_dataset_info(tiny_prepared).classes]
    labels = dict(enumerate([*(name.upper() for name in reversed(classes[1:])), "what else"]))
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=16,
        id2label=labels, label2id={name: index for index, name in labels.items()},
    )  # fmt: skip
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "segformer")
    (tmp_path / "segformer/preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    params = tiny(read_yaml(ROOT / "params.yaml"))
    section = {
        **params["train_teacher"], "import_from": str(tmp_path / "segformer"), "labels": {"what else": classes[0]},
    }  # fmt: skip
    (tmp_path / "teacher.json").write_text(as_text(teacher_plan(section)))
    places = {"plan": tmp_path / "teacher.json", "prepared": tiny_prepared, "teacher": tmp_path / "teacher"}
    assert train_teacher.run(**places, tracker=NullTracker())
    assert not train_teacher.run(**places, tracker=NullTracker()), "it is there with the same identity"
    document = json.loads((tmp_path / "teacher/teacher.json").read_text())
    assert document["model"]["architecture"] == "SegformerForSemanticSegmentation"
    assert document["model"]["origin"] == "segformer" and 0 <= document["val/miou"] <= 1

    (tmp_path / "s0.json").write_text(as_text(cohort_plan(params["distill"], params["experiments"], [Job("kd", 0)])))
    distill.run(
        plan=tmp_path / "s0.json", prepared=tiny_prepared, teacher=tmp_path / "teacher", students=tmp_path / "s0",
        tracker=NullTracker(),
    )  # fmt: skip
    metrics = json.loads((tmp_path / "s0/kd/metrics.json").read_text())
    assert metrics["teacher_sha256"] == document["sha256"]
    settings = parse(evaluate.Config, params["evaluate"], "evaluate")
    evaluate_teacher.run(
        settings, prepared=tiny_prepared, model=tmp_path / "teacher", evaluation=tmp_path / "evaluation",
        tracker=NullTracker(),
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
