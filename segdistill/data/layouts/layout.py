"""What a data set on disk must tell us, however it is laid out."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from segdistill.errors import UserError

IGNORE_INDEX = 255  # as segdistill.losses.IGNORE_INDEX, stated again since the data half runs without torch
UNKNOWN = 254  # in a label map: the layout gives this raw value no meaning
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ClassInfo:
    """One class; its train id is its place in the list."""

    name: str
    color: tuple[int, int, int]  # RGB, for pictures only


@dataclass(frozen=True)
class Sample:
    """One image and its mask; either file may turn out to be missing."""

    id: str
    split: str
    image: Path
    mask: Path


class Layout(ABC):
    """A known way to lay a data set out in files.

    Constructing one reads only the small files that describe the data set (class list, split lists), never an image.
    """

    name: ClassVar[str]

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; the layout '{self.name}' is read from a folder")
        self.root = root

    @property
    @abstractmethod
    def classes(self) -> tuple[ClassInfo, ...]:
        """The classes, in the order of their train ids."""

    @property
    @abstractmethod
    def raw_labels(self) -> Mapping[int, int]:
        """Train id (or IGNORE_INDEX) of every raw mask value that has a meaning."""

    @abstractmethod
    def samples(self, split: str) -> Iterator[Sample]:
        """The samples of a split, always in the same order."""

    @abstractmethod
    def folders(self, split: str) -> tuple[Path, Path]:
        """The folder of a split's images and the folder of its masks."""

    @cached_property
    def label_map(self) -> np.ndarray:
        """[256] uint8: raw mask value -> train id, IGNORE_INDEX where ignored, UNKNOWN where it has no meaning."""
        table = np.full(256, UNKNOWN, dtype=np.uint8)
        for raw, train_id in self.raw_labels.items():
            table[raw] = train_id
        return table

    def strays(self, split: str) -> list[Path]:
        """Files in the split's folders that belong to no sample, such as a mask without an image; hidden ones aside."""
        used = {path for sample in self.samples(split) for path in (sample.image, sample.mask)}
        found = [path for folder in self.folders(split) if folder.is_dir() for path in sorted(folder.iterdir())]
        return [path for path in found if path not in used and not path.name.startswith(".")]


def describe_values(values: list[int]) -> str:
    """Sorted integers as ranges: ``0-10 and 255``."""
    ranges: list[list[int]] = []
    for value in values:
        if ranges and value == ranges[-1][1] + 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    words = [str(low) if low == high else f"{low}-{high}" for low, high in ranges]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
