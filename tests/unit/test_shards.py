import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from _folders import CLASSES, make_folder, prepare, read_mask, save, truncate, write_classes
from PIL import Image

from segdistill.data import sharding, shards
from segdistill.data.memory import Memory
from segdistill.data.shards import ShardDataset, read_class_pixels, read_dataset_info
from segdistill.engine.tracker import JsonLinesTracker, Tracker
from segdistill.errors import UserError
from segdistill.files import SEAL, seal
from segdistill.stages.prepare import Config, run

SAMPLES = {"train": 7, "val": 2, "test": 3}


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("source") / "data", SAMPLES)


@pytest.fixture(scope="module")
def prepared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(data, tmp_path_factory.mktemp("out") / "prepared")


def test_every_sample_comes_back_pixel_for_pixel(data: Path, prepared: Path) -> None:
    for split, count in SAMPLES.items():
        dataset = ShardDataset(prepared, split)
        assert len(dataset) == count
        for index, name in enumerate(f"{number:04d}" for number in range(count)):
            image, label = dataset[index]
            (source,) = (data / "images" / split).glob(f"{name}.*")
            assert dataset.sample_id(index) == name
            assert image.dtype == label.dtype == np.uint8 and image.flags.writeable
            assert np.array_equal(image, np.array(Image.open(source).convert("RGB")))
            assert np.array_equal(label, read_mask(data / "masks" / split / f"{name}.png"))


def test_images_stay_encoded_as_in_the_source(data: Path, prepared: Path) -> None:
    record = pyarrow.ipc.open_file((prepared / "shards/train-00000.arrow").read_bytes()).get_batch(0)
    source = (data / "images/train/0000.jpg").read_bytes()
    assert record["image"][0].as_py() == source and record["image_format"][0].as_py() == "jpeg"


def test_the_content_hash_is_that_of_the_samples_and_not_of_the_shards(
    data: Path, prepared: Path, tmp_path: Path
) -> None:
    expected = read_dataset_info(prepared).content_hash
    assert len(expected) == 64
    assert read_dataset_info(prepare(data, tmp_path / "cut", shard_samples=100)).content_hash == expected
    for number, change in enumerate((_change_an_image, _change_a_label, _rename_a_class, _rename_a_sample)):
        changed = shutil.copytree(data, tmp_path / f"data-{number}")
        change(changed)
        assert read_dataset_info(prepare(changed, tmp_path / f"prepared-{number}")).content_hash != expected


def _change_an_image(data: Path) -> None:
    save(data / "images/train/0003.png", np.zeros((8, 12, 3), dtype=np.uint8))


def _change_a_label(data: Path) -> None:
    labels = read_mask(data / "masks/test/0001.png")
    labels[3, 3] = (labels[3, 3] + 1) % 3
    save(data / "masks/test/0001.png", labels)


def _rename_a_class(data: Path) -> None:
    write_classes(data, classes=[{"name": name, "color": [0, 0, 0]} for name in ("heaven", "road", "car")])


def _rename_a_sample(data: Path) -> None:
    for kind in ("images", "masks"):
        (data / kind / "val/0001.png").rename(data / kind / "val/0002.png")


def test_dataset_json_and_manifest_describe_the_shards(prepared: Path) -> None:
    info = read_dataset_info(prepared)
    assert info.num_classes == 3 and [entry.name for entry in info.classes] == list(CLASSES)
    assert info.splits == SAMPLES
    content = json.loads((prepared / "dataset.json").read_text())
    assert content["ignore_index"] == 255
    assert [shard["samples"] for shard in content["splits"]["train"]["shards"]] == [3, 3, 1]
    manifest = pyarrow.parquet.read_table(prepared / "manifest.parquet").to_pylist()
    assert len(manifest) == sum(SAMPLES.values())
    assert manifest[4]["id"] == "0004" and manifest[4]["shard"] == "train-00001.arrow" and manifest[4]["row"] == 1
    assert manifest[4]["image_file"] == "images/train/0004.png" and manifest[4]["height"] == 8


