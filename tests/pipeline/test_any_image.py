"""Images of five channels of 16 bits, from files as remote sensing has them to networks that have learnt of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from tiny_params import tiny

from segdistill.config import parse, read_yaml
from segdistill.data.shards import ShardDataset, read_dataset_info
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.models.export import load_model
from segdistill.plan import Job, cohort_plan, teacher_plan
from segdistill.stages import distill, evaluate, prepare, train_teacher, validate
from segdistill.stages.plan import as_text

ROOT = Path(__file__).resolve().parents[2]
CHANNELS = 5


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    params = tiny(read_yaml(ROOT / "params.yaml"))
    params["train_teacher"]["model"]["channels"] = [2, 1, 0]
    params["distill"]["train"]["augmentation"] |= {"color_jitter": 0.3, "scale": [0.5, 2.0]}
    student = params["experiments"]["kd"]["students"]["cnn"]
    segformer = {"architecture": "Segformer", "encoder": "mit_b0", "encoder_weights": "none", "output_stride": 32}
    params["experiments"] |= {
        "pair": {
            "students": {"some": {**student, "model": {**student["model"], "channels": [4]}},
                         "all": {**student, "model": segformer}},
            "methods": [{"name": "dml"}],
        }
    }  # fmt: skip
    params["validate"]["min_samples"] = {"train": 1, "val": 1, "test": 1}
    return params


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five channels of 16 bits: GeoTIFFs with channels together and apart, and arrays."""
    root, random = tmp_path_factory.mktemp("satellite"), np.random.default_rng(0)
    for split, count in {"train": 5, "val": 2, "test": 2}.items():
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            labels = random.integers(0, 3, (48, 40))
            pixels = labels[..., None] * 9000 + 100 * np.arange(CHANNELS) + random.integers(0, 900, (48, 40, CHANNELS))
            write(root / "images" / split / f"{number}", pixels.astype(np.uint16), number)
            Image.fromarray(labels.astype(np.uint8)).save(root / "masks" / split / f"{number}.png")
    classes = [{"name": name, "color": [40 * place, 90, 0]} for place, name in enumerate(("water", "field", "roof"))]
    (root / "classes.json").write_text(json.dumps({"classes": classes}))
    return root


def write(path: Path, pixels: np.ndarray, kind: int) -> None:
    if kind % 3 == 0:
        tifffile.imwrite(path.with_suffix(".tif"), pixels, photometric="minisblack", planarconfig="contig")
    elif kind % 3 == 1:
        tifffile.imwrite(
            path.with_suffix(".TIFF"), pixels.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate",
            compression="deflate", tile=(16, 16),
        )  # fmt: skip
    else:
        np.save(path.with_suffix(".npy"), pixels)


def check(params: dict[str, Any], data: Path, report: Path) -> None:
    pytest.importorskip("great_expectations")
    validate.run(parse(validate.Config, params["validate"], "validate"), data=data, report=report, tracker=Tracker())


def prepared(params: dict[str, Any], data: Path, report: Path, folder: Path, **changes: Any) -> Path:
    prepare.run(
        parse(prepare.Config, params["prepare"] | changes, "prepare"), data=data, report=report,
        prepared=folder / "prepared", tracker=Tracker(),
    )  # fmt: skip
    return folder / "prepared"


