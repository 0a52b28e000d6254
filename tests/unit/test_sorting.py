"""Photos and masks as people keep them become a data set: pairs, classes, splits."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _folders import read_mask, save
from PIL import Image

from segdistill.__main__ import main
from segdistill.data.importing import Imported, import_dataset
from segdistill.data.layouts import SPLITS, open_layout
from segdistill.data.sorting import Wishes, assign_splits
from segdistill.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
LABELS = np.arange(96, dtype=np.uint8).reshape(8, 12) % 3  # [H, W], classes 0, 1 and 2


def flat(root: Path, count: int = 6, image: str = "images/{}.jpg", mask: str = "masks/{}.png") -> Path:
    for number in range(count):
        save(root / image.format(number), PIXELS)
        save(root / mask.format(number), LABELS)
    return root


def bring(root: Path, **wishes: Any) -> Imported:
    return import_dataset("folder", root, root.parent / "out", wishes=Wishes(**wishes), workers=1)


def refusal(root: Path, **wishes: Any) -> str:
    with pytest.raises(UserError) as caught:
        bring(root, **wishes)
    assert not (root.parent / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/{}.jpg", "masks/{}.png"),
        ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
        ("{}.jpg", "{}.png"),
        ("{}.png", "{}_mask.png"),
        ("{}.JPG", "labels/{}.PNG"),
        ("images/drive/{}.jpg", "masks/drive/{}.png"),
        ("photos/{}.png", "gt/{}_gt.png"),
    ],
)
def test_photos_and_masks_find_each_other_however_they_lie(tmp_path: Path, image: str, mask: str) -> None:
    imported = bring(flat(tmp_path / "mine", image=image, mask=mask), classes="sky,road,car")
    assert imported.samples == {"train": 4, "val": 1, "test": 1} and imported.classes == ("sky", "road", "car")
    layout = open_layout("folder", tmp_path / "out")
    assert not any(layout.strays(split) for split in SPLITS)
    for split in SPLITS:
        for sample in layout.samples(split):
            assert sample.mask and np.array_equal(read_mask(sample.mask), LABELS)


@pytest.mark.parametrize("pattern", ["images/{}/0.jpg masks/{}/0.png", "{}/images/0.jpg {}/masks/0.png"])
def test_splits_that_folders_name_are_kept_and_can_be_drawn_anew(tmp_path: Path, pattern: str) -> None:
    source, (image, mask) = tmp_path / "mine", pattern.split()
    for split in ("train", "valid", "test"):
        save(source / image.format(split), PIXELS)
        save(source / mask.format(split), LABELS)
    assert bring(source).samples == {"train": 1, "val": 1, "test": 1}
    (source / mask.format("test")).unlink()
    (source / image.format("test")).unlink()
    (tmp_path / "out").rename(tmp_path / "former")
    assert "no image with a mask in the split test; --split 70/15/15 splits all anew" in refusal(source)


def test_an_image_without_a_mask_is_in_the_split_unlabelled(tmp_path: Path) -> None:
    source = flat(tmp_path / "mine")
    save(source / "images/more.jpg", PIXELS)
    assert bring(source).samples == {"train": 4, "val": 1, "test": 1, "unlabelled": 1}
    assert (tmp_path / "out/images/unlabelled/more.jpg").is_file()


def test_images_that_lack_a_mask_are_named(tmp_path: Path) -> None:
    source = flat(tmp_path / "mine")
    (source / "masks/4.png").unlink()
    assert "without a mask, so in the split 'unlabelled': 4.jpg" in bring(source).notes


def test_a_list_of_pairs_says_which_belong_together(tmp_path: Path) -> None:
    source = flat(tmp_path / "mine", 3, "a/{}/x.jpg", "b/{}.png")
    rows = [f"a/{number}/x.jpg,b/{number}.png,{split}" for number, split in enumerate(SPLITS)]
    (source / "pairs.csv").write_text("\n".join(["image,mask,split", *rows]) + "\n")
    imported = import_dataset("csv", source / "pairs.csv", tmp_path / "out", workers=1)
    assert imported.samples == {"train": 1, "val": 1, "test": 1}
    assert (tmp_path / "out/images/val/a__1__x.jpg").is_file()
    for text, sentence in [
        ("picture,mask\n", "unknown column 'picture'"),
        ("a/0/x.jpg,b/0.png\n", "its first line must name its columns: image,mask or image,mask,split"),
        ("image,mask\n,b/0.png\n", "line 2: expected image,mask"),
        (
            "image,mask\n/a/0/x.jpg,b/0.png\n",
            "line 2: '/a/0/x.jpg' is no path from the list's folder to a file below it",
        ),
        ("image,mask\n" + 200_000 * "a", "line 2: not CSV: field larger than field limit"),
        ("image,mask,split\na/0/x.jpg,b/0.png,trian\n", "line 2: unknown split 'trian'; did you mean 'train'?"),
        ("image,mask\na/0/x.jpg,\n", "no row has an image and a mask"),
    ]:
        (source / "pairs.csv").write_text(text)
        with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
            import_dataset("csv", source / "pairs.csv", tmp_path / "out2", workers=1)


def test_a_list_of_a_spreadsheet_that_writes_semicolons_is_read_alike(tmp_path: Path) -> None:
    source = flat(tmp_path / "mine", 3)
    rows = [f"images/{number}.jpg;masks/{number}.png;{split}" for number, split in enumerate(SPLITS)]
    (source / "pairs.csv").write_text("\r\n".join(["\ufeffimage;mask;split", *rows]) + "\r\n", encoding="utf-8")
    imported = import_dataset("csv", source / "pairs.csv", tmp_path / "out", workers=1)
    assert imported.samples == {"train": 1, "val": 1, "test": 1}


def test_a_seed_below_zero_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = flat(tmp_path / "mine"), tmp_path / "out"
    assert main(["data", "import", "folder", str(source), "--out", str(out), "--seed", "-1"]) == 2
    assert "--seed: -1; allowed: 0 and more" in capsys.readouterr().err
    assert not out.exists()


def test_groups_of_frames_stay_together_and_a_seed_draws_the_same(tmp_path: Path) -> None:
    source = tmp_path / "mine"
    for number in range(20):
        flat(source, 1, f"images/drive{number // 2}_{number % 2}.jpg", f"masks/drive{number // 2}_{number % 2}.png")
    bring(source, group=r"(drive\d+)_", seed=3)
    split_of = {path.stem: path.parent.name for path in (tmp_path / "out/images").rglob("*.jpg")}
    assert all(split_of[f"drive{n}_0"] == split_of[f"drive{n}_1"] for n in range(10))
    assert set(split_of.values()) == set(SPLITS)
    for folder, seed in (("same", 3), ("other", 4)):
        import_dataset("folder", source, tmp_path / folder, wishes=Wishes(group=r"(drive\d+)_", seed=seed), workers=1)
        again = {path.stem: path.parent.name for path in (tmp_path / folder / "images").rglob("*.jpg")}
        assert (again == split_of) == (folder == "same")
    assert "--group: 'ride(' is no regular expression" in str(_error(source, tmp_path, "ride("))
    assert "--group: 'tour' finds nothing in images/drive0_0.jpg" in str(_error(source, tmp_path, "tour"))


def _error(source: Path, tmp_path: Path, group: str) -> UserError:
    with pytest.raises(UserError) as caught:
        import_dataset("folder", source, tmp_path / "none", wishes=Wishes(group=group), workers=1)
    return caught.value


def test_every_class_comes_near_its_share_of_every_split() -> None:
    present = (np.random.default_rng(1).random((400, 5)) < [0.9, 0.5, 0.2, 0.08, 0.03]).astype(int)
    shares = np.array([0.7, 0.15, 0.15])
    chosen = np.array(assign_splits(present, np.ones(400), shares, seed=0))
    for split, share in enumerate(shares):
        assert abs((chosen == split).mean() - share) < 0.02
        assert np.all(np.abs(present[chosen == split].sum(0) - share * present.sum(0)) < 1 + 0.03 * present.sum(0))


@pytest.mark.parametrize("count", [3, 4, 7])
def test_few_images_leave_no_split_empty(tmp_path: Path, count: int) -> None:
    assert set(bring(flat(tmp_path / "mine", count)).samples) == set(SPLITS)


def test_masks_in_colours_are_read_by_the_colours_of_the_classes(tmp_path: Path) -> None:
    source, colours = flat(tmp_path / "mine"), np.array([(128, 64, 128), (0, 0, 142), (0, 0, 0)], dtype=np.uint8)
    for path in (source / "masks").iterdir():
        save(path, colours[LABELS])
    said = refusal(source, classes="road,car")
    assert "pictures in colours that no class has" in said and "#804080" in said and "--classes road=#" in said
    bring(source, classes="road=#804080, car=#00008e", ignore="#000000")
    wanted = np.where(LABELS == 2, 255, LABELS)
    assert all(np.array_equal(read_mask(path), wanted) for path in (tmp_path / "out/masks").rglob("*.png"))
    classes = json.loads((tmp_path / "out/classes.json").read_text())["classes"]
    assert classes[0] == {"name": "road", "color": [128, 64, 128]}


@pytest.mark.parametrize(
    ("stored", "wishes", "labels"),
    [
        ((0, 1, 2), {}, (0, 1, 2)),
        ((0, 1, 255), {}, (0, 1, 255)),
        ((0, 1, 2), {"ignore": "0", "classes": "road,car"}, (255, 0, 1)),
        ((0, 255, 255), {"classes": "rest,road"}, (0, 1, 1)),
        ((0, 255, 255), {}, (0, 1, 1)),
    ],
)
def test_values_are_classes_in_their_order(
    tmp_path: Path, stored: tuple[int, ...], wishes: dict[str, str], labels: tuple[int, ...]
) -> None:
    source = flat(tmp_path / "mine")
    for path in (source / "masks").iterdir():
        save(path, np.array(stored, dtype=np.uint8)[LABELS])
    imported = bring(source, **wishes)
    mask = next((tmp_path / "out/masks/train").iterdir())
    assert np.array_equal(read_mask(mask), np.array(labels, dtype=np.uint8)[LABELS])
    assert len(imported.classes) == len(set(labels) - {255})


def test_an_image_is_read_as_its_orientation_turns_it_and_sizes_may_differ(tmp_path: Path) -> None:
    source = flat(tmp_path / "mine")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(PIXELS).save(source / "images/0.jpg", exif=exif)
    assert "12x8 pixels, but its image has 8x12; images are read as their EXIF orientation turns them" in refusal(
        source
    )
    save(source / "masks/0.png", LABELS.T)
    save(source / "images/1.jpg", np.tile(PIXELS, (2, 2, 1)))
    save(source / "masks/1.png", np.tile(LABELS, (2, 2)))
    assert sum(bring(source).samples.values()) == 6


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: save(s / "images/0.png", PIXELS), "two files for the sample '0'; rename one of them"),
        (lambda s: save(s / "masks/9.png", LABELS), "no image for the masks masks/9.png; a mask has its image's name"),
        (lambda s: (s / "images/x.webp").write_bytes(b"II"), "'.webp' is not read; save photos as JPEG or PNG"),
        (lambda s: [p.unlink() for p in (s / "masks").iterdir()], "no image with a mask; expected images/NAME.jpg"),
        (lambda s: save(s / "masks/0.png", LABELS + 7), "masks store 7-9, which is no class (0 sky, 1 road, 2 car)"),
        (lambda s: (s / "images/0.jpg").write_bytes(b"junk"), "images/0.jpg: not a JPEG or PNG file"),
        (lambda s: (s / "masks/0.png").write_bytes(b"\xff\xd8\xffjunk"), "a JPEG: its compression changes"),
        (lambda s: save(s / "masks/0.png", LABELS[:4]), "masks/0.png: 12x4 pixels, but its image has 12x8"),
    ],
)  # fmt: skip
def test_what_cannot_be_understood_is_one_clear_sentence(tmp_path: Path, change: Any, sentence: str) -> None:
    source = flat(tmp_path / "mine")
    change(source)
    said = refusal(source, classes="sky,road,car")
    assert sentence in said and "\n" not in said


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--split", "70/30", "'70/30' is no TRAIN/VAL/TEST in per cent"),
        ("--split", "70/20/20", "is no TRAIN/VAL/TEST"),
        ("--classes", "a,a,b", "--classes: the name 'a' stands there twice"),
        ("--classes", "a,b=red,c", "--classes: 'b=red' is no class; expected NAME or NAME=#RRGGBB"),
        ("--ignore", "300", "--ignore: '300' is neither a value of a mask, 0 to 255, nor a colour"),
    ],
)
def test_an_option_that_is_none_is_named(
    tmp_path: Path, option: str, value: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(flat(tmp_path / "mine"))
    assert main(["data", "import", "folder", source, "--out", str(tmp_path / "out"), option, value]) == 2
    assert sentence in capsys.readouterr().err


def test_an_import_says_what_it_brought(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(flat(tmp_path / "mine"))
    assert main(["data", "import", "folder", source, "--out", str(tmp_path / "out"), "--split", "60/20/20"]) == 0
    said = capsys.readouterr().out
    assert "6 images: train 4, val 1, test 1" in said and "--classes names them" in said
    assert "split 60/20/20 by classes, seed 0" in said
    assert Counter(path.suffix for path in (tmp_path / "out").rglob("*.*")) == {".jpg": 6, ".png": 6, ".json": 1}