def test_the_pixels_of_each_class_are_those_of_the_labels(prepared: Path) -> None:
    dataset = ShardDataset(prepared, "train")
    pixels = read_class_pixels(prepared, "train")
    assert pixels.shape == (SAMPLES["train"], len(CLASSES)) and pixels.any()
    for index, counts in enumerate(pixels.tolist()):
        label = dataset[index][1]
        assert counts == [int((label == number).sum()) for number in range(len(CLASSES))]


def test_data_prepared_by_a_version_that_did_not_count_pixels_are_refused_where_they_are_asked_for(
    prepared: Path, tmp_path: Path
) -> None:
    older = shutil.copytree(prepared, tmp_path / "older")
    table = pyarrow.parquet.read_table(older / "manifest.parquet").drop_columns("class_pixels")
    pyarrow.parquet.write_table(table, older / "manifest.parquet")
    seal(older, leave=["shards"])
    assert len(ShardDataset(older, "train")) == SAMPLES["train"]
    with pytest.raises(UserError, match=r"manifest\.parquet: written by another version; remove the folder and run"):
        read_class_pixels(older, "train")


def test_bytes_do_not_depend_on_the_number_of_workers_or_the_place(data: Path, prepared: Path, tmp_path: Path) -> None:
    assert hashes(prepare(data, tmp_path / "elsewhere", workers=3)) == hashes(prepared)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "report"]


def test_bytes_do_not_depend_on_when_the_data_was_written_and_the_seal_is_of_what_stays(
    data: Path, prepared: Path, tmp_path: Path
) -> None:
    later = shutil.copytree(data, tmp_path / "later", copy_function=shutil.copyfile)
    for path in later.rglob("*"):
        os.utime(path, (1, 1))
    assert hashes(prepare(later, tmp_path / "elsewhere")) == hashes(prepared)
    assert set(json.loads((prepared / SEAL).read_text())) == {"dataset.json", "manifest.parquet"}


