import json
import os
from pathlib import Path

import numpy as np
import pytest
from _folders import CLASSES, make_folder, save, write_classes

from segdistill.data.layouts import IGNORE_INDEX, UNKNOWN, open_layout
from segdistill.data.layouts.layout import describe_values
from segdistill.errors import UserError

SHARED_CAMVID = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "camvid"


def make_camvid(root: Path, prefix: str = "") -> Path:
    """One sample a split, listed as ``<prefix>train/a.png <prefix>trainannot/a.png``."""
    for number, split in enumerate(("train", "val", "test")):
        save(root / split / "a.png", np.full((4, 6, 3), number, dtype=np.uint8))
        save(root / f"{split}annot" / "a.png", np.full((4, 6), 11 - number, dtype=np.uint8))
        (root / f"{split}.txt").write_text(f"{prefix}{split}/a.png {prefix}{split}annot/a.png\n")
    return root


def message(name: str, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_layout(name, root)
    return str(caught.value)


def test_an_unknown_layout_is_answered_with_the_nearest_one(tmp_path: Path) -> None:
    assert message("camvd", tmp_path) == "unknown layout 'camvd'; did you mean 'camvid'?"
    assert message("xyz", tmp_path).startswith("unknown layout 'xyz'; allowed: folder, camvid, ")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert message("folder", tmp_path / "nowhere").startswith(f"{tmp_path / 'nowhere'}: no such folder")


def test_folder_lists_its_samples_in_the_order_of_their_names(tmp_path: Path) -> None:
    layout = open_layout("folder", make_folder(tmp_path, {"train": 12}))
    samples = list(layout.samples("train"))
    assert [sample.id for sample in samples] == [f"{number:04d}" for number in range(12)]
    assert samples[0].image == tmp_path / "images/train/0000.jpg"
    assert samples[0].mask == tmp_path / "masks/train/0000.png"
    assert list(layout.samples("val")) == []
    assert [info.name for info in layout.classes] == list(CLASSES)


def test_folder_maps_class_indices_to_themselves_and_marks_the_rest(tmp_path: Path) -> None:
    write_classes(make_folder(tmp_path), ignore_index=200)
    table = open_layout("folder", tmp_path).legend.label_map
    assert table.shape == (256,) and table.dtype == np.uint8
    assert list(table[:3]) == [0, 1, 2] and table[200] == IGNORE_INDEX
    assert set(table[3:200]) | set(table[201:]) == {UNKNOWN}


def test_a_folder_of_an_unknown_split_is_an_error_with_the_nearest_one(tmp_path: Path) -> None:
    (make_folder(tmp_path) / "images" / "tests").mkdir()
    assert message("folder", tmp_path) == f"{tmp_path}/images/tests: unknown split 'tests'; did you mean 'test'?"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not valid JSON"),
        ("[1]", "classes.json: input should be an object, not [1]"),
        (
            '{"classes": [{"name": "a\\nb", "color": [0, 0, 0]}, {"name": "c", "color": [0, 0, 0]}]}',
            r"classes.0.name: 'a\nb' has characters that no table can show",
        ),
        ('{"classes": [{"name": "a", "color": [0, 0, 256]}]}', "classes.0.color.2: input should be less than"),
        ('{"classes": [{"name": "a", "colour": [0, 0, 0]}]}', "classes.0.colour: unknown key; did you mean 'color'?"),
        ('{"classes": [{"name": "a", "color": [0, 0, 0]}]}', "classes: 1 given; allowed: 2 to 254"),
    ],
)
def test_a_wrong_class_list_is_described(tmp_path: Path, content: str, sentence: str) -> None:
    (make_folder(tmp_path) / "classes.json").write_text(content)
    found = message("folder", tmp_path)
    assert found.startswith(f"{tmp_path}/classes.json: ") and sentence in found


def test_class_names_and_the_ignore_index_must_not_clash(tmp_path: Path) -> None:
    make_folder(tmp_path)
    write_classes(tmp_path, ignore_index=2)
    assert "ignore_index: 2 is also the index of a class; allowed: 3 to 255" in message("folder", tmp_path)
    write_classes(tmp_path, classes=[{"name": "a", "color": [0, 0, 0]}] * 2)
    assert "the name 'a' stands there twice" in message("folder", tmp_path)
    (tmp_path / "classes.json").unlink()
    assert message("folder", tmp_path).startswith(f"{tmp_path}/classes.json: no such file")


