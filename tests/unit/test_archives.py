"""Data sets as they are downloaded: zips read in place, tars unpacked, and what no archive may do."""

import io
import json
import shutil
import stat
import tarfile
import zipfile
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from _folders import make_folder
from test_benchmarks_as_published import ade20k, camvid_original, cityscapes, coco_stuff, pascal_context, voc

from segdistill.data import unpacking, zips
from segdistill.data.checks import FileFacts, inspect
from segdistill.data.importing import import_dataset
from segdistill.data.layouts import open_layout, recognised_layout
from segdistill.data.unpacking import unpack
from segdistill.data.zips import with_zips
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.files import read_bytes
from segdistill.stages import prepare


def pack(archive: Path, base: Path, *names: str) -> None:
    """Moves what a folder holds into an archive; without names all of it."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    paths = [base / name for name in names] or sorted(base.iterdir())
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in (below for top in paths for below in (top, *sorted(top.rglob("*")))):
                file.write(path, path.relative_to(base))
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as file:
            for path in paths:
                file.add(path, path.relative_to(base))
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def written_zip(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def prepared_hash(layout: str, data: Path, out: Path) -> str:
    """The hash of what prepare writes, of a data set that need not be validated."""
    out.mkdir()
    (out / "summary.json").write_text(json.dumps({"success": True, "layout": layout}))
    settings = prepare.Config(layout=layout, shard_samples=8, max_side=None, workers=1)
    prepare.run(settings, data=data, report=out, prepared=out / "prepared", tracker=Tracker())
    return str(json.loads((out / "prepared/dataset.json").read_text())["content_hash"])


def facts(name: str, data: Path) -> list[FileFacts]:
    """What validate judges, but for the masks' places: those of CamVid have no folder in their archive."""
    layout = open_layout(name, data)
    samples = [sample for split in layout.splits for sample in layout.samples(split)]
    return [replace(fact, mask=None) for fact in inspect(layout, samples, workers=1)]


def pack_cityscapes(root: Path) -> None:
    for kind, parts in (("leftImg8bit", ("train", "val")), ("gtFine", ("train", "val"))):
        (root / "README").write_text(kind)  # each archive has its own
        pack(root / f"{kind}_trainvaltest.zip", root, "README", *(f"{kind}/{part}" for part in parts))
    pack(root / "leftImg8bit_trainextra.zip", root, "leftImg8bit")
    shutil.rmtree(root / "gtFine")
    shutil.rmtree(root / "gtCoarse")


def pack_coco(root: Path) -> None:
    for part in ("train2017", "val2017", "unlabeled2017"):
        pack(root / f"images/{part}.zip", root / "images", part)
    pack(root / "annotations/stuffthingmaps_trainval2017.zip", root / "annotations", "train2017", "val2017")


def pack_camvid(root: Path) -> None:
    pack(root / "701_StillsRaw_full.zip", root, "701_StillsRaw_full")
    pack(root / "LabeledApproved_full.zip", root / "LabeledApproved_full")
    (root / "LabeledApproved_full").rmdir()


def pack_ade(root: Path) -> None:
    pack(root / "ADEChallengeData2016.zip", root, "ADEChallengeData2016")


@pytest.mark.parametrize(
    ("name", "make", "pack_all"),
    [
        ("cityscapes", cityscapes, pack_cityscapes),
        ("ade20k", ade20k, pack_ade),
        ("coco_stuff", coco_stuff, pack_coco),
        ("camvid_original", camvid_original, pack_camvid),
    ],
)
def test_official_zips_are_read_where_they_lie_as_if_they_were_unpacked(
    tmp_path: Path, name: str, make: Callable[[Path], Path], pack_all: Callable[[Path], None]
) -> None:
    data = make(tmp_path / "data")
    unpacked = facts(name, data), prepared_hash(name, data, tmp_path / "unpacked")
    pack_all(data)
    assert not [path for path in data.rglob("*") if path.suffix in (".png", ".jpg")]
    assert recognised_layout(data) == name
    assert (facts(name, data), prepared_hash(name, data, tmp_path / "zipped")) == unpacked
    assert not [path for path in data.rglob("*") if path.suffix in (".png", ".jpg")]


def test_worker_processes_read_zips_too(tmp_path: Path) -> None:
    data = cityscapes(tmp_path / "data")
    pack_cityscapes(data)
    layout = open_layout("cityscapes", data)
    by_two = list(inspect(layout, list(layout.samples("train")), workers=2))
    assert [fact.image_size for fact in by_two] == [fact.mask_size for fact in by_two] == [(6, 4), (6, 4)]


def test_a_folder_without_zips_is_a_plain_path(tmp_path: Path) -> None:
    assert type(open_layout("cityscapes", cityscapes(tmp_path)).root) is type(tmp_path)


