import errno
import json
from pathlib import Path

import numpy as np
import pytest
from _folders import make_folder, read_mask, save, truncate
from PIL import Image
from test_layouts import make_camvid

from segdistill.data import importing
from segdistill.data.importing import import_dataset
from segdistill.data.layouts import SPLITS, open_layout
from segdistill.errors import UserError


def test_camvid_becomes_the_folder_layout(tmp_path: Path) -> None:
    source, out = make_camvid(tmp_path / "source", "/SegNet/CamVid/"), tmp_path / "data"
    assert import_dataset("camvid", source, out, workers=1).samples == {"train": 1, "val": 1, "test": 1}
    layout = open_layout("folder", out)
    assert [info.name for info in layout.classes][:2] == ["sky", "building"] and len(layout.classes) == 11
    assert (out / "images/val/a.png").read_bytes() == (source / "val/a.png").read_bytes()
    assert np.all(read_mask(out / "masks/train/a.png") == 255)  # void
    assert np.all(read_mask(out / "masks/val/a.png") == 10)
    assert not any(layout.strays(split) for split in SPLITS)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_images_are_copied_byte_for_byte_and_palette_masks_become_indices(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    labels = read_mask(source / "masks/train/0000.png")
    coloured = Image.fromarray(labels).convert("P")
    coloured.putdata(labels.ravel().tolist())
    coloured.putpalette([200, 10, 10] * 256)
    coloured.save(source / "masks/train/0000.png")
    import_dataset("folder", source, tmp_path / "out", workers=1)
    image = "images/train/0000.jpg"
    assert (tmp_path / "out" / image).read_bytes() == (source / image).read_bytes()
    written = Image.open(tmp_path / "out/masks/train/0000.png")
    assert written.mode == "L" and np.array_equal(np.array(written), labels)


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    for workers in (1, 2):
        import_dataset("folder", source, tmp_path / str(workers), workers=workers)
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert len(files) == 17
    assert all((tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes() for file in files)


def test_a_folder_with_content_is_never_written_to(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        import_dataset("folder", source, out, workers=1)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_broken_sample_stops_the_import_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    truncate(source / "images/train/0002.png")
    (source / "masks/val/0001.png").unlink()
    with pytest.raises(UserError) as caught:
        import_dataset("folder", source, tmp_path / "out", workers=1)
    assert str(caught.value).startswith(f"{source}/images/train/0002.png: damaged or truncated")
    assert str(caught.value).endswith("; 1 more samples cannot be used")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_label_without_meaning_stops_the_import(tmp_path: Path) -> None:
    source = make_camvid(tmp_path / "source")
    save(source / "valannot/a.png", np.full((4, 6), 12, dtype=np.uint8))
    with pytest.raises(UserError) as caught:
        import_dataset("camvid", source, tmp_path / "out", workers=1)
    sentence = "label 12 outside the class list (allowed 0-11), in 24 pixels"
    assert str(caught.value) == f"{source}/valannot/a.png: {sentence}"


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, written = make_folder(tmp_path / "source"), []

    def full(path: Path, content: bytes) -> int:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        with path.open("wb") as file:
            return file.write(content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError) as caught:
        import_dataset("folder", source, tmp_path / "out", workers=1)
    assert str(caught.value) == f"{tmp_path}/out: no space left on the disk; nothing was left there"
    assert len(written) == 3 and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    source = make_camvid(tmp_path / "source")
    (source / "train.txt").write_text("train/a.png trainannot/a.png\n" * 2)
    with pytest.raises(UserError, match="2 images of train are called 'a'"):
        import_dataset("camvid", source, tmp_path / "out", workers=1)


def test_the_class_list_is_readable_json(tmp_path: Path) -> None:
    importing.import_dataset("camvid", make_camvid(tmp_path / "source"), tmp_path / "out", workers=1)
    content = json.loads((tmp_path / "out/classes.json").read_text())
    assert content["ignore_index"] == 255 and content["classes"][8] == {"name": "car", "color": [64, 0, 128]}