def test_a_relative_data_folder_works_with_workers(
    data: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    assert hashes(prepare(Path("data"), tmp_path / "prepared", workers=2)) == hashes(prepared)


def test_masks_are_mapped_to_train_ids(data: Path, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "data")
    write_classes(source, ignore_index=9)
    for path in sorted(source.glob("masks/*/*.png")):
        labels = read_mask(path)
        labels[labels == 255] = 9
        save(path, labels)
    _, label = ShardDataset(prepare(source, tmp_path / "prepared"), "train")[0]
    assert set(np.unique(label)) == {0, 1, 2, 255} and list(label[0, :2]) == [255, 255]


def test_max_side_shrinks_larger_samples_only(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "data", {"train": 2}, size=(40, 20))
    save(source / "images/train/0001.png", np.zeros((8, 12, 3), dtype=np.uint8))
    save(source / "masks/train/0001.png", np.zeros((8, 12), dtype=np.uint8))
    dataset = ShardDataset(prepare(source, tmp_path / "prepared", max_side=16), "train")
    image, label = dataset[0]
    assert image.shape == (8, 16, 3) and label.shape == (8, 16) and set(np.unique(label)) <= {0, 1, 2, 255}
    assert dataset[1][0].shape == (8, 12, 3)


def _first_pixel(dataset: ShardDataset) -> int:
    return int(dataset[5][0][0, 0, 0])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_open_data_set_survives_forks_and_pickling(prepared: Path, method: str) -> None:
    dataset = ShardDataset(prepared, "train")
    expected = _first_pixel(dataset)  # opened here, used there
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(_first_pixel, [dataset]) == [expected]


def test_only_some_shards_are_open_at_a_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MOST_OPEN", 2)
    dataset = ShardDataset(prepare(data, tmp_path / "prepared", shard_samples=1), "train")
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert len(list(dataset)) == len(list(dataset)) == 7
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 2
    del dataset
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_index_outside_ends_an_iteration(prepared: Path) -> None:
    dataset = ShardDataset(prepared, "val")
    assert len(list(dataset)) == 2
    with pytest.raises(IndexError):
        dataset[-1]


def test_what_is_not_prepared_data_is_named(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.json: no such file; the stage 'prepare' writes it"):
        read_dataset_info(tmp_path)
    with pytest.raises(UserError, match="no split 'dev'; it has train, val, test"):
        ShardDataset(prepared, "dev")
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(
        UserError, match=r"checksums\.json: no such file; remove the folder and run the stage 'prepare'"
    ):
        read_dataset_info(tmp_path)


def test_a_missing_or_short_shard_is_named(data: Path, tmp_path: Path) -> None:
    prepared = prepare(data, tmp_path / "prepared")
    truncate(prepared / "shards/val-00000.arrow", 0.3)
    with pytest.raises(UserError) as caught:
        ShardDataset(prepared, "val")[1]
    assert str(caught.value) == (
        f"{prepared}/shards/val-00000.arrow: sample '0001': damaged, or cut off: not what the manifest records; "
        "remove the folder and run the stage 'prepare' again"
    )
    (prepared / "shards/val-00000.arrow").unlink()
    with pytest.raises(UserError, match=r"val-00000\.arrow: no such file; remove"):
        ShardDataset(prepared, "val")[1]


def test_no_damage_of_prepared_data_passes_in_silence(data: Path, tmp_path: Path) -> None:
    prepared = prepare(data, tmp_path / "prepared")
    expected = [ShardDataset(prepared, "train")[index] for index in range(SAMPLES["train"])]
    random = np.random.default_rng(0)
    names = [
        "shards/train-00000.arrow",
        "shards/train-00001.arrow",
        "manifest.parquet",
        "dataset.json",
        "checksums.json",
    ]
    noticed = dict.fromkeys(names, 0)
    for number in range(400):
        path = prepared / names[number % len(names)]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        start = int(random.integers(len(whole)))
        if number % 3:
            damaged[start] ^= 1 << int(random.integers(8))
        else:  # a sector of zeros
            damaged[start : start + 512] = bytes(len(damaged[start : start + 512]))
        path.write_bytes(damaged)
        try:
            dataset = ShardDataset(prepared, "train")
            for index, pair in enumerate(expected):
                assert all(np.array_equal(*both) for both in zip(dataset[index], pair, strict=True))
        except UserError as error:
            noticed[names[number % len(names)]] += 1
            assert str(error).startswith(str(prepared)) and "'prepare'" in str(error)
        path.write_bytes(whole)
    assert noticed["manifest.parquet"] == noticed["dataset.json"] == 80
    assert min(noticed.values()) > 20  # what is left are flips in parts of Arrow that no reader looks at


def test_an_unreadable_sample_is_named_and_nothing_looks_complete(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "data", SAMPLES)
    truncate(source / "images/train/0004.png")
    with pytest.raises(UserError) as caught:
        prepare(source, tmp_path / "prepared", workers=2)
    assert str(caught.value).startswith(f"{source}/images/train/0004.png: damaged or truncated")
    assert not (tmp_path / "prepared").exists()
    (source / "images/train/0004.png").unlink()
    (source / "masks/train/0003.png").unlink()
    with pytest.raises(UserError, match=r"masks/train/0003\.png: no such file"):
        prepare(source, tmp_path / "prepared")


def test_finished_shards_are_not_written_again(
    data: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = sharding.write_shard

    def limited(shard: sharding.Shard, **settings: Any) -> list[sharding.Row]:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard.name)
        return write(shard, **settings)

    monkeypatch.setattr(sharding, "write_shard", limited)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path / "prepared")
    assert written == ["train-00000.arrow", "train-00001.arrow"]
    monkeypatch.setattr(
        sharding, "write_shard", lambda shard, **rest: written.append(shard.name) or write(shard, **rest)
    )
    assert hashes(prepare(data, tmp_path / "prepared")) == hashes(prepared)
    assert written[2:] == ["train-00002.arrow", "val-00000.arrow", "test-00000.arrow"]


def test_damage_in_what_an_earlier_attempt_finished_is_noticed(
    data: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, random = hashes(prepared), np.random.default_rng(0)
    monkeypatch.setattr(sharding, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path / "half")
    monkeypatch.undo()
    for number in range(24):
        shutil.copytree(tmp_path / "half.partial", tmp_path / f"{number}.partial")
        folder = tmp_path / f"{number}.partial" / ("shards", "keys")[number % 2]
        path = folder / "train-00000.arrow"
        damaged = bytearray(path.read_bytes())
        if number < 2:
            damaged = damaged[: len(damaged) // 2]
        else:
            damaged[int(random.integers(len(damaged)))] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        made = prepare(data, tmp_path / str(number))
        found = hashes(made)
        if found != expected:  # a flip in what nobody reads of Arrow
            assert {name for name in found if found[name] != expected[name]} == {"shards/train-00000.arrow"}
            for index in range(3):
                assert np.array_equal(ShardDataset(made, "train")[index][0], ShardDataset(prepared, "train")[index][0])


def test_names_in_the_manifest_that_lead_elsewhere_are_refused(prepared: Path, tmp_path: Path) -> None:
    table = pyarrow.parquet.read_table(prepared / "manifest.parquet").to_pylist()
    for number, change in enumerate(({"id": "../../x"}, {"shard": "../x.arrow"}, {"id": ".."}, {"id": ""})):
        copy = shutil.copytree(prepared, tmp_path / str(number))
        rows = [row | change if row["split"] == "val" else row for row in table]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), copy / "manifest.parquet")
        seal(copy, leave=["shards"])
        with pytest.raises(
            UserError, match=r"manifest\.parquet: (id|shard) '.*' is no name of a file; remove the folder"
        ):
            ShardDataset(copy, "val")


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_only_regular_files_of_a_bounded_size_are_prepared(tmp_path: Path, kind: str) -> None:
    source = make_folder(tmp_path / "data", SAMPLES)
    path = source / kind / "val/0001.png"
    os.truncate(path, 2**40)
    with pytest.raises(UserError, match=f"{kind}/val/0001.png: 1048576.0 MiB; at most 256 MiB are read"):
        prepare(source, tmp_path / "prepared")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{kind}/val/0001.png: a named pipe; expected a regular file"):
        prepare(source, tmp_path / "prepared")


def test_a_sample_of_another_meaning_stops_prepare_as_it_stops_validate(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "data", SAMPLES)
    mask = Image.fromarray(read_mask(source / "masks/val/0001.png")).convert("P")
    mask.putdata(read_mask(source / "masks/val/0001.png").ravel().tolist())
    mask.putpalette(([1, 0, 0, 0, 0, 0, 2, 0, 0] * 86)[:768])
    mask.save(source / "masks/val/0001.png")
    with pytest.raises(UserError, match=r"masks/val/0001\.png: its palette contradicts the class list"):
        prepare(source, tmp_path / "prepared")


def test_a_changed_input_is_prepared_again_and_a_changed_plan_leaves_no_old_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "data", SAMPLES)
    monkeypatch.setattr(sharding, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "prepared", shard_samples=1)
    monkeypatch.undo()
    save(source / "images/train/0001.png", np.full((8, 12, 3), 77, dtype=np.uint8))
    prepared = prepare(source, tmp_path / "prepared", shard_samples=3)
    assert len(list((prepared / "shards").iterdir())) == 5 and not (prepared / "keys").exists()
    assert np.all(ShardDataset(prepared, "train")[1][0] == 77)