def test_a_class_list_may_say_what_a_stored_value_means(tmp_path: Path) -> None:
    make_folder(tmp_path)
    write_classes(tmp_path, values={"0": "sky", "255": "car", "7": "car", "9": None})
    (tmp_path / "classes.json").write_text("\ufeff" + (tmp_path / "classes.json").read_text())
    content = json.loads((tmp_path / "classes.json").read_text(encoding="utf-8-sig"))
    del content["ignore_index"]
    (tmp_path / "classes.json").write_text(json.dumps(content))
    table = open_layout("folder", tmp_path).legend.label_map
    assert [int(table[value]) for value in (0, 255, 7, 9)] == [0, 2, 2, IGNORE_INDEX]
    assert set(table[1:7]) == {UNKNOWN}
    write_classes(tmp_path, values={"0": "sky", "1": "road"}, ignore_index=200)
    assert open_layout("folder", tmp_path).legend.label_map[200] == IGNORE_INDEX


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"256": "sky"}, "values: '256' is no value of a mask; allowed: 0 to 255"),
        ({"07": "sky"}, "values: '07' is no value of a mask"),
        ({"0": "skyy"}, "values.0: no class 'skyy'; did you mean 'sky'?"),
        ({"255": "sky"}, "ignore_index: 255 is also a value of 'sky'; say one of both"),
    ],
)
def test_a_wrong_table_of_values_is_described(tmp_path: Path, values: dict[str, str], said: str) -> None:
    write_classes(make_folder(tmp_path), values=values)
    assert message("folder", tmp_path).startswith(f"{tmp_path}/classes.json: {said}")


def test_doubled_keys_and_a_pipe_as_class_list_are_refused(tmp_path: Path) -> None:
    path = make_folder(tmp_path) / "classes.json"
    path.write_text('{"classes": [], "classes": []}')
    assert message("folder", tmp_path) == f"{path}: not valid JSON: the key 'classes' twice"
    path.unlink()
    os.mkfifo(path)
    assert message("folder", tmp_path) == f"{path}: a named pipe; expected a regular file"


def test_suffixes_may_be_in_capital_letters(tmp_path: Path) -> None:
    make_folder(tmp_path)
    for kind in ("images", "masks"):
        (tmp_path / kind / "train/0001.png").rename(tmp_path / kind / "train/0001.PNG")
    layout = open_layout("folder", tmp_path)
    sample = list(layout.samples("train"))[1]
    assert sample.image.name == sample.mask.name == "0001.PNG" and sample.mask.exists()
    assert layout.strays("train") == []


def test_sub_folders_and_other_formats_are_the_reason_for_no_sample(tmp_path: Path) -> None:
    for place, said in (
        ("train/aachen/a.png", "there is images/train/aachen (a sub-folder: samples lie in images/train itself)"),
        ("val/a.BMP", "there is images/val/a.BMP ('.BMP' is not read: save it as JPEG or PNG)"),
        ("a.png", "expected JPEG or PNG files in images/train, images/val, images/test"),
    ):
        root = tmp_path / place.replace("/", "-")
        (root / "masks").mkdir(parents=True)
        (root / "images" / place).parent.mkdir(parents=True)
        (root / "images" / place).write_bytes(b"")
        write_classes(root)
        layout = open_layout("folder", root)
        assert str(layout.without_samples()) == f"{root}: no sample in any split of the layout 'folder'; {said}"


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_name_that_is_not_utf_8_gets_its_sentence(tmp_path: Path, kind: str) -> None:
    folder = os.fsencode(make_folder(tmp_path) / kind / "train")
    Path(os.fsdecode(folder + b"/stra\xdfe.png")).touch()
    with pytest.raises(UserError) as caught:
        list(open_layout("folder", tmp_path).samples("train"))
    assert str(caught.value) == f"{tmp_path}/{kind}/train/stra\\xdfe.png: its name is not UTF-8; rename it"


