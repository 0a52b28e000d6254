"""Prepared data: Arrow files with images and train ids, of which single samples, or rows, are read and verified.

The manifest says where in its shard each image and label lies, and their hash. So a reader takes just those bytes,
and nothing is decoded, and nothing of Arrow is believed, before they are known to be what ``prepare`` wrote. Of what
is stored decoded it takes rows, see rows.py. The manifest and ``dataset.json`` are sealed.
"""

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segdistill import environment
from segdistill.config import parse
from segdistill.data.bucket import READERS, SOURCE_FILE, Bucket, Cache
from segdistill.data.decoding import decode_pixels
from segdistill.data.layouts.layout import ClassInfo
from segdistill.data.memory import Memory
from segdistill.data.rows import DAMAGED, read_rows
from segdistill.errors import UserError
from segdistill.files import (
    MIB,
    SEAL,
    new_folder,
    read_json,
    read_sealed,
    read_sealed_json,
    require_free,
    require_regular,
)
from segdistill.images import RGB, ImageFormat

INFO_FILE = "dataset.json"
MANIFEST_FILE = "manifest.parquet"
SHARD_FOLDER = "shards"
MANIFEST_LIMIT = 4096 * MIB  # bytes; about 150 a sample
MOST_OPEN = 128  # shards that one data set keeps open; a process may have a thousand files
MEND = "remove the folder and run the stage 'prepare' again"


