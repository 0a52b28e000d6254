"""Published data sets as their archives unpack, in miniature: validate -> prepare."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import scipy.io
from _folders import save
from PIL import Image

from segdistill.data.layouts import IGNORE_INDEX, LAYOUTS, WITHOUT_MASKS, open_layout, recognised_layout
from segdistill.data.layouts.benchmark import Benchmark
from segdistill.data.layouts.camvid_original import COLORS
from segdistill.data.layouts.cityscapes import CLASSES as CITYSCAPES
from segdistill.data.layouts.cityscapes import LABEL_IDS, NOT_EVALUATED
from segdistill.data.shards import ShardDataset
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.stages import prepare, validate

SIZE = (4, 6)  # height, width
BENCHMARKS: dict[str, type[Benchmark]] = {
    name: layout for name, layout in LAYOUTS.items() if issubclass(layout, Benchmark)
}
CLASS_COUNTS = {
    "camvid_original": 11, "cityscapes": 19, "cityscapes_coarse": 19, "ade20k": 150, "voc": 21, "voc_aug": 21,
    "pascal_context_59": 59, "pascal_context_60": 60, "coco_stuff": 171,
}  # fmt: skip

_counter = iter(range(10**6))


def photo(path: Path) -> None:
    """An image that is like no other."""
    pixels = np.random.default_rng(next(_counter)).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    save(path, pixels)


def stripes(left: Any, middle: Any, right: Any) -> np.ndarray:
    """A mask of three values, or colours."""
    pixels = np.empty((*SIZE, *np.shape(left)), dtype=np.uint8)
    pixels[:, :2], pixels[:, 2:4], pixels[:, 4:] = left, middle, right
    return pixels


def cityscapes(root: Path, form: str = "labelIds") -> Path:
    for split, city in (("train", "aachen"), ("val", "lindau"), ("train_extra", "augsburg")):
        for frame in ("000019", "000020"):
            name = f"{city}_000003_{frame}"
            photo(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
            labels = "gtCoarse" if split == "train_extra" else "gtFine"
            masks = {"labelIds": stripes(7, 33, 6), "labelTrainIds": stripes(0, 18, 255),
                     "instanceIds": stripes(7, 33, 6),
                     "color": stripes((128, 64, 128, 255), (119, 11, 32, 255), (81, 0, 81, 255))}  # fmt: skip
            for ending, mask in masks.items():
                if ending in (form, "instanceIds") or labels == "gtCoarse":
                    save(root / labels / split / city / f"{name}_{labels}_{ending}.png", mask)
            (root / labels / split / city / f"{name}_{labels}_polygons.json").write_text("{}")
    return root


def ade20k(root: Path) -> Path:
    for split in ("training", "validation"):
        photo(root / "ADEChallengeData2016/images" / split / "ADE_1.jpg")
        save(root / "ADEChallengeData2016/annotations" / split / "ADE_1.png", stripes(1, 150, 0))
    return root


def voc(root: Path, trainaug: str | None = None) -> Path:
    top = root / "VOCdevkit/VOC2012"
    for number, name in enumerate(("2007_000001", "2007_000002", "2007_000003", "2007_000004")):
        photo(top / "JPEGImages" / f"{name}.jpg")
        mask = Image.fromarray(stripes(1, 20, 255))
        mask.putpalette([0, 0, 0, 128, 0, 0, *[0] * 18 * 3, 0, 64, 128, *[0] * 234 * 3, 224, 224, 192])
        for folder in ("SegmentationClass",) if number < 2 else ():
            (top / folder).mkdir(exist_ok=True)
            mask.save(top / folder / f"{name}.png")
        if number < 3:
            save(top / "SegmentationClassAug" / f"{name}.png", stripes(1, 20, 255))
    lists = top / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000001\n")
    (lists / "val.txt").write_text("2007_000002\n")
    if trainaug:
        (lists / "train_aug.txt").write_text(trainaug)
    return root


def pascal_context(root: Path) -> Path:
    top = root / "VOCdevkit/VOC2010"
    (top / "ImageSets/Main").mkdir(parents=True)
    (root / "trainval").mkdir()
    for split, name in (("train", "2008_000001"), ("val", "2008_000002")):
        photo(top / "JPEGImages" / f"{name}.jpg")
        (top / "ImageSets/Main" / f"{split}.txt").write_text(f"{name}\n")
        labels = np.full(SIZE, 2, dtype=np.uint16)  # aeroplane
        labels[:, 2:4], labels[:, 4:] = 458, 459  # wood, and one of the others
        scipy.io.savemat(root / "trainval" / f"{name}.mat", {"LabelMap": labels}, do_compression=True)
    return root


def camvid_original(root: Path) -> Path:
    colours = {entry.name: entry.color for entry in COLORS}
    mask = stripes(*(colours[one] for one in ("LaneMkgsDriv", "SUVPickupTruck", "Void")))
    for name in ("0001TP_008520", "0001TP_008550", "0016E5_08160", "0016E5_08159", "Seq05VD_f00000"):
        photo(root / "701_StillsRaw_full" / f"{name}.png")
        save(root / "LabeledApproved_full" / f"{name}_L.png", mask)
    return root


def coco_stuff(root: Path) -> Path:
    for split in ("train2017", "val2017"):
        photo(root / "images" / split / "000000000001.jpg")
        save(root / "annotations" / split / "000000000001.png", stripes(12, 181, 255))
    photo(root / "images/unlabeled2017/000000000002.jpg")
    return root


def check(name: str, data: Path, out: Path) -> tuple[dict[str, Any], Path]:
    """What validate reports, and what prepare writes."""
    config = validate.Config(
        layout=name, min_samples=validate.MinSamples(train=1, val=1, test=1), max_ignore_fraction=0.6,
        min_class_share=0.0, workers=1,
    )  # fmt: skip
    validate.run(config, data=data, report=out / "report", tracker=Tracker())
    settings = prepare.Config(layout=name, shard_samples=8, max_side=None, workers=1)
    prepare.run(settings, data=data, report=out / "report", prepared=out / "prepared", tracker=Tracker())
    return json.loads((out / "report/summary.json").read_text()), out / "prepared"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_classes_are_as_many_as_published_with_names_and_colours_of_their_own(name: str) -> None:
    layout = BENCHMARKS[name]
    classes = layout.published_classes
    assert len(classes) == CLASS_COUNTS[name] == len({entry.name for entry in classes})
    # In ADE20K's official table road and skyscraper look alike.
    assert len({entry.color for entry in classes}) == len(classes) - (name == "ade20k")
    if "labels" in vars(layout):
        assert set(layout.labels.values()) - {IGNORE_INDEX} == set(range(len(classes)))


def test_tables_of_labels_are_those_published() -> None:
    assert len(LABEL_IDS) == 19 and not {entry.color for entry in NOT_EVALUATED} & {entry.color for entry in CITYSCAPES}
    assert len(COLORS) == len({entry.color for entry in COLORS}) == 32
    for name, values in {"coco_stuff": {0: "person", 12: "stop sign", 89: "toothbrush", 91: "banner", 181: "wood"},
                         "pascal_context_60": {0: "background", 2: "aeroplane", 259: "mountain", 459: "background"},
                         "ade20k": {1: "wall", 13: "person", 150: "flag"}, "voc": {15: "person"}}.items():  # fmt: skip
        layout = BENCHMARKS[name]
        read_as = {value: layout.published_classes[layout.labels[value]].name for value in values}
        assert read_as == values
    assert {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90} == set(range(182)) - set(BENCHMARKS["coco_stuff"].labels)


CASES: dict[str, tuple[Callable[[Path], Path], dict[str, int], list[int]]] = {
    # layout: how it is written, samples of the splits, train ids from left to right in a training mask
    "cityscapes": (cityscapes, {"train": 2, "val": 2, "test": 2, WITHOUT_MASKS: 2}, [0, 18, 255]),
    "cityscapes_coarse": (cityscapes, {"train": 4, "val": 2, "test": 2}, [0, 18, 255]),
    "ade20k": (ade20k, {"train": 1, "val": 1, "test": 1}, [0, 149, 255]),
    "voc": (voc, {"train": 1, "val": 1, "test": 1, WITHOUT_MASKS: 2}, [1, 20, 255]),
    "voc_aug": (voc, {"train": 2, "val": 1, "test": 1, WITHOUT_MASKS: 1}, [1, 20, 255]),
    "pascal_context_59": (pascal_context, {"train": 1, "val": 1, "test": 1}, [0, 58, 255]),
    "pascal_context_60": (pascal_context, {"train": 1, "val": 1, "test": 1}, [1, 59, 0]),
    "camvid_original": (camvid_original, {"train": 2, "val": 1, "test": 2}, [3, 8, 255]),
    "coco_stuff": (coco_stuff, {"train": 1, "val": 1, "test": 1, WITHOUT_MASKS: 1}, [11, 170, 255]),
}


@pytest.mark.parametrize("name", CASES)
def test_an_official_archive_is_validated_and_prepared_as_it_unpacks(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[dict[str, Any]] = []

    def note(tables: dict[str, Any], expectations: list[Any], folder: Path) -> list[SimpleNamespace]:
        files.extend(tables["files"])  # judged below, since Great Expectations takes a second for each
        return [SimpleNamespace(success=True, rows=[]) for _ in expectations]

    monkeypatch.setattr("segdistill.adapters.gx.validate", note)
    write, samples, expected = CASES[name]
    data = write(tmp_path / "data")
    layout = open_layout(name, data)
    counts = {split: len(list(layout.samples(split))) for split in layout.splits}
    assert counts == samples
    assert recognised_layout(data) in name.replace("60", "59")  # the plain variant of it
    summary, prepared = check(name, data, tmp_path)
    assert summary["samples"] == samples == dict(Counter(row["split"] for row in files))
    problems = ("image_problem", "mask_problem", "size_problem", "palette_problem", "label_problem", "same_as")
    assert not [row for row in files if any(row[problem] for problem in problems)]
    assert {row["mask_kind"] for row in files} <= {*layout.legend.mask_kinds, None}
    for split, count in samples.items():
        assert len(ShardDataset(prepared, split)) == count
    _, labels = ShardDataset(prepared, "train")[0]
    assert labels[1, ::2].tolist() == expected


def test_validate_says_what_is_missing_and_that_val_is_the_test_split_too(tmp_path: Path) -> None:
    data = camvid_original(tmp_path / "camvid")
    summary, prepared = check("camvid_original", data, tmp_path / "a")
    sentences = [sentence for finding in summary["warnings"] for sentence in finding["sentences"]]
    images = data / "701_StillsRaw_full"
    assert f"{images}: 2 samples in the split 'train', but the official release has 367: 365 are missing" in sentences
    assert not any("as in the literature" in sentence for sentence in sentences)
    manifest = pyarrow.parquet.read_table(prepared / "manifest.parquet").to_pylist()
    assert {row["id"]: row["sequence"] for row in manifest}["0001TP_008550"] == "0001TP"

    data = coco_stuff(tmp_path / "coco")
    summary, prepared = check("coco_stuff", data, tmp_path / "b")
    sentences = [sentence for finding in summary["warnings"] for sentence in finding["sentences"]]
    said = [sentence for sentence in sentences if "the split 'test' has the samples of 'val'" in sentence]
    assert len(said) == 1 and summary["samples"]["test"] == 1
    rows = {row["split"]: row for row in pyarrow.parquet.read_table(prepared / "manifest.parquet").to_pylist()}
    assert rows["test"] == rows["val"] | {"split": "test"}  # the shard of val, which is not written twice
    info = json.loads((prepared / "dataset.json").read_text())["splits"]
    assert info["test"] == info["val"] and len(list((prepared / "shards").iterdir())) == 3


@pytest.mark.parametrize("form", ["labelIds", "labelTrainIds", "color"])
def test_cityscapes_reads_label_ids_train_ids_and_colours_alike(tmp_path: Path, form: str) -> None:
    data = cityscapes(tmp_path / "data", form)
    layout = open_layout("cityscapes", data)
    sample = next(layout.samples("train"))
    assert sample.mask is not None and sample.mask.name == f"aachen_000003_000019_gtFine_{form}.png"
    assert (sample.id, sample.sequence) == ("aachen_000003_000019", "aachen_000003")
    from segdistill.data.checks import load_sample

    _, _, labels = load_sample(sample, layout.legend)
    assert np.array_equal(labels, stripes(0, 18, 255))


@pytest.mark.parametrize(
    "line", ["2007_000003\n", "/JPEGImages/2007_000003.jpg /SegmentationClassAug/2007_000003.png\n"]
)
def test_voc_takes_the_augmented_list_in_both_forms_in_which_it_goes_round(tmp_path: Path, line: str) -> None:
    layout = open_layout("voc_aug", voc(tmp_path, line))
    (sample,) = layout.samples("train")
    assert sample.mask == tmp_path / "VOCdevkit/VOC2012/SegmentationClassAug/2007_000003.png"


def test_a_line_that_is_no_name_and_a_folder_without_the_data_set_are_named(tmp_path: Path) -> None:
    path = voc(tmp_path / "voc") / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    path.write_text("2007_000002\n../..\n")
    with pytest.raises(UserError) as caught:
        list(open_layout("voc", tmp_path / "voc").samples("val"))
    assert str(caught.value) == f"{path}, line 2: expected the name of an image, found '../..'"
    with pytest.raises(UserError) as caught:
        open_layout("cityscapes", tmp_path / "voc")
    assert str(caught.value) == (
        f"{tmp_path}/voc: has no leftImg8bit/train and gtFine/train; the layout 'cityscapes' is what "
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip unpack to: "
        "segdistill data import cityscapes FOLDER_OF_ARCHIVES"
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"Labels": np.ones(SIZE)}, "has no matrix 'LabelMap' of class indices"),
        ({"LabelMap": np.full(SIZE, 1.5)}, "its matrix 'LabelMap' has values that are no class indices"),
        ({"LabelMap": np.full(SIZE, 460)}, "label 460 outside the class list (allowed 0-459), in 24 pixels"),
        (None, "damaged or truncated: "),
    ],
)
def test_a_label_file_of_pascal_context_that_is_none_is_described(
    tmp_path: Path, content: dict[str, np.ndarray] | None, sentence: str
) -> None:
    from segdistill.data.checks import inspect

    path = pascal_context(tmp_path) / "trainval/2008_000001.mat"
    if content is None:
        path.write_bytes(path.read_bytes()[:150])
    else:
        scipy.io.savemat(path, content)
    layout = open_layout("pascal_context_59", tmp_path)
    (facts,) = inspect(layout, list(layout.samples("train")), workers=1)
    if facts.unknown_labels:
        assert facts.unknown_labels == {460: 24}
    else:
        assert facts.mask_problem is not None and facts.mask_problem.startswith(sentence)


def test_a_colour_that_the_data_set_does_not_have_is_a_fault_of_its_mask(tmp_path: Path) -> None:
    from segdistill.data.checks import inspect

    data = camvid_original(tmp_path)
    save(data / "LabeledApproved_full/0016E5_08159_L.png", stripes((1, 2, 3), (0, 0, 0), (0, 0, 0)))
    layout = open_layout("camvid_original", data)
    (facts,) = inspect(layout, list(layout.samples("val")), workers=1)
    assert facts.mask_problem == "8 pixels of a colour that no class has, such as #010203"


def test_masks_of_camvid_may_lie_loose_since_their_archive_has_no_folder(tmp_path: Path) -> None:
    data = camvid_original(tmp_path)
    for path in (data / "LabeledApproved_full").iterdir():
        path.rename(data / path.name)
    (data / "LabeledApproved_full").rmdir()
    assert all(sample.mask.exists() for sample in open_layout("camvid_original", data).samples("train") if sample.mask)


def test_a_data_set_whose_test_split_is_val_is_not_copied_into_a_leak(tmp_path: Path) -> None:
    from segdistill.data.importing import import_dataset

    with pytest.raises(UserError) as caught:
        import_dataset("ade20k", ade20k(tmp_path / "source"), tmp_path / "out")
    assert str(caught.value).endswith("move it to data/, and: segdistill init --layout ade20k")
    assert not (tmp_path / "out").exists()
