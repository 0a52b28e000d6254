"""The embedded data set: every scene from (seed, index) alone, the same bytes everywhere."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segdistill import streets
from segdistill.errors import UserError

SMALL = {"train": 33, "val": 2, "test": 2}
TINY = {"train": 2, "val": 1, "test": 1}


def digest(folder: Path) -> str:
    """One hash of every name and byte below a folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    return [streets.scene(0, index) for index in range(60)]


@pytest.fixture(scope="module")
def shares(scenes: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Per cent of the pixels that each label value has, [256]."""
    counts = sum(np.bincount(mask.ravel(), minlength=256) for _, mask in scenes)
    return np.asarray(100.0 * counts / np.sum(counts))


def test_a_scene_depends_on_seed_and_index_alone(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for index in (7, 3):  # another order than the fixture's
        image, mask = streets.scene(0, index)
        assert np.array_equal(image, scenes[index][0])
        assert np.array_equal(mask, scenes[index][1])


def test_scenes_with_another_index_or_seed_differ(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    assert len({image.tobytes() for image, _ in scenes}) == len(scenes)
    assert len({mask.tobytes() for _, mask in scenes}) == len(scenes)
    assert not np.array_equal(streets.scene(1, 0)[0], scenes[0][0])


SOME_SCENES = ((0, 0, (128, 96)), (0, 20_000_003, (128, 96)), (5, 11, (97, 65)))
HASH_SOME_SCENES = f"""
import hashlib
from segdistill.streets import scene
total = hashlib.sha256()
for seed, index, size in {SOME_SCENES}:
    for array in scene(seed, index, size):
        total.update(array.tobytes())
print(total.hexdigest())
"""


def test_these_scenes_have_the_bytes_they_always_had_also_on_an_older_cpu() -> None:
    vectors = np._core._multiarray_umath  # type: ignore[attr-defined]
    present = [name for name in vectors.__cpu_dispatch__ if vectors.__cpu_features__.get(name)]
    for unused in ("", " ".join(present)):
        environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": unused}
        command = [sys.executable, "-c", HASH_SOME_SCENES]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        # If you change the generator on purpose, update this and data.dvc.
        assert printed.strip() == "244ee9e91b21178b4ed6ae5722e726ffbff0746e37054d5c7c1ad20686783ec2", (
            f"without {unused or 'nothing'}"
        )


@pytest.mark.parametrize("size", [(128, 96), (97, 65), (65, 97), (16, 16), (240, 180)])
def test_a_scene_has_the_size_it_is_asked_for(size: tuple[int, int]) -> None:
    image, mask = streets.scene(0, 1, size)
    assert image.shape == (size[1], size[0], 3)
    assert mask.shape == (size[1], size[0])
    assert image.dtype == mask.dtype == np.uint8


def test_the_same_scene_at_another_size_shows_the_same_street() -> None:
    small, large = streets.scene(0, 2, (64, 48))[1], streets.scene(0, 2, (128, 96))[1]
    valid = (small != 255) & (large[::2, ::2] != 255)
    assert (small == large[::2, ::2])[valid].mean() > 0.9


def test_labels_are_classes_or_void(shares: np.ndarray) -> None:
    assert set(np.flatnonzero(shares)) == {*range(11), 255}


def test_every_class_occurs_in_sixty_scenes(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    present = np.unique(np.concatenate([np.unique(mask) for _, mask in scenes]))
    assert set(range(11)) <= set(present.tolist())


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("sky", 8, 25),
        ("building", 15, 35),
        ("pole", 0.6, 2.0),
        ("road", 22, 42),
        ("pavement", 3, 9),
        ("tree", 5, 16),
        ("sign_symbol", 0.6, 2.0),
        ("fence", 0.5, 2.5),
        ("car", 3, 9),
        ("pedestrian", 0.4, 1.3),
        ("bicyclist", 0.2, 0.9),
        ("void", 1.5, 6.0),
    ],
)
def test_shares_of_the_classes_are_like_those_of_real_streets(
    shares: np.ndarray, name: str, low: float, high: float
) -> None:
    names = [class_name for class_name, _ in streets.CLASSES]
    assert low < shares[255 if name == "void" else names.index(name)] < high


def test_colour_does_not_give_the_class_away(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """A table of the commonest class of every colour, fitted to these very scenes, misses most of the thin classes."""
    images, masks = np.stack([image for image, _ in scenes]), np.stack([mask for _, mask in scenes])
    colours = (images // 32).astype(np.int64) @ np.array([64, 8, 1])
    table = np.zeros((512, 11), dtype=np.int64)
    valid = masks != 255
    np.add.at(table, (colours[valid], masks[valid]), 1)
    guess = table.argmax(axis=1)[colours]
    for label in (2, 6, 7, 9, 10):
        assert (guess[masks == label] == label).mean() < 0.2


def test_written_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    streets.write(tmp_path / "one", seed=4, size=(48, 32), samples=SMALL, workers=1)
    streets.write(tmp_path / "two", seed=4, size=(48, 32), samples=dict(reversed(SMALL.items())), workers=2)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]  # no temporary folder left


def test_a_scene_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    streets.write(tmp_path / "few", size=(48, 32), samples=TINY, workers=1)
    streets.write(tmp_path / "more", size=(48, 32), samples={"train": 5, "val": 3, "test": 2}, workers=1)
    for path in (tmp_path / "few").rglob("*_*.*"):
        assert path.read_bytes() == (tmp_path / "more" / path.relative_to(tmp_path / "few")).read_bytes()


def test_the_folder_holds_pictures_masks_and_classes(tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()  # an empty folder may stand there
    streets.write(out, size=(97, 65), samples=TINY, classes="all", workers=1)
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == [
        "README.txt",
        "classes.json",
        "images/test/test_00000.jpg",
        "images/train/train_00000.jpg",
        "images/train/train_00001.jpg",
        "images/val/val_00000.jpg",
        "masks/test/test_00000.png",
        "masks/train/train_00000.png",
        "masks/train/train_00001.png",
        "masks/val/val_00000.png",
    ]
    image, mask = streets.scene(0, streets.FIRST_INDEX["val"], (97, 65))
    with Image.open(out / "masks/val/val_00000.png") as stored:
        assert stored.mode == "L"
        assert np.array_equal(np.asarray(stored), mask)
    with Image.open(out / "images/val/val_00000.jpg") as stored:
        assert (stored.mode, stored.size) == ("RGB", (97, 65))
        assert np.abs(np.asarray(stored).astype(int) - image).mean() < 6


def test_classes_json_names_camvids_classes_in_its_order(tmp_path: Path) -> None:
    streets.write(tmp_path / "data", size=(32, 24), samples=TINY, classes="all", workers=1)
    stored = json.loads((tmp_path / "data" / "classes.json").read_text())
    assert stored["ignore_index"] == 255
    names = [entry["name"] for entry in stored["classes"]]
    assert " ".join(names) == "sky building pole road pavement tree sign_symbol fence car pedestrian bicyclist"
    assert stored["classes"][4] == {"name": "pavement", "color": [60, 40, 222]}


def test_the_default_data_label_the_large_classes_of_the_same_pictures(tmp_path: Path) -> None:
    for classes in ("all", "large"):
        streets.write(tmp_path / classes, size=(64, 48), samples=TINY, classes=classes, workers=1)
    names = {
        classes: [entry["name"] for entry in json.loads((tmp_path / classes / "classes.json").read_text())["classes"]]
        for classes in ("all", "large")
    }
    assert " ".join(names["large"]) == "sky building road pavement tree car"
    for path in sorted((tmp_path / "all/masks").rglob("*.png")):
        whole, large = (np.asarray(Image.open(tmp_path / one / path.relative_to(tmp_path / "all"))) for one in names)
        for index, name in enumerate(names["all"]):
            expected = names["large"].index(name) if name in names["large"] else 255
            assert (large[whole == index] == expected).all()
    pictures = [digest(tmp_path / classes / "images") for classes in ("all", "large")]
    assert pictures[0] == pictures[1]


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"exists and is not an empty folder") as error:
        streets.write(tmp_path, samples=TINY)
    assert str(tmp_path) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (128, 8)}, "size.1: "),
        ({"size": (128.0, 96)}, "size.0: "),
        ({"seed": -1}, "seed: "),
        ({"samples": {"train": 0, "val": 1, "test": 1}}, "samples.train: "),
        ({"samples": {"train": 1, "val": True, "test": 1}}, "samples.val: "),
        ({"samples": {"train": 1, "val": 1}}, "samples.test: missing"),
        ({"samples": {"trian": 1, "val": 1, "test": 1}}, "did you mean 'train'"),
    ],
)
def test_a_bad_argument_is_named(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        streets.write(tmp_path / "data", **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes, written = Path.write_bytes, []

    def full_after_three(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_after_three)
    with pytest.raises(UserError, match="no space left") as error:
        streets.write(tmp_path / "data", size=(32, 24), samples=TINY, workers=1)
    assert str(tmp_path / "data") in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_place_where_no_folder_can_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="exists and is no folder"):
        streets.write(tmp_path / "file" / "data", samples=TINY, workers=1)