@dataclass(frozen=True)
class DatasetInfo:
    """What ``dataset.json`` says."""

    classes: tuple[ClassInfo, ...]
    splits: dict[str, int]  # samples in each split
    content_hash: str  # of the classes' names and of every sample, whatever the shards they lie in
    images: ImageFormat = RGB

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def read_dataset_info(prepared: Path) -> DatasetInfo:
    """The classes and the sizes of the splits.

    Raises:
        UserError: the folder was not written by the stage ``prepare``, or is damaged.
    """
    path = prepared / INFO_FILE
    if not path.exists():
        raise UserError(f"{path}: no such file; the stage 'prepare' writes it")
    content = read_sealed_json(prepared, INFO_FILE, mend=MEND)
    try:
        classes = tuple(ClassInfo(entry["name"], tuple(entry["color"])) for entry in content["classes"])
        splits = {split: entry["samples"] for split, entry in content["splits"].items()}
        images = parse(ImageFormat, content.get("images", {}), "images")
        return DatasetInfo(classes, splits, content["content_hash"], images)
    except (UserError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: written by another version; {MEND}") from None


class ShardDataset:
    """One split of the prepared data, for any number of threads.

    Files are opened on first use, so that a data set may be pickled; a fork reads through the files of its parent.

    Args:
        prepared: the folder.
        split: its name.
        memory: where decoded samples are kept, as far as they fit; None decodes each time. What is stored decoded is
            not kept: the system's cache of files has it, and needs no second copy.
    """

    def __init__(self, prepared: Path, split: str, memory: Memory | None = None) -> None:
        info = read_dataset_info(prepared)
        if split not in info.splits:
            raise UserError(f"{prepared / INFO_FILE}: no split '{split}'; it has {', '.join(info.splits)}")
        self.prepared, self.split = prepared, split
        self.images = info.images
        self._class_names = [entry.name for entry in info.classes]
        self._samples = _read_manifest(prepared, split)
        self._files: dict[str, _File] = {}
        self._bucket = _Bucket(prepared, info.content_hash) if (prepared / SOURCE_FILE).exists() else None
        self.readers = READERS if self._bucket else 0  # threads that should read ahead, at least
        self._memory, self._kept = memory, dict[int, tuple[np.ndarray, np.ndarray]]()

    def __getstate__(self) -> dict[str, Any]:
        return {"prepared": self.prepared, "split": self.split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return self._samples.num_rows

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The image and its train ids; whoever changes them changes what is kept.

        Shape:
            image [H, W, C] uint8 or uint16; label [H, W] uint8, ``losses.IGNORE_INDEX`` where there is no label.

        Raises:
            UserError: the sample is not what ``prepare`` wrote; names shard and sample.
        """
        return self.rows(index, slice(0, self.size(index)[0]))

    def rows(self, index: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Some rows of a sample. Where it is stored decoded, no others are read.

        Shape:
            as of a whole sample, but of height ``rows.stop - rows.start``.

        Raises:
            UserError: the sample is not what ``prepare`` wrote; names shard and sample.
        """
        if index in self._kept:
            image, label = self._kept[index]
            return image[rows], label[rows]
        place = Place.of(lambda name: self._value(name, index))
        try:
            file, place = self._open(place)
            if "image_checksums" in self._samples.column_names:
                return self._decoded_rows(index, rows, file, place)
            encoded_image, encoded_label = read_encoded(file.descriptor, place)
        except ValueError as error:
            if self._bucket and self._bucket.forget(place):
                return self.rows(index, rows)  # the disk has damaged it, and S3 may have it whole
            folder = f"{self._bucket.url}/{SHARD_FOLDER}" if self._bucket else self.prepared / SHARD_FOLDER
            raise UserError(f"{folder}/{place.shard}: sample '{self.sample_id(index)}': {error}; {MEND}") from None
        image = np.require(decode_pixels(encoded_image, verified=True), requirements="W")
        label = np.array(Image.open(io.BytesIO(encoded_label)))
        if self._memory and self._memory.take(image.nbytes + label.nbytes):
            self._kept[index] = image, label
        return image[rows], label[rows]

    def _decoded_rows(self, index: int, rows: slice, file: "_File", place: "Place") -> tuple[np.ndarray, np.ndarray]:
        shape, dtype = (*self.size(index), self.images.channels), np.uint8 if self.images.bits == 8 else np.uint16
        image_checksums, label_checksums = (self._value(f"{part}_checksums", index) for part in PARTS)
        image_end, label_end = place.image_offset + place.image_bytes, place.label_offset + place.label_bytes
        return (
            read_rows(file.descriptor, image_end, rows, image_checksums, shape, dtype),
            read_rows(file.descriptor, label_end, rows, label_checksums, shape[:2], np.uint8),
        )

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a sample, which nothing is decoded for."""
        return self._value("height", index), self._value("width", index)

    def sample_id(self, index: int) -> str:
        """The name of a sample, as in the source."""
        return self._value("id", index)

    def sequence(self, index: int) -> str | None:
        """The drive or film of which a sample is a frame, where the source says so."""
        return self._value("sequence", index) if "sequence" in self._samples.column_names else None

    @property
    def content_hash(self) -> str:
        """What this split is, however it is cut into shards."""
        columns = (self._samples[name].to_pylist() for name in ("split", "id", "sha256"))
        return content_hash(self._class_names, zip(*columns, strict=True))

    def _open(self, place: "Place") -> tuple["_File", "Place"]:
        """An open file, and where in it a sample lies."""
        if self._bucket:
            return _File(self._bucket.open(place)), replace(place, image_offset=0, label_offset=place.image_bytes)
        with _OPENING:
            if (shard := place.shard) not in self._files:
                path = self.prepared / SHARD_FOLDER / shard
                try:
                    require_regular(path)
                except UserError as error:
                    raise UserError(f"{error}; {MEND}") from None
                if len(self._files) == MOST_OPEN:
                    del self._files[next(iter(self._files))]
                self._files[shard] = _File(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            return self._files[shard], place

    def _value(self, name: str, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in split '{self.split}'")
        return self._samples[name][index].as_py()


_OPENING = threading.Lock()


class _File:
    """An open file: closed when nobody has it any more, though another thread may have put it out of the list."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


PARTS = ("image", "label")


@dataclass(frozen=True)
class Place:
    """The columns of the manifest that say where a sample lies, and what must be found there."""

    shard: str
    image_offset: int
    image_bytes: int
    label_offset: int
    label_bytes: int
    sha256: str

    @classmethod
    def of(cls, value: Callable[[str], Any]) -> "Place":
        """What a row of the manifest says, by the names of its columns."""
        return cls(*(value(entry.name) for entry in fields(cls)))


class _Bucket(Bucket):
    """Samples of attached data: fetched one by one, verified, and kept where there is room."""

    def __init__(self, prepared: Path, content_hash: str) -> None:
        source = read_json(prepared / SOURCE_FILE, mend=MEND)
        super().__init__(source.get("url", "") if isinstance(source, dict) else "")
        self._cache = Cache(*environment.cache(), content_hash)

    def open(self, place: Place) -> int:
        """An open file of the encoded image and, behind it, the encoded label."""

        def fetch() -> bytes:
            end = place.label_offset + place.label_bytes
            content = self.read(f"{SHARD_FOLDER}/{place.shard}", place.image_offset, end - place.image_offset)
            image, label = content[: place.image_bytes], content[place.label_offset - place.image_offset :]
            if sample_hash(image, label) != place.sha256:
                raise ValueError(DAMAGED)
            return image + label

        return self._cache.open(place.sha256, fetch)

    def forget(self, place: Place) -> bool:
        """Removes what is kept of a sample; whether anything was."""
        return self._cache.forget(place.sha256)


def attach(url: str, folder: Path) -> None:
    """Makes a folder of prepared data whose shards stay in S3.

    Args:
        url: ``s3://bucket/prefix``, to which the folder that ``prepare`` wrote was copied as it is.
        folder: absent or empty.

    Raises:
        UserError: there are no prepared data, or they are damaged.
    """
    require_free(folder)
    bucket = Bucket(url)
    with new_folder(folder) as partial:
        for name in (SEAL, INFO_FILE, MANIFEST_FILE):
            (partial / name).write_bytes(bucket.read(name))
        try:
            for split in read_dataset_info(partial).splits:
                _read_manifest(partial, split)
        except UserError as error:
            raise UserError(str(error).replace(str(partial), bucket.url)) from None
        (partial / SOURCE_FILE).write_text(json.dumps({"url": bucket.url}) + "\n")


def read_encoded(file: int, place: Place) -> tuple[bytes, bytes]:
    """An encoded image and label of an open shard.

    Read, not mapped: where a disk fails or a file has become shorter, a map would end the process.

    Raises:
        ValueError: not there, or not what the hash says.
    """
    try:
        image = os.pread(file, place.image_bytes, place.image_offset)
        label = os.pread(file, place.label_bytes, place.label_offset)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if sample_hash(image, label) != place.sha256:
        raise ValueError(DAMAGED)
    return image, label


def sample_hash(image: bytes, label: bytes) -> str:
    """The SHA-256 of an encoded image and an encoded label; where one ends and the other begins counts."""
    digest = hashlib.sha256(len(image).to_bytes(8, "little"))
    digest.update(image)
    digest.update(label)
    return digest.hexdigest()


def content_hash(class_names: Sequence[str], samples: Iterable[tuple[str, str, str]]) -> str:
    """What data is, however it is cut into shards: the classes' names, and (split, id, hash) of every sample."""
    return hashlib.sha256(json.dumps([list(class_names), list(samples)]).encode()).hexdigest()


def shard_schema() -> Any:
    """The columns of a shard: one sample a record batch, so that a writer holds one sample in memory."""
    import pyarrow

    return pyarrow.schema(
        {
            "id": pyarrow.string(),
            "image": pyarrow.binary(),  # encoded
            "image_format": pyarrow.string(),  # jpeg, png, tiff or npy
            "label": pyarrow.binary(),  # PNG of train ids, or a .npy file
            "height": pyarrow.int32(),  # of the upright image
            "width": pyarrow.int32(),
            "sha256": pyarrow.string(),  # of image and label as they stand here
            "image_file": pyarrow.string(),  # in the source, relative to its folder
            "mask_file": pyarrow.string(),
        }
    )


def read_class_pixels(prepared: Path, split: str) -> np.ndarray:
    """How many pixels of each class the labels of each sample have.

    Shape:
        returns [N, K] int64.

    Raises:
        UserError: the folder was not written by this version of the stage ``prepare``, or is damaged.
    """
    rows = _read_manifest(prepared, split, "class_pixels")["class_pixels"].to_pylist()
    pixels = np.zeros((len(rows), read_dataset_info(prepared).num_classes), dtype=np.int64)
    for sample, row in zip(pixels, rows, strict=True):  # a row goes as far as the last class that is there
        sample[: len(row)] = row
    return pixels


def _read_manifest(prepared: Path, split: str, *more: str) -> Any:
    """A ``pyarrow.Table`` of the samples of a split: their names and places, and more columns."""
    import pyarrow.compute
    import pyarrow.parquet

    content = read_sealed(prepared, MANIFEST_FILE, mend=MEND, limit=MANIFEST_LIMIT)
    names = ["split", "id", "height", "width", *(entry.name for entry in fields(Place)), *more]
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        optional = {"sequence", *(f"{part}_checksums" for part in PARTS)}.intersection(file.schema_arrow.names)
        table = file.read(columns=[*names, *sorted(optional)], use_threads=False)
        table.select(names)  # all of them are there
        table = table.filter(pyarrow.compute.field("split") == split).combine_chunks()
    except (pyarrow.ArrowException, KeyError):
        raise UserError(f"{prepared / MANIFEST_FILE}: written by another version; {MEND}") from None
    # They become names of files.
    for name in ("id", "shard", "sha256"):
        wrong = table.filter(pyarrow.compute.match_substring_regex(table[name], r"^\.*$|[/\x00]"))[name]
        if len(wrong):
            raise UserError(f"{prepared / MANIFEST_FILE}: {name} '{wrong[0]}' is no name of a file; {MEND}")
    return table