def test_a_killed_run_leaves_no_orphans_and_is_continued(prepared: Path, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "data", {"train": 150, "val": 1, "test": 1}, size=(300, 200))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from test_shards import prepare\n"
        "prepare(Path(sys.argv[2]), Path(sys.argv[3]), workers=2)\n"
    )
    script = tmp_path / "go.py"
    script.write_text("if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in code.splitlines()))
    command = [sys.executable, str(script), str(Path(__file__).parent), str(source), str(tmp_path / "prepared")]
    keys = tmp_path / "prepared.partial" / "keys"
    victim = subprocess.Popen(command)
    while victim.poll() is None and len(list(keys.glob("*.arrow"))) < 3:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while _processes_naming(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _processes_naming(tmp_path) == []
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "prepared.partial/shards").glob("*.arrow")}
    done = [path.name for path in keys.glob("*.arrow")]  # and not what was being written
    continued = prepare(source, tmp_path / "prepared")
    assert len(done) >= 3 and all((continued / "shards" / name).stat().st_mtime_ns == first[name] for name in done)
    assert hashes(continued) == hashes(prepare(source, tmp_path / "fresh"))


def _processes_naming(folder: Path) -> list[int]:
    """The script in the folder, and its workers, whose fork server was told where the script lies."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                if str(folder).encode() in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
            except OSError:
                continue
    return found


def test_a_full_disk_is_one_sentence_and_keeps_what_is_finished(
    data: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = sharding._encode, []

    def full(*arguments: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return encode(*arguments)

    monkeypatch.setattr(sharding, "_encode", full)
    with pytest.raises(UserError) as caught:
        prepare(data, tmp_path / "prepared")
    assert str(caught.value).startswith(f"{tmp_path}/prepared: no space left on the disk; finished shards wait in ")
    assert [path.name for path in (tmp_path / "prepared.partial/shards").iterdir()] == ["train-00000.arrow"]
    monkeypatch.undo()
    assert hashes(prepare(data, tmp_path / "prepared")) == hashes(prepared)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no such file; run the stage 'validate' first"),
        ("{", "not valid JSON: .*; run the stage 'validate' again"),
        ('{"success": false, "layout": "folder"}', "the data set failed its validation"),
        ('{"success": true, "layout": "camvid"}', "is about the layout 'camvid'"),
    ],
)
def test_data_that_did_not_pass_is_not_prepared(data: Path, tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    config = Config(layout="folder", shard_samples=3, max_side=None, workers=1)
    with pytest.raises(UserError, match=sentence):
        run(config, data=data, report=tmp_path, prepared=tmp_path / "prepared", tracker=Tracker())
    assert not (tmp_path / "prepared").exists()


def test_the_numbers_are_logged(data: Path, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"success": true, "layout": "folder"}')
    config = Config(layout="folder", shard_samples=3, max_side=None, workers=1)
    tracker = JsonLinesTracker(tmp_path / "log.jsonl")
    run(config, data=data, report=tmp_path, prepared=tmp_path / "prepared", tracker=tracker)
    (record,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert record["values"]["data/samples/train"] == 7 and record["values"]["data/bytes"] > 0


@pytest.mark.parametrize("size", [(12, 8), (20, 77)])  # less than a band of rows, and several
def test_decoded_shards_give_the_same_pixels_whole_and_by_rows(tmp_path: Path, size: tuple[int, int]) -> None:
    source = make_folder(tmp_path / "data", SAMPLES, size=size)
    original = ShardDataset(prepare(source, tmp_path / "original"), "train")
    decoded = ShardDataset(prepare(source, tmp_path / "decoded", images="decoded"), "train", Memory("auto"))
    for index in range(len(original)):
        assert decoded.size(index) == original.size(index) == size[::-1]
        for rows in (slice(0, size[1]), slice(0, 1), slice(3, 7), slice(size[1] - 5, size[1]), slice(31, size[1])):
            parts, expected = decoded.rows(index, rows), original.rows(index, rows)
            assert all(np.array_equal(*both) and both[0].flags.writeable for both in zip(parts, expected, strict=True))
    assert read_dataset_info(decoded.prepared).splits == SAMPLES
    assert np.array_equal(*(read_class_pixels(dataset.prepared, "train") for dataset in (original, decoded)))


def test_training_sees_the_same_crops_of_decoded_shards(tmp_path: Path) -> None:
    import torch

    from segdistill.data.loader import Share, training_batches
    from segdistill.data.settings import AugmentationConfig

    source = make_folder(tmp_path / "data", SAMPLES, size=(90, 70))
    config = AugmentationConfig(crop_size=(32, 48), scale=(0.3, 2.0), flip=0.5, color_jitter=0.2)
    crops = []
    for images in ("original", "decoded"):
        dataset = ShardDataset(prepare(source, tmp_path / images, images=images), "train")
        batches = training_batches(dataset, config, seed=0, share=Share(2), first_iteration=0, workers=1)
        crops.append([next(batches) for _ in range(8)])
    for original, decoded in zip(*crops, strict=True):
        assert all(torch.equal(*both) for both in zip(original, decoded, strict=True))


def test_of_a_decoded_sample_only_the_bands_of_a_crop_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "data", SAMPLES, size=(20, 256))
    dataset = ShardDataset(prepare(source, tmp_path / "prepared", images="decoded"), "train")
    read: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *request: read.append(preadv(*request)) or read[-1])
    dataset.rows(1, slice(70, 100))  # in the bands from 64 to 128
    assert read == [64 * 20 * 3, 64 * 20]


def test_no_damage_of_decoded_rows_passes_in_silence(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "data", {"train": 1, "val": 1, "test": 1}, size=(20, 70))
    prepared = prepare(source, tmp_path / "prepared", images="decoded")
    expected, random = ShardDataset(prepared, "train").rows(0, slice(30, 50)), np.random.default_rng(0)
    path, noticed = prepared / "shards/train-00000.arrow", 0
    whole = path.read_bytes()
    for number in range(150):
        damaged = bytearray(whole)
        damaged[int(random.integers(len(whole)))] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged[: len(damaged) // 2] if number == 0 else damaged)
        try:
            parts = ShardDataset(prepared, "train").rows(0, slice(30, 50))
            assert all(np.array_equal(*both) for both in zip(parts, expected, strict=True))
        except UserError as error:
            noticed += 1
            assert str(error).startswith(f"{path}: sample '0000': damaged, or cut off") and "'prepare'" in str(error)
    assert 80 < noticed < 150  # rows 0 to 64 of 70 are looked at, and nothing beside them


def test_as_jpeg_images_change_a_little_and_labels_and_jpegs_do_not(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "data", SAMPLES, size=(64, 48))
    smooth = np.add.outer(np.arange(48), np.arange(64))[..., None].repeat(3, 2).astype(np.uint8)
    save(source / "images/train/0001.png", smooth)
    original = ShardDataset(prepare(source, tmp_path / "original"), "train")
    lossy = ShardDataset(prepare(source, tmp_path / "jpeg", images="jpeg", jpeg_quality=90), "train")
    assert all(np.array_equal(original[index][1], lossy[index][1]) for index in range(len(original)))
    assert np.array_equal(original[0][0], lossy[0][0])  # it was a JPEG
    change = np.abs(original[1][0].astype(int) - lossy[1][0])
    assert 0 < change.max() < 10
    record = pyarrow.ipc.open_file((lossy.prepared / "shards/train-00000.arrow").read_bytes()).get_batch(1)
    assert record["image_format"][0].as_py() == "jpeg"


@pytest.mark.parametrize(
    ("images", "samples"),
    # 0.8 MB of noise as PNG with its mask, the first one less as JPEG; as much of pixels and labels.
    [("original", [2, 1, 1, 1, 1, 1]), ("decoded", [2, 2, 2, 1])],
)
def test_a_shard_is_no_larger_than_asked(tmp_path: Path, images: str, samples: list[int]) -> None:
    source = make_folder(tmp_path / "data", {"train": 7, "val": 1, "test": 1}, size=(500, 400))
    limit = 1 if images == "original" else 2  # MiB
    prepared = prepare(source, tmp_path / "prepared", images=images, shard_samples=100, shard_mib=limit)
    info = json.loads((prepared / "dataset.json").read_text())
    assert [shard["samples"] for shard in info["splits"]["train"]["shards"]] == samples
    assert all(path.stat().st_size < limit * 2**20 for path in (prepared / "shards").iterdir())
    whole = prepare(source, tmp_path / "whole", images=images, shard_samples=100)
    assert read_dataset_info(whole).content_hash == read_dataset_info(prepared).content_hash


def test_decoded_data_that_do_not_fit_the_disk_are_refused_at_the_start(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(UserError, match=r"prepare\.images: decoded needs 0 MiB in .*, and 0 MiB are free; choose"):
        prepare(data, tmp_path / "prepared", images="decoded")
    assert not list(tmp_path.glob("prepared*"))


def test_a_run_says_how_much_memory_it_took(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        prepare(data, tmp_path / "prepared", workers=2)
    (line,) = [record.getMessage() for record in caplog.records if "samples" in record.getMessage()]
    found = re.fullmatch(r"12 samples, .* MiB in 5 shards; at most (\d+) MiB of memory here, (\d+) MiB in .*", line)
    assert found and all(10 < int(number) < 10_000 for number in found.groups())