@pytest.fixture(scope="module")
def report(params: dict[str, Any], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    report = tmp_path_factory.mktemp("checked") / "report"
    check(params, data, report)
    return report


@pytest.fixture(scope="module")
def shards(params: dict[str, Any], data: Path, report: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(params, data, report, tmp_path_factory.mktemp("shards"), workers=1, shard_samples=2)


def test_prepare_records_the_format_and_the_statistics_of_the_train_split(
    params: dict[str, Any], data: Path, report: Path, shards: Path, tmp_path: Path
) -> None:
    images, train = read_dataset_info(shards).images, ShardDataset(shards, "train")
    assert (images.channels, images.bits) == (CHANNELS, 16)
    pixels = np.concatenate([train[index][0].reshape(-1, CHANNELS) for index in range(len(train))]) / 65535
    np.testing.assert_allclose(images.mean, pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(images.std, pixels.std(0), rtol=1e-9)
    again = read_dataset_info(prepared(params, data, report, tmp_path, workers=2, shard_samples=3))
    assert again.images == images, "neither workers nor shards change a digit"
    assert json.loads((report / "summary.json").read_text())["images"] == "5 channels of 16 bits"


def test_teacher_and_students_of_different_channels_go_from_training_to_scores(
    params: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "teacher.json").write_text(as_text(teacher_plan(params["train_teacher"])))
    train_teacher.run(plan=tmp_path / "teacher.json", prepared=shards, teacher=tmp_path / "teacher", tracker=Tracker())
    jobs = [Job("kd", 0), Job("pair", 0)]
    (tmp_path / "s0.json").write_text(as_text(cohort_plan(params["distill"], params["experiments"], jobs)))
    distill.run(
        plan=tmp_path / "s0.json", prepared=shards, teacher=tmp_path / "teacher", students=tmp_path / "s0",
        tracker=Tracker(),
    )  # fmt: skip
    evaluate.run(
        parse(evaluate.Config, params["evaluate"], "evaluate"), prepared=shards, students=tmp_path / "s0",
        evaluations=tmp_path / "evaluations", tracker=Tracker(),
    )  # fmt: skip
    scores = json.loads((tmp_path / "evaluations/kd/evaluation.json").read_text())["models"]["cnn"]
    assert 0 < scores["test/miou"] <= 1 and scores["macs"] > 0

    teacher, document = load_model(tmp_path / "teacher", "teacher")
    assert document["model"]["images"]["channels"] == CHANNELS and document["model"]["channels"] == [2, 1, 0]
    info = read_dataset_info(shards)
    torch.testing.assert_close(teacher.mean.flatten(), torch.tensor([info.images.mean[place] for place in (2, 1, 0)]))
    images = torch.rand(1, CHANNELS, 32, 32)
    changed = images.clone()
    changed[:, 3:] = 0
    seen = {name: load_model(tmp_path / "s0" / experiment, name)[0]
            for experiment, name in (("kd", "cnn"), ("pair", "some"), ("pair", "all"))}  # fmt: skip
    with torch.no_grad():
        assert torch.equal(teacher.logits(images), teacher.logits(changed)), "it does not see the last two"
        for network in seen.values():
            assert not torch.equal(network.logits(images), network.logits(changed))
        with pytest.raises(UserError, match="images of 3 channels, but the network is made for 5 channels of 16 bits"):
            teacher.logits(images[:, :3])


def test_a_channel_that_the_images_have_not_is_refused(params: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    section = {**params["train_teacher"], "model": {**params["train_teacher"]["model"], "channels": [0, 5]}}
    (tmp_path / "teacher.json").write_text(as_text(teacher_plan(section)))
    with pytest.raises(
        UserError, match=r"model\.channels: 5, but the images have 5 channels of 16 bits; allowed: 0 to 4"
    ):
        train_teacher.run(
            plan=tmp_path / "teacher.json", prepared=shards, teacher=tmp_path / "teacher", tracker=Tracker()
        )


def test_validate_names_the_image_that_has_other_channels(params: dict[str, Any], data: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(data, mixed)
    np.save(mixed / "images/train/2.npy", np.zeros((48, 40, 3), np.uint8))
    sentence = r"images/train/2\.npy: 3 channels of 8 bits, but most images have 5 channels of 16 bits"
    with pytest.raises(UserError, match=sentence):
        check(params, mixed, tmp_path / "report")


def test_larger_images_are_shrunk_without_losing_a_channel(
    params: dict[str, Any], data: Path, report: Path, tmp_path: Path
) -> None:
    train = ShardDataset(prepared(params, data, report, tmp_path, max_side=24), "train")
    pixels, labels = train[0]
    assert (pixels.shape, pixels.dtype, labels.shape) == ((24, 20, CHANNELS), np.uint16, (24, 20))
