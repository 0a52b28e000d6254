import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _folders import make_folder, read_mask, save, truncate
from PIL import Image

from segdistill.config import parse
from segdistill.data.checks import inspect, value_counts
from segdistill.data.layouts import open_layout
from segdistill.engine.tracker import JsonLinesTracker, Tracker
from segdistill.errors import UserError
from segdistill.stages.validate import Config, run

pytest.importorskip("great_expectations", reason="the pipeline extra is not installed")

SETTINGS: dict[str, Any] = {
    "layout": "folder",
    "min_samples": {"train": 1, "val": 1, "test": 1},
    "max_ignore_fraction": 0.5,
    "min_class_share": 0.01,
    "workers": 1,
}


def validate(data: Path, report: Path, tracker: Tracker | None = None, **changes: Any) -> dict[str, Any]:
    run(parse(Config, SETTINGS | changes, "validate"), data=data, report=report, tracker=tracker or Tracker())
    return json.loads((report / "summary.json").read_text())


def failure(data: Path, report: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        validate(data, report, **changes)
    return str(caught.value)


def sentences(summary: dict[str, Any], kind: str) -> list[str]:
    return [sentence for finding in summary[kind] for sentence in finding["sentences"]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data")


def save_16_bit(path: Path) -> None:
    Image.fromarray(np.full((8, 12), 300, dtype=np.uint16)).save(path)


def save_with_palette(path: Path, colours: list[tuple[int, int, int]]) -> None:
    mask = Image.fromarray(read_mask(path)).convert("P")
    mask.putdata(read_mask(path).ravel().tolist())
    mask.putpalette([channel for colour in (colours * 86)[:256] for channel in colour])
    mask.save(path)


def save_with_label(path: Path, label: int, pixels: int) -> None:
    labels = read_mask(path)
    labels.ravel()[-pixels:] = label
    save(path, labels)


# What is done to mask or image `train/0002`, the file that is named, and what is said of it.
FAULTS: list[tuple[str, Callable[[Path, Path], object], str, str]] = [
    ("missing mask", lambda image, mask: mask.unlink(), "mask",
     "missing, but its image images/train/0002.png is there"),
    ("truncated image", lambda image, mask: truncate(image), "image", "damaged or truncated: "),
    ("empty image", lambda image, mask: image.write_bytes(b""), "image", "empty file"),
    ("no image at all", lambda image, mask: image.write_text("hello"), "image",
     "not a JPEG or PNG file, or its header is damaged"),
    ("truncated mask", lambda image, mask: truncate(mask), "mask", "damaged or truncated: "),
    ("JPEG as mask", lambda image, mask: Image.new("L", (12, 8)).save(mask, format="JPEG"), "mask",
     "a JPEG: its compression changes labels; make masks as PNG"),
    ("size mismatch", lambda image, mask: save(mask, np.zeros((8, 10), dtype=np.uint8)), "mask",
     "10x8 pixels, but its image has 12x8"),
    ("unknown label", lambda image, mask: save_with_label(mask, 12, 34), "mask",
     "label 12 outside the class list (allowed 0-2 and 255), in 34 pixels"),
    ("16-bit mask", lambda image, mask: save_16_bit(mask), "mask", "16-bit grey where an index mask is due"),
    ("RGB mask", lambda image, mask: save(mask, np.zeros((8, 12, 3), dtype=np.uint8)), "mask",
     "8-bit RGB where an index mask is due"),
    ("pipe as image", lambda image, mask: (image.unlink(), os.mkfifo(image)), "image",
     "a named pipe; expected a regular file"),
    ("endless mask", lambda image, mask: (mask.unlink(), mask.symlink_to("/dev/zero")), "mask",
     "a device; expected a regular file"),
    ("mask that leads to itself", lambda image, mask: (mask.unlink(), mask.symlink_to(mask)), "mask",
     "cannot be read: Too many levels of symbolic links"),
    ("sparse image", lambda image, mask: os.truncate(image, 2**40), "image", "1048576.0 MiB; at most 256 MiB are read"),
    ("contradicting palette", lambda image, mask: save_with_palette(mask, [(1, 0, 0), (0, 0, 0), (2, 0, 0)]), "mask",
     "its palette contradicts the class list: value 0 is class 0 there, but has the colour (1, 0, 0) of class 1; "
     "order both alike, or change the colours of the list"),
    ("image in two splits", lambda image, mask: shutil.copy(image, image.parents[1] / "val" / "0000.png"), "image",
     "the same image as images/val/0000.png; an image may be in one split only; 1 more file fails"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "kind", "said"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_one_sentence_that_names_the_file(
    data: Path, tmp_path: Path, fault: Callable[[Path, Path], object], kind: str, said: str
) -> None:
    files = {"image": data / "images/train/0002.png", "mask": data / "masks/train/0002.png"}
    fault(files["image"], files["mask"])
    report = tmp_path / "report"
    sentence = failure(data, report)
    assert sentence.startswith(f"{files[kind]}: {said}")
    assert sentence.endswith((f", see {report / 'summary.md'}", f"; see {report / 'summary.md'}"))
    summary = json.loads((report / "summary.json").read_text())
    assert summary["success"] is False and str(files[kind]) in summary["failures"][0]["names"]
    assert len(summary["failures"]) == 1, "one fault breaks one rule"
    assert str(files[kind]) in (report / "summary.md").read_text()
    assert (report / "data_docs/index.html").exists()


def test_a_whole_data_set_passes_and_the_numbers_are_logged(data: Path, tmp_path: Path) -> None:
    tracker = JsonLinesTracker(tmp_path / "log.jsonl")
    summary = validate(data, tmp_path / "report", tracker)
    assert summary["success"] is True and summary["failures"] == summary["warnings"] == []
    assert summary["samples"] == {"train": 4, "val": 2, "test": 2}
    assert sum(row["train_share"] for row in summary["classes"]) == pytest.approx(1)
    (logged,) = [record for record in map(json.loads, (tmp_path / "log.jsonl").open()) if record["kind"] == "metrics"]
    assert logged["values"]["data/samples/train"] == 4 and logged["values"]["data/failures"] == 0


def test_the_same_data_gives_the_same_report_and_no_page_calls_home(data: Path, tmp_path: Path) -> None:
    pages = []
    for name in ("first", "second"):
        validate(data, tmp_path / name, workers=1)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        pages.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert pages[0] == pages[1]
    html = b"".join(content for path, content in pages[0].items() if path.suffix == ".html")
    assert b"amazonaws" not in html and str(tmp_path).encode() not in html
    assert b"8 samples with 3 channels of 8 bits (train 4, val 2, test 2)" in pages[0][Path("summary.html")]


def test_many_broken_files_are_counted_and_all_are_listed(data: Path, tmp_path: Path) -> None:
    truncate(data / "images/train/0001.png")
    (data / "masks/train/0002.png").unlink()
    save_with_label(data / "masks/val/0000.png", 12, 1)
    sentence = failure(data, tmp_path / "report")
    assert sentence.startswith(f"{data}/images/train/0001.png: damaged or truncated")
    assert sentence.endswith(f"; 2 more files fail, see {tmp_path}/report/summary.md")
    found = sentences(json.loads((tmp_path / "report/summary.json").read_text()), "failures")
    assert len(found) == 3 and "label 12 outside the class list (allowed 0-2 and 255), in 1 pixel" in found[2]


def test_an_empty_split_stops(data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "images/val")
    shutil.rmtree(data / "masks/val")
    assert failure(data, tmp_path / "report").startswith(
        f"{data}/images/val: no samples in the split 'val'; validate.min_samples.val asks for 1; see "
    )
    shutil.rmtree(data / "images")
    (data / "images").mkdir()
    assert failure(data, tmp_path / "report") == (
        f"{data}: no sample in any split of the layout 'folder'; "
        "expected JPEG or PNG files in images/train, images/val, images/test"
    )


def test_too_few_samples_or_too_much_void_stop(data: Path, tmp_path: Path) -> None:
    sentence = failure(
        data, tmp_path / "report", min_samples={"train": 5, "val": 1, "test": 1}, max_ignore_fraction=0.01
    )
    assert "4 samples in the split 'train'; validate.min_samples.train asks for 5" in sentence
    found = sentences(json.loads((tmp_path / "report/summary.json").read_text()), "failures")
    assert (
        f"{data}/masks/val: 2.1% of the pixels are ignored on average; validate.max_ignore_fraction allows 1.0%"
        in found
    )


def test_palettes_that_agree_or_speak_of_something_else_are_taken(data: Path, tmp_path: Path) -> None:
    save_with_palette(data / "masks/train/0002.png", [(0, 0, 0), (1, 0, 0), (2, 0, 0)])  # those of classes.json
    save_with_palette(data / "masks/train/0003.png", [(0, 0, 0), (128, 0, 0), (1, 0, 0)])
    assert validate(data, tmp_path / "report")["success"] is True


def test_a_palette_with_a_background_of_its_own_contradicts_a_list_without(data: Path, tmp_path: Path) -> None:
    save_with_palette(data / "masks/train/0002.png", [(9, 9, 9), (0, 0, 0), (1, 0, 0)])
    with pytest.raises(UserError, match=r"value 1 is class 1 there, but has the colour \(0, 0, 0\) of class 0"):
        validate(data, tmp_path / "report")


def test_a_bar_in_the_name_of_a_class_breaks_no_table(data: Path, tmp_path: Path) -> None:
    classes = json.loads((data / "classes.json").read_text())
    classes["classes"][0]["name"] = "a|b"
    (data / "classes.json").write_text(json.dumps(classes))
    validate(data, tmp_path / "report")
    rows = (tmp_path / "report/summary.md").read_text().splitlines()
    assert len([row for row in rows if row.startswith(("| a\\|b |", "| 0 | a\\|b |"))]) == 2


def store(data: Path, values: dict[int, int], splits: str = "*") -> None:
    """Stores other values in the masks of some splits."""
    for path in data.glob(f"masks/{splits}/*.png"):
        labels = read_mask(path)
        save(path, np.vectorize(lambda value: values.get(value, value), otypes=[np.uint8])(labels))


def test_masks_of_0_and_255_stop_with_a_hint_and_pass_when_their_values_are_declared(
    data: Path, tmp_path: Path
) -> None:
    store(data, {1: 255, 2: 255})
    sentence = failure(data, tmp_path / "report")
    assert sentence.startswith(
        f"{data}/masks/train: 'sky' is the only class with labels; at least two are needed to learn from; "
    )
    assert (
        "of the pixels store 255, which is read as 'no label': if it is a class, say so under 'values' in" in sentence
    )
    content = json.loads((data / "classes.json").read_text())
    del content["ignore_index"]
    (data / "classes.json").write_text(json.dumps(content | {"values": {"0": "sky", "255": "road"}}))
    summary = validate(data, tmp_path / "report")
    assert summary["success"] is True
    assert [(row["value"], row["read_as"]) for row in summary["values"]] == [(0, "sky"), (255, "road")]
    assert sum(row["train_pixels"] for row in summary["values"]) == 4 * 96
    (row,) = [line for line in (tmp_path / "report/summary.md").read_text().splitlines() if line.startswith("| 255 ")]
    assert row.startswith("| 255 | road | ")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_without_any_label_stops(data: Path, tmp_path: Path, split: str) -> None:
    store(data, {0: 255, 1: 255, 2: 255}, split)
    sentence = failure(data, tmp_path / "report", max_ignore_fraction=1.0)
    assert sentence.startswith(
        f"{data}/masks/{split}: every pixel is ignored; the split cannot be scored, or learnt from"
    )


def test_every_pixel_is_ignored_is_said_only_where_it_is_so(data: Path, tmp_path: Path) -> None:
    save(data / "masks/val/0000.png", np.full((8, 12), 77, dtype=np.uint8))
    save(data / "masks/val/0001.png", np.full((8, 12), 77, dtype=np.uint8))
    save(data / "masks/train/0001.png", np.full((8, 12), 255, dtype=np.uint8))
    failure(data, tmp_path / "report", max_ignore_fraction=1.0)
    report = (tmp_path / "report/summary.json").read_text()
    assert report.count("every pixel is ignored") == 1 and "train/0001.png: every pixel is ignored" in report


def test_counting_a_large_mask_takes_little_memory_beside_it(tmp_path: Path) -> None:
    import tracemalloc

    values = np.zeros((6000, 4000), dtype=np.uint8)  # 24 MB
    tracemalloc.start()
    counts = value_counts(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts == {0: 24_000_000} and peak < 2 * values.nbytes


def test_a_data_set_without_one_whole_file_is_still_described(data: Path, tmp_path: Path) -> None:
    for path in [*data.glob("images/*/*"), *data.glob("masks/*/*")]:
        path.write_bytes(b"broken")
    assert failure(data, tmp_path / "report").endswith(f"; 15 more files fail, see {tmp_path}/report/summary.md")


def test_warnings_are_shown_and_do_not_stop(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in data.glob("masks/train/*.png"):
        labels = read_mask(path)
        labels[labels == 2] = 0
        save(path, labels)
    (data / "images/test/0001.png").unlink()
    shutil.copy(data / "images/train/0001.png", data / "images/train/0002.png")
    with caplog.at_level(logging.WARNING):
        summary = validate(data, tmp_path / "report")
    assert summary["success"] is True
    expected = [
        "class 'car': never seen in train; it cannot be learnt",
        f"{data}/masks/test: 1 file of no sample: masks/test/0001.png (a mask without an image)",
        f"{data}/images/train/0001.png: one of 2 equal images in train",
    ]
    found = sentences(summary, "warnings")
    assert all(sentence in found and f"warning: {sentence}" in caplog.messages for sentence in expected)
    assert len(found) == 4  # the other of the two equal images


def test_a_rare_class_is_a_warning(data: Path, tmp_path: Path) -> None:
    summary = validate(data, tmp_path / "report", min_class_share=0.9)
    assert summary["success"] is True
    assert sorted(finding["names"] for finding in summary["warnings"]) == [
        ["class 'sky'", "class 'road'", "class 'car'"]
    ]


def test_an_unknown_layout_is_answered_with_the_nearest_one(data: Path, tmp_path: Path) -> None:
    assert failure(data, tmp_path / "report", layout="foldr") == "unknown layout 'foldr'; did you mean 'folder'?"


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    sentence = failure(data, tmp_path / "report")
    assert sentence == f"{tmp_path}/report: no space left on the disk; nothing was left there"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_facts_are_the_same_in_one_process_and_in_several(data: Path) -> None:
    truncate(data / "images/train/0001.png")
    layout = open_layout("folder", data)
    samples = list(layout.samples("train"))
    alone, together = (list(inspect(layout, samples, workers=workers)) for workers in (1, 2))
    assert alone == together and [fact.sample_id for fact in alone] == ["0000", "0001", "0002", "0003"]
    assert alone[1].image_problem and alone[1].mask_problem is None
    assert sum(alone[0].class_pixels or ()) == 12 * 8 - 2
    assert alone[0].ignore_fraction == pytest.approx(2 / 96)


def test_a_config_value_outside_its_range_is_named() -> None:
    with pytest.raises(UserError, match=r"validate\.min_samples\.val: input should be greater than or equal to 1"):
        parse(Config, SETTINGS | {"min_samples": {"train": 1, "val": 0, "test": 1}}, "validate")


def test_a_sound_data_set_is_told_with_its_numbers(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "segdistill")
    summary = validate(data, tmp_path / "report")
    counts, images = summary["samples"], sum(summary["samples"].values())
    splits = ", ".join(f"{split} {count}" for split, count in counts.items())
    said = caplog.messages[-1]
    pixels = "with 3 channels of 8 bits"
    assert said.startswith(f"{data} is sound: {images} images ({splits}) {pixels}, {len(summary['classes'])} classes; ")
    assert "checks passed" in said and said.endswith(f"see {tmp_path / 'report/summary.html'}")
