"""Prepared data: Arrow files with encoded images and train ids, read at random through a memory map."""

import hashlib
import io
import json
import os
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segdistill.data.layouts.layout import ClassInfo
from segdistill.errors import UserError

INFO_FILE = "dataset.json"
MANIFEST_FILE = "manifest.parquet"
SHARD_FOLDER = "shards"


@dataclass(frozen=True)
class DatasetInfo:
    """What ``dataset.json`` says."""

    classes: tuple[ClassInfo, ...]
    splits: dict[str, int]  # samples in each split
    content_hash: str  # of the classes' names and of every sample, whatever the shards they lie in

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def read_dataset_info(prepared: Path) -> DatasetInfo:
    """The classes and the sizes of the splits.

    Raises:
        UserError: the folder was not written by the stage ``prepare``.
    """
    content = _read_info(prepared)
    classes = tuple(ClassInfo(entry["name"], tuple(entry["color"])) for entry in content["classes"])
    splits = {split: entry["samples"] for split, entry in content["splits"].items()}
    return DatasetInfo(classes, splits, content["content_hash"])


class ShardDataset:
    """One split of the prepared data.

    Files are opened on first use, once in each process, so that a data set may be pickled or inherited by a fork.
    """

    def __init__(self, prepared: Path, split: str) -> None:
        splits = _read_info(prepared)["splits"]
        if split not in splits:
            raise UserError(f"{prepared / INFO_FILE}: no split '{split}'; it has {', '.join(splits)}")
        self.prepared, self.split = prepared, split
        self._files = [prepared / shard["file"] for shard in splits[split]["shards"]]
        self._ends = list(accumulate(shard["samples"] for shard in splits[split]["shards"]))
        self._readers: dict[int, Any] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The image and its train ids.

        Shape:
            image [H, W, 3] uint8 RGB; label [H, W] uint8, ``losses.IGNORE_INDEX`` where there is no label.
        """
        record = self._record(index)
        image = _decode(record["image"][0]).convert("RGB")
        return np.array(image), np.array(_decode(record["label"][0]))

    def sample_id(self, index: int) -> str:
        """The name of a sample, as in the source."""
        return self._record(index)["id"][0].as_py()

    def _record(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in split '{self.split}'")
        number = bisect_right(self._ends, index)
        first = self._ends[number - 1] if number else 0
        if self._process != os.getpid():
            self._process, self._readers = os.getpid(), {}
        if number not in self._readers:
            self._readers[number] = open_shard(self._files[number])
        return self._readers[number].get_batch(index - first)


def open_shard(path: Path) -> Any:
    """A ``pyarrow.ipc.RecordBatchFileReader`` over a memory map; each sample is a record batch of one row.

    Raises:
        UserError: missing or damaged.
    """
    import pyarrow

    try:
        options = pyarrow.ipc.IpcReadOptions(use_threads=False)
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(path)), options=options)
    except (OSError, pyarrow.ArrowInvalid):
        raise UserError(f"{path}: missing or damaged; run the stage 'prepare' again") from None


def shard_schema() -> Any:
    """The columns of a shard.

    One sample a record batch: a writer then holds one sample in memory, and a reader maps just the one it wants.
    """
    import pyarrow

    return pyarrow.schema(
        {
            "id": pyarrow.string(),
            "image": pyarrow.binary(),  # encoded
            "image_format": pyarrow.string(),  # jpeg or png
            "label": pyarrow.binary(),  # PNG of train ids
            "height": pyarrow.int32(),
            "width": pyarrow.int32(),
            "sha256": pyarrow.string(),  # of image and label as they stand here
            "image_file": pyarrow.string(),  # in the source, relative to its folder
            "mask_file": pyarrow.string(),
        }
    )


def sample_hash(image: bytes, label: bytes) -> str:
    """The SHA-256 of an encoded image and an encoded label; where one ends and the other begins counts."""
    digest = hashlib.sha256(len(image).to_bytes(8, "little"))
    digest.update(image)
    digest.update(label)
    return digest.hexdigest()


def _decode(scalar: Any) -> Image.Image:
    return Image.open(io.BytesIO(scalar.as_buffer()))  # of all that was mapped, only these encoded bytes are copied


def _read_info(prepared: Path) -> dict[str, Any]:
    path = prepared / INFO_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["classes"], content["splits"], content["content_hash"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; the stage 'prepare' writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; run the stage 'prepare' again") from None
    return content
