"""``segdistill init``: from photos and masks to a params.yaml that is in order; and which file is never overwritten."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _folders import make_folder, save
from test_benchmarks_as_published import ade20k
from test_layouts import make_camvid

from segdistill.__main__ import main
from segdistill.commands import init
from segdistill.config import flatten, read_yaml
from segdistill.errors import UserError
from segdistill.execution import check_params

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without params, on a machine where a step takes a tenth of a second and nothing can be downloaded."""
    monkeypatch.setattr(init, "_timed", lambda network, *_: replace(network, seconds=0.1, forward=0.03))
    monkeypatch.setattr(init, "_machine", lambda: init.Machine("cpu", 8.0, 256, 1024, 30, "resnet18"))
    monkeypatch.setattr("segdistill.models.weights.hub_answers", lambda endpoint: False)
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def photos(root: Path, count: int = 12, size: tuple[int, int] = (60, 90)) -> Path:
    """Photos beside masks [H, W] of three classes, without splits."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for number in range(count):
        save(root / f"images/{number}.jpg", pixels)
        save(root / f"masks/{number}.png", np.arange(size[0] * size[1], dtype=np.uint8).reshape(size) % 3)
    return root


def fitted(*arguments: str) -> dict[str, Any]:
    assert main(["init", *arguments]) == 0
    return read_yaml(Path("params.yaml"))


def test_photos_and_masks_become_data_and_params_that_are_in_order(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = fitted(str(photos(project.parent / "mine")), "--classes", "sky,road,car", "--time", "2h")
    check_params(params, here=True)
    assert (project / "data/classes.json").is_file()
    assert params["run"] == ["none", "kd", "none_vit", "kd_vit", "apd", "c2vkd_ce", "hfd_bsd"]
    assert params["train_teacher"]["train"]["iterations"] == 17_000  # 0.3 * 7200 s of 0.13 s each
    assert params["distill"]["train"]["augmentation"]["crop_size"] == [32, 64]
    said, text = capsys.readouterr().out, (project / "params.yaml").read_text()
    for reason in ("12 images: train 8, val 2, test 2", "the median image is 60 x 90", "batch 8: 8 training images",
                   "about 120 minutes",
                   "no download of ImageNet weights", "Next: dvc add data, then dvc repro"):  # fmt: skip
        assert reason in said
    assert "# batch 8: 8 training images" in text and "# mean share of pixels without a label" in text


@pytest.mark.parametrize(
    ("students", "run"),
    [
        (["tiny"], ["none", "kd", "apd"]),
        (["vit"], ["none", "kd", "apd", "c2vkd_ce"]),
        (["resnet18", "tiny"], ["none", "kd", "none_tiny", "kd_tiny", "apd"]),
    ],
)
def test_the_papers_are_there_that_fit_the_students(project: Path, students: list[str], run: list[str]) -> None:
    make_folder(project / "data")
    params = fitted(*[word for student in students for word in ("--student", student)])
    assert params["run"] == run == list(params["experiments"])


def test_large_images_are_stored_smaller_and_seen_smaller_still(project: Path) -> None:
    make_folder(project / "data", {"train": 2, "val": 1, "test": 1}, size=(1600, 1200))
    params = fitted("--student", "tiny")
    assert params["prepare"]["max_side"] == 1024
    assert params["train_teacher"]["inference"]["input_scale"] == 0.25
    assert params["distill"]["train"]["augmentation"]["crop_size"] == [128, 192]
    assert params["distill"]["train"]["batch_size"] == 2


def test_a_known_layout_is_imported_as_such(project: Path) -> None:
    params = fitted(str(make_camvid(project.parent / "source")), "--student", "tiny")
    assert params["prepare"]["layout"] == "folder"
    assert len(read_yaml(project / "data/classes.json")["classes"]) == 11


def test_a_published_layout_in_data_stays_as_it_lies(project: Path) -> None:
    ade20k(project / "data")
    for arguments in ((), ("--layout", "ade20k", "--force")):
        params = fitted(*arguments, "--student", "tiny")
        assert params["prepare"]["layout"] == params["validate"]["layout"] == "ade20k"
    assert not (project / "data/classes.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--student", "resnet81"], "--student resnet81: model.encoder: unknown encoder 'resnet81'; did you mean"),
        (["--teacher", "nothing"], "--teacher nothing: model.encoder: unknown encoder"),
        (["--teacher", "teachers/gone"], "teachers/gone: no such folder"),
        (["--time", "soon"], "--time: 'soon' is no time; expected minutes, hours or days, such as 30m"),
        (["elsewhere"], "elsewhere: no such folder"),
        (["--params", "data", "--preset", "smoke", "--force"], "data: a folder; expected a regular file"),
        (["--params", "data/classes.json/x.yaml"], "classes.json: exists and is no folder"),
        (["--preset", "smok"], "presets/smok.yaml: no such preset; did you mean 'smoke'?"),
    ],
)
def test_a_wrong_wish_is_one_sentence_and_writes_nothing(
    project: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(project / "data")
    assert main(["init", *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not (project / "params.yaml").exists()


def write_teacher(folder: Path, classes: list[str]) -> str:
    folder.mkdir(parents=True)
    (folder / "torchvision.json").write_text(json.dumps({"model": "lraspp_mobilenet_v3_large", "classes": classes}))
    return str(folder)


def test_the_classes_of_a_given_teacher_are_matched_and_what_is_left_is_said(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = write_teacher(project / "teachers/lraspp", ["Sky", "ROAD", "lorry", "tree"])
    data = str(photos(project.parent / "mine"))
    section = fitted(data, "--classes", "sky,road,car", "--teacher", teacher)["train_teacher"]
    assert (section["import_from"], section["labels"]) == (teacher, {"Sky": "sky", "ROAD": "road"})
    text, said = (project / "params.yaml").read_text(), capsys.readouterr().out
    assert "# left out, for want of a class of the data set: lorry, tree" in text
    assert "# TO BE ADDED, of the data set's: car" in text
    assert "the teacher has no class named car: say in train_teacher.labels which of its are" in said
    assert "without apd: experiments.apd: the teacher has no feature 'last_feature'" in said


def test_a_teacher_of_whose_classes_none_is_the_data_sets_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = write_teacher(project / "teachers/lraspp", ["cat", "dog"])
    data = str(photos(project.parent / "mine"))
    assert main(["init", data, "--classes", "sky,road,car", "--teacher", teacher]) == 2
    assert "none of its classes has a name of the data set's; it has cat, dog" in capsys.readouterr().err
    assert not (project / "params.yaml").exists()


@pytest.mark.parametrize("wish", [["--student", "resnet81"], ["--teacher", "teachers/pets"]])
def test_data_are_not_brought_for_a_wish_that_is_refused(project: Path, wish: list[str]) -> None:
    write_teacher(project / "teachers/pets", ["cat", "dog"])
    assert main(["init", str(photos(project.parent / "mine")), *wish]) == 2
    assert not (project / "data").exists()


def test_data_that_are_there_are_not_overwritten(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(project / "data")
    before = sorted(project.rglob("*"))
    assert main(["init", str(photos(project.parent / "mine"))]) == 2
    assert "data: has a data set, and is not overwritten" in capsys.readouterr().err
    assert sorted(project.rglob("*")) == before


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_a_params_file_with_changes_of_ones_own_is_never_overwritten(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params, preset = project / "params.yaml", (ROOT / "presets/smoke.yaml").read_bytes()
    shutil.copy(ROOT / "params.yaml", params)
    git(project, "init", "--quiet")
    git(project, "add", "params.yaml")
    git(project, "commit", "--quiet", "--message", "start")
    assert main(["init", "--preset", "own"]) == 0  # git has the former content
    assert main(["init", "--preset", "smoke"]) == 0  # the presets have it
    assert params.read_bytes() == preset
    params.write_bytes(preset + b"# mine\n")
    capsys.readouterr()
    for arguments in (["--preset", "own"], []):
        assert main(["init", *arguments]) == 2
        assert "params.yaml: has changes that are not committed, and is not overwritten" in capsys.readouterr().err
    assert params.read_bytes() == preset + b"# mine\n"
    assert main(["init", "--preset", "own", "--params", "other.yaml"]) == 0
    assert main(["init", "--preset", "own", "--force"]) == 0
    assert params.read_bytes() == (project / "other.yaml").read_bytes()


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_preset_names_a_file_outside_the_clone(preset: Path) -> None:
    values = flatten(read_yaml(preset))
    for key, value in values.items():
        if key.endswith("encoder_weights"):
            inside = value.startswith("weights/") and value.endswith(".safetensors") and ".." not in value
            assert value in ("none", "imagenet") or inside, f"{key}: weights/ENCODER.safetensors, imagenet or none"
        assert not str(value).startswith(("/", "../")), key


def test_weights_that_are_not_there_say_where_they_are() -> None:
    from segdistill.models.weights import local_weights_path

    with pytest.raises(UserError) as caught:
        local_weights_path("weights/tf_efficientnet_lite0.safetensors")
    source = "save model.safetensors of timm/tf_efficientnet_lite0.in1k on the Hugging Face hub there"
    assert source in str(caught.value) and "or choose imagenet, which downloads it, or none" in str(caught.value)