def test_what_is_unpacked_counts_before_what_a_zip_holds(tmp_path: Path) -> None:
    archive = written_zip(
        tmp_path / "a.zip", {"top.txt": b"zip", "a/x.txt": b"zip", "a/y.txt": b"zip", "b/z.txt": b"zip"}
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.txt").write_bytes(b"disk")
    root = with_zips(tmp_path)
    assert sorted(path.name for path in root.iterdir()) == ["a", "a.zip", "b", "top.txt"]
    assert [path.name for path in (root / "a").iterdir()] == ["x.txt"]  # the other one was deleted by somebody
    assert [read_bytes(root / name) for name in ("a/x.txt", "b/z.txt", "top.txt")] == [b"disk", b"zip", b"zip"]
    assert not (root / "a/y.txt").exists() and (root / "b").is_dir() and not (root / "c").is_dir()
    assert (root / "b/z.txt").stat().st_mtime_ns == archive.stat().st_mtime_ns


def test_two_zips_must_agree_on_a_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        written_zip(tmp_path / f"{name}.zip", {"README": name.encode(), "a/same.txt": b"same"})
    assert read_bytes(with_zips(tmp_path) / "a/same.txt") == b"same"
    for name in ("one", "two"):
        written_zip(tmp_path / f"{name}.zip", {"a/same.txt": f"{name} more".encode()})
    with pytest.raises(UserError, match=r"a/same\.txt: .*one\.zip and .*two\.zip hold it with different contents"):
        with_zips(tmp_path)


@pytest.mark.parametrize(
    ("layout", "make", "archives"),
    [
        ("voc", voc, {"VOCtrainval_11-May-2012.tar": ()}),
        ("voc_aug", voc, {"SegmentationClassAug.zip": ("VOCdevkit/VOC2012", "SegmentationClassAug"),
                          "VOCtrainval_11-May-2012.tar": ()}),
        ("pascal_context_59", pascal_context, {"trainval.tar.gz": ("", "trainval"),
                                               "VOCtrainval_03-May-2010.tar": ()}),
        ("ade20k", ade20k, {"ADEChallengeData2016.zip": ()}),
    ],
)  # fmt: skip
def test_an_import_unpacks_official_archives_into_the_data_folder(
    tmp_path: Path, layout: str, make: Callable[[Path], Path], archives: dict[str, tuple[str, ...]]
) -> None:
    source = make(tmp_path / "unpacked")
    expected = prepared_hash(layout, source, tmp_path / "expected")
    for archive, (base, *names) in ((archive, place or ("",)) for archive, place in archives.items()):
        pack(tmp_path / "downloads" / archive, source / base, *names)
    downloads, data = tmp_path / "downloads", tmp_path / "data"
    one = downloads / next(iter(archives))
    imported = import_dataset(layout, one if len(archives) == 1 else downloads, data)
    assert (
        imported.layout == layout and imported.samples["train"] and all(name in imported.notes[0] for name in archives)
    )
    assert prepared_hash(layout, data, tmp_path / "out") == expected
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_loose_photos_and_masks_may_come_as_an_archive(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    expected = import_dataset("folder", source, tmp_path / "one")
    pack(tmp_path / "photos.tar.gz", source)
    assert import_dataset("folder", tmp_path / "photos.tar.gz", tmp_path / "two") == expected
    files = [sorted(path.relative_to(out) for path in out.rglob("*")) for out in (tmp_path / "one", tmp_path / "two")]
    assert files[0] == files[1]


BAD_NAMES = {
    "/etc/passwd": "is an absolute path",
    "C:/a.png": "is an absolute path",
    "a/../../b.png": "leaves the folder",
    "a\\b.png": "has backslashes",
    "a\x07.png": "has characters that cannot be shown",
    f"{'x' * 256}.png": "is longer than 255 bytes",
}


def zip_entry(name: str, **changes: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    for attribute, value in changes.items():
        setattr(entry, attribute, value)
    return entry


def tar_entry(name: str, **changes: object) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size = 1
    for attribute, value in changes.items():
        setattr(entry, attribute, value)
    return entry


def bad_zip(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for entry in entries:
            file.writestr(entry, b"x")


def refused(path: Path, root: Path) -> str:
    """The sentence against an archive, the same in place as for an import, which leaves nothing."""
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError) as unpacked:
        import_dataset("voc", path, root / "data")
    assert sorted(root.rglob("*")) == before
    if path.suffix == ".zip":
        with pytest.raises(UserError) as in_place:
            open_layout("voc", path.parent)
        assert str(in_place.value) == str(unpacked.value)
    assert str(unpacked.value).startswith(f"{path}: ") and "\n" not in str(unpacked.value)
    return str(unpacked.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        *(([zip_entry(name)], sentence) for name, sentence in BAD_NAMES.items()),
        ([zip_entry("a/link.png", external_attr=(stat.S_IFLNK | 0o777) << 16)], "is a link"),
        ([zip_entry("a/b.png"), zip_entry("a/b.png")], "is there twice"),
        ([zip_entry("a/b.png", compress_type=zipfile.ZIP_LZMA)], "is compressed by an unusual method"),
    ],
)
def test_a_zip_that_could_harm_is_refused(tmp_path: Path, entries: list[zipfile.ZipInfo], sentence: str) -> None:
    bad_zip(tmp_path / "bad.zip", entries)
    assert sentence in refused(tmp_path / "bad.zip", tmp_path)


def test_an_encrypted_zip_and_one_that_is_cut_off_are_refused(tmp_path: Path) -> None:
    path = written_zip(tmp_path / "bad.zip", {"a/b.png": b"x" * 100})
    whole = path.read_bytes()
    central = whole.index(b"PK\x01\x02")
    path.write_bytes(whole[: central + 8] + b"\x01" + whole[central + 9 :])  # the flag of encryption
    assert "is encrypted" in refused(path, tmp_path)
    path.write_bytes(whole[:-30])
    assert "no whole zip archive" in refused(path, tmp_path)


def test_a_damaged_file_in_a_zip_is_a_fault_of_that_file(tmp_path: Path) -> None:
    path = written_zip(tmp_path / "a.zip", {"a/good.png": b"good", "a/bad.png": bytes(range(256))})
    content = path.read_bytes()
    place = content.index(b"a/bad.png") + 40
    path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
    root = with_zips(tmp_path)
    assert read_bytes(root / "a/good.png") == b"good"
    with pytest.raises(UserError, match=rf"a/bad\.png: cannot be read: damaged in {path}: "):
        read_bytes(root / "a/bad.png")
    with pytest.raises(UserError, match=rf"{path}: damaged or cut off"):
        unpack(path, tmp_path)


def test_a_file_in_a_zip_that_is_larger_than_it_says_is_not_unpacked_whole(tmp_path: Path) -> None:
    path = written_zip(tmp_path / "a.zip", {"a/bomb.png": bytes(10**6)})
    content = path.read_bytes().replace((10**6).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged in"):
        read_bytes(with_zips(tmp_path) / "a/bomb.png")


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        *(([tar_entry(name)], sentence) for name, sentence in BAD_NAMES.items()),
        ([tar_entry("a/\udcff.png")], "is not UTF-8"),
        ([tar_entry("a/b.png", type=tarfile.SYMTYPE, linkname="/etc", size=0)], "is a link"),
        ([tar_entry("a/b.png"), tar_entry("a/c.png", type=tarfile.LNKTYPE, linkname="a/b.png", size=0)], "is a link"),
        ([tar_entry("a/b.png", type=tarfile.FIFOTYPE, size=0)], "is no plain file"),
        ([tar_entry("a/b.png"), tar_entry("a/b.png")], "is there twice"),
        ([tar_entry("a"), tar_entry("a/b.png")], "is a file and a folder"),
    ],
)
def test_a_tar_that_could_harm_is_refused(tmp_path: Path, entries: list[tarfile.TarInfo], sentence: str) -> None:
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w", encoding="utf-8") as file:
        for entry in entries:
            file.addfile(entry, io.BytesIO(b"x"))
    assert sentence in refused(path, tmp_path)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_a_tar_that_is_cut_off_is_refused(tmp_path: Path, kind: str, part: float) -> None:
    path = tmp_path / f"bad.{kind}"
    with tarfile.open(path, f"w:{kind[4:]}") as file:
        for number in range(9):
            file.addfile(tar_entry(f"a/{number}.png", size=512), io.BytesIO(bytes(range(256)) * 2))
    whole = path.read_bytes()
    length = int(part * len(whole))
    path.write_bytes(whole[: length - length % 512 if kind == "tar" else length])
    assert "damaged" in refused(path, tmp_path)


def test_a_tar_that_is_cut_off_between_two_files_or_has_a_broken_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as file:
        for number in range(3):
            file.addfile(tar_entry(f"a/{number}.png"), io.BytesIO(b"x"))
    whole = path.read_bytes()
    path.write_bytes(whole[:1024])
    assert "it ends in the middle" in refused(path, tmp_path)
    path.write_bytes(whole[:1024] + b"!" + whole[1025:])
    assert "it ends in the middle" in refused(path, tmp_path)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_is_no_larger_than_the_disk_an_honest_ratio_and_a_number_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "source/a").mkdir(parents=True)
    for name in ("b.png", "c.png"):
        (tmp_path / "source/a" / name).write_bytes(bytes(10**6))
    path = tmp_path / ("bomb.zip" if kind == "zip" else "bomb.tar.gz")
    pack(path, tmp_path / "source")
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(unpacking, "ANY_RATIO", 0)
        with pytest.raises(UserError, match="holds more than 200 times its own size"):
            unpack(path, tmp_path / "out")
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "free")(1_500_000)
        patch.setattr(unpacking.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(UserError, match="holds more than the 1 MiB that are free on the disk"):
            unpack(path, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(zips, "MOST_FILES", 1)
        with pytest.raises(UserError, match="more than 1 files"):
            unpack(path, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/a")
    unpack(path, tmp_path / "out")
    assert [file.stat().st_size for file in (tmp_path / "out/a").iterdir()] == [10**6, 10**6]