def test_strays_are_files_without_a_sample(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "images/train/0001.png").unlink()
    (tmp_path / "images/train/notes.txt").write_text("x")
    (tmp_path / "images/train/.DS_Store").write_text("x")
    layout = open_layout("folder", tmp_path)
    assert layout.strays("train") == [tmp_path / "images/train/notes.txt", tmp_path / "masks/train/0001.png"]
    assert layout.strays("val") == []


@pytest.mark.parametrize("prefix", ["", "/SegNet/CamVid/"])
def test_camvid_reads_relative_lists_and_those_of_the_original(tmp_path: Path, prefix: str) -> None:
    layout = open_layout("camvid", make_camvid(tmp_path, prefix))
    (sample,) = layout.samples("test")
    assert (sample.id, sample.split) == ("a", "test")
    assert sample.image == tmp_path / "test/a.png" and sample.mask == tmp_path / "testannot/a.png"
    assert sample.image.exists() and sample.mask.exists()


@pytest.mark.parametrize(
    "line",
    [
        "\ufefftest/a.png testannot/a.png",
        "  test\\a.png\ttestannot\\a.png  \r",
        "C:\\Data\\CamVid\\test\\a.png C:\\Data\\CamVid\\testannot\\a.png",
        "\"test/a.png\" 'testannot/a.png'",
        "/my data/test/a.png /my data/testannot/a.png",
        "'/my data/test/a.png' '/my data/testannot/a.png'",
    ],
)
def test_camvid_reads_lists_as_people_have_them(tmp_path: Path, line: str) -> None:
    root = make_camvid(tmp_path)
    (root / "test.txt").write_text(f"{line}\n\n")
    (sample,) = open_layout("camvid", root).samples("test")
    assert sample.image == tmp_path / "test/a.png" and sample.mask == tmp_path / "testannot/a.png"


def test_camvid_reads_names_with_spaces(tmp_path: Path) -> None:
    root = make_camvid(tmp_path)
    (root / "test.txt").write_text("test/street 1.JPG testannot/street 1.png\n")
    (sample,) = open_layout("camvid", root).samples("test")
    assert sample.image == tmp_path / "test/street 1.JPG" and sample.mask == tmp_path / "testannot/street 1.png"


def test_camvid_ignores_void(tmp_path: Path) -> None:
    table = open_layout("camvid", make_camvid(tmp_path)).legend.label_map
    assert list(table[:11]) == list(range(11)) and table[11] == IGNORE_INDEX and table[12] == table[255] == UNKNOWN


@pytest.mark.parametrize("line", [
    "train/a.png", "a.png b.png", "../x/../secret train/a.png", "a/b c/d e/f", "/a.png train/a.png",
    "//a.png train/a.png", "train/a.png ../a.png", "train/a.png x/../../a.png",
    "a/b.png " * 100_000,
])  # fmt: skip
def test_a_camvid_line_that_is_no_pair_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    path = make_camvid(tmp_path) / "val.txt"
    path.write_text(f"val/a.png valannot/a.png\n{line}\n")
    assert message("camvid", tmp_path).startswith(f"{path}, line 2: expected 'FOLDER/IMAGE FOLDER/MASK', found ")


def test_camvid_without_a_list_names_the_list(tmp_path: Path) -> None:
    (make_camvid(tmp_path) / "test.txt").unlink()
    assert message("camvid", tmp_path).startswith(f"{tmp_path}/test.txt: no such file")


@pytest.mark.skipif(not SHARED_CAMVID.is_dir(), reason="the CamVid copy beside the checkout is absent")
def test_the_real_camvid_has_the_published_split() -> None:
    layout = open_layout("camvid", SHARED_CAMVID)
    assert [len(list(layout.samples(split))) for split in ("train", "val", "test")] == [367, 101, 233]
    assert not any(layout.strays(split) for split in ("train", "val", "test"))
    assert len(layout.classes) == 11


def test_values_are_described_as_ranges() -> None:
    assert describe_values([0, 1, 2, 255]) == "0-2 and 255"
    assert describe_values([7]) == "7"
    assert describe_values([1, 3, 4, 9]) == "1, 3-4 and 9"
    assert json.dumps(describe_values([])) == '""'
