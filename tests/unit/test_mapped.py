"""A second test set in the classes of the first."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segdistill.data.mapped import MappedDataset
from segdistill.errors import UserError

OURS, KEY = ("sky", "road", "car"), "evaluate.out_of_domain"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Two images in the folder layout, each with a column of bicycle, car, truck, sky and of no class."""
    folder = tmp_path / "elsewhere"
    classes = [{"name": name, "color": [place, 0, 0]} for place, name in enumerate(("bicycle", "car", "truck", "sky"))]
    for kind in ("images", "masks"):
        (folder / kind / "test").mkdir(parents=True)
    (folder / "classes.json").write_text(json.dumps({"classes": classes}))
    for name in ("a", "b"):
        Image.new("RGB", (5, 2), (9, 9, 9)).save(folder / f"images/test/{name}.png")
        mask = np.array([[0, 1, 2, 3, 255]] * 2, dtype=np.uint8)
        Image.fromarray(mask).save(folder / f"masks/test/{name}.png")
    return folder


def test_classes_are_ours_where_they_are_mapped_and_ignored_elsewhere(elsewhere: Path) -> None:
    data = MappedDataset(elsewhere, "folder", {"car": "car", "truck": "car"}, OURS, KEY)
    image, label = data[1]
    assert image.shape == (2, 5, 3) and label.tolist() == [[255, 2, 2, 255, 255]] * 2
    assert (len(data), data.sample_id(1), data.mapped) == (2, "b", [2])


def test_without_a_mapping_classes_of_the_same_name_are_the_same(elsewhere: Path) -> None:
    data = MappedDataset(elsewhere, "folder", {}, OURS, KEY)
    assert data[0][1].tolist() == [[255, 2, 255, 0, 255]] * 2 and data.mapped == [0, 2]


def test_its_hash_is_that_of_its_files_and_of_the_mapping(elsewhere: Path, tmp_path: Path) -> None:
    shutil.copytree(elsewhere, tmp_path / "copy")

    def content(folder: Path, **mapping: str) -> str:
        return MappedDataset(folder, "folder", mapping, OURS, KEY).content_hash

    known = content(elsewhere, car="car")
    assert content(tmp_path / "copy", car="car") == known != content(elsewhere, truck="car")
    Image.new("RGB", (5, 2), (8, 9, 9)).save(elsewhere / "images/test/b.png")
    assert content(elsewhere, car="car") != known


@pytest.mark.parametrize(
    ("mapping", "ours", "sentence"),
    [
        ({"cart": "car"}, OURS, r"out_of_domain.classes: .*elsewhere has no class 'cart'.*car"),
        ({"car": "cars"}, OURS, r"out_of_domain.classes.car: no class of ours is 'cars'.*car"),
        ({}, ("tree",), r"no class of the same name as one of ours \(tree\); say which .* bicycle, car, truck, sky"),
    ],
)
def test_what_does_not_match_is_refused_in_a_sentence(
    elsewhere: Path, mapping: dict[str, str], ours: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        MappedDataset(elsewhere, "folder", mapping, ours, KEY)


def test_one_image_is_too_few_for_an_interval(elsewhere: Path) -> None:
    for kind in ("images", "masks"):
        (elsewhere / kind / "test/a.png").unlink()
    with pytest.raises(UserError, match=r"has 1 images with masks in its split 'test'; an interval needs two"):
        MappedDataset(elsewhere, "folder", {}, OURS, KEY)
