# ruff: noqa: F811 -- fixtures are imported, and asked for by their names
"""``segdistill predict``: any MODEL on any INPUT, with the numbers of ``evaluate``, and nothing half-written."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from _trained import CLASSES, data, foreign_teacher, model  # noqa: F401 -- fixtures
from PIL import Image

from segdistill.__main__ import main
from segdistill.commands._model import open_model
from segdistill.config import parse
from segdistill.data.shards import ShardDataset, read_dataset_info
from segdistill.engine.distributed import Processes
from segdistill.engine.evaluate import evaluate
from segdistill.engine.inference import Views
from segdistill.engine.settings import InferenceConfig
from segdistill.metrics.confusion import confusion_matrix_per_image, mean_iou


def miou_of_masks(masks: Path, data: Path) -> float:
    """What a person would compute from the files."""
    counts = torch.zeros((3, 3), dtype=torch.int64)
    for path in sorted(masks.glob("*.png")):
        mask = torch.from_numpy(np.array(Image.open(path)))
        label = torch.from_numpy(np.array(Image.open(data / "data/masks/test" / path.name)))
        counts += confusion_matrix_per_image(mask.long()[None], label.long()[None], 3)[0]
    return mean_iou(counts.numpy())


@pytest.mark.parametrize("shown", [{}, {"window": [32, 48]}, {"input_scale": 0.5}], ids=["whole", "window", "scale"])
def test_the_masks_give_the_miou_that_evaluate_gives(shown: dict, data: Path, model: Path, tmp_path: Path) -> None:
    settings = {"batch_size": 2, "input_scale": 1.0, "window": None, "window_stride": 0.67, **shown}
    options = ["--batch-size", "2"]
    if "window" in shown:
        options += ["--window", *map(str, shown["window"])]
    if "input_scale" in shown:
        options += ["--scale", str(shown["input_scale"])]
    assert main(["predict", str(model), str(data / "data/images/test"), "--out", str(tmp_path / "out"), *options]) == 0
    network = open_model(str(model), None, torch.device("cpu")).network
    expected = evaluate(
        network, ShardDataset(data / "prepared", "test"), Views(parse(InferenceConfig, settings, "inference")),
        num_classes=3, processes=Processes(0, 1, torch.device("cpu")),
    )  # fmt: skip
    assert read_dataset_info(data / "prepared").splits["test"] == len(list((tmp_path / "out/masks").iterdir()))
    assert miou_of_masks(tmp_path / "out/masks", data) == pytest.approx(expected.miou, abs=1e-12)


def test_a_teacher_of_another_library_predicts_as_it_is_evaluated(
    data: Path, foreign_teacher: Path, tmp_path: Path
) -> None:
    images, out = data / "data/images/test", tmp_path / "out"
    assert main(["predict", str(foreign_teacher), str(images), "--out", str(out), "--batch-size", "2"]) == 0
    network = open_model(str(foreign_teacher), None, torch.device("cpu")).network
    settings = InferenceConfig(batch_size=2, input_scale=1.0, window=None, window_stride=0.67)
    expected = evaluate(
        network, ShardDataset(data / "prepared", "test"), Views(settings), num_classes=3,
        processes=Processes(0, 1, torch.device("cpu")),
    )  # fmt: skip
    assert miou_of_masks(out / "masks", data) == pytest.approx(expected.miou, abs=1e-12)


def test_everything_that_is_asked_for_lies_beside_the_masks(data: Path, model: Path, tmp_path: Path) -> None:
    images, out = data / "data/images", tmp_path / "out"
    switches = ["--color", "--overlay", "--confidence", "--areas", "csv"]
    assert main(["predict", str(model), str(images), "--out", str(out), *switches]) == 0
    files = {path.relative_to(images).as_posix() for path in images.rglob("*.png")}
    for kind in ("masks", "color", "overlay", "confidence"):
        assert {path.relative_to(out / kind).as_posix() for path in (out / kind).rglob("*.png")} == files
    mask = np.array(Image.open(out / "masks/test/3.png"))
    assert mask.shape == (33, 70) and mask.dtype == np.uint8
    colors = np.array([entry["color"] for entry in CLASSES], dtype=np.uint8)
    np.testing.assert_array_equal(np.array(Image.open(out / "color/test/3.png")), colors[mask])
    confidence = np.array(Image.open(out / "confidence/test/3.png"))
    assert confidence.min() >= 85, "the most probable of three classes has a third at least"
    rows = list(csv.DictReader((out / "areas.csv").open()))
    assert len(rows) == 3 * len(files)
    road = next(row for row in rows if row["image"] == "test/3" and row["class"] == "road")
    assert int(road["pixels"]) == (mask == 0).sum() and float(road["share"]) == pytest.approx((mask == 0).mean())
    assert json.loads((out / "classes.json").read_text())["classes"] == CLASSES


def test_a_photograph_is_turned_as_its_camera_says_and_a_list_names_any_images(model: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "a/turned.JPG", exif=exif)
    Image.new("RGB", (40, 30)).save(tmp_path / "upright.png")
    (tmp_path / "list.txt").write_text("a/turned.JPG\n\nupright.png\n")
    assert main(["predict", str(model), str(tmp_path / "list.txt"), "--out", str(tmp_path / "out")]) == 0
    sizes = {path.stem: Image.open(path).size for path in (tmp_path / "out/masks").rglob("*.png")}
    assert sizes == {"turned": (30, 40), "upright": (40, 30)}
    assert (tmp_path / "out/masks/a/turned.png").exists()


def test_masks_stay_in_their_folder_whatever_places_a_list_names(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/b").mkdir(parents=True)
    for place in ("above.png", "here/b/below.png", "whole.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / place)
    (tmp_path / "here/list.txt").write_text(f"../above.png\nb/below.png\n{tmp_path / 'whole.png'}\n")
    monkeypatch.chdir(tmp_path / "here")
    assert main(["predict", str(model), "list.txt", "--out", "out"]) == 0
    masks = {path.relative_to("out/masks").as_posix() for path in Path("out").rglob("*.png")}
    assert masks == {"above.png", "whole.png", "here/b/below.png"}


def test_hidden_files_beside_photos_are_left_alone(model: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (9, 9)).save(photos / "a.jpg")
    (photos / "._a.jpg").write_bytes(b"what macOS writes beside a photo")
    assert main(["predict", str(model), str(photos), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out/masks").iterdir()] == ["a.png"]


def test_every_nth_frame_of_a_video_is_predicted(model: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "drive.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    options = ["--out", str(tmp_path / "out"), "--every", "2", "--areas", "parquet"]
    assert main(["predict", str(model), str(tmp_path / "drive.mp4"), *options]) == 0
    masks = sorted((tmp_path / "out/masks").iterdir())
    assert [path.name for path in masks] == ["000000.png", "000002.png", "000004.png"]
    assert Image.open(masks[0]).size == (64, 48)
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(tmp_path / "out/areas.parquet").num_rows == 9


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda root: (root / "b.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off"), "b.jpg: damaged or truncated"),
        (lambda root: Image.new("RGB", (9, 9)).save(root / "a.jpeg"), "its mask would have the name of that of"),
        (lambda root: (root / "a.png").rename(os.fsdecode(bytes(root) + b"/\xff.png")), "name is not UTF-8; rename it"),
        (lambda root: (root / "a.png").unlink(), "no image in it; allowed: .jpg, .jpeg, .png"),
    ],
)
def test_what_cannot_be_predicted_is_one_sentence_and_leaves_nothing(
    make, sentence: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (9, 9)).save(images / "a.png")
    make(images)
    assert main(["predict", str(model), str(images), "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_a_model_that_is_none_and_a_folder_in_use_are_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    image, out = str(tmp_path / "a.png"), tmp_path / "out"
    for text, sentence in ((str(tmp_path), "no model in it"), (image, "no such model; allowed")):
        assert main(["predict", text, image, "--out", str(out)]) == 2
        assert sentence in capsys.readouterr().err
    (tmp_path / "evil.pt2").write_bytes(b"PK")
    assert main(["predict", str(tmp_path / "evil.pt2"), image, "--out", str(out)]) == 2
    assert "not an exported program" in capsys.readouterr().err
    out.mkdir()
    (out / "mine").touch()
    assert main(["predict", str(model), image, "--out", str(out)]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
