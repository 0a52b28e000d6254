"""What a data set on disk must tell us, however it is laid out."""

import colorsys
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from segdistill.data.decoding import INDEX_MASKS
from segdistill.errors import UserError

IGNORE_INDEX = 255  # as segdistill.losses.IGNORE_INDEX, stated again since the data half runs without torch
UNLABELLED = 254  # as segdistill.losses.UNLABELLED: every pixel of an image without a mask
UNKNOWN = 254  # in a legend: the layout gives this raw value no meaning; no label map that is written has it
SPLITS = ("train", "val", "test")
WITHOUT_MASKS = "unlabelled"  # the split of images for which nobody drew a mask; a data set need not have it
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".npy")  # in small or capital letters
SHOWN = 3  # files named in one sentence


Color = tuple[int, int, int]  # RGB


@dataclass(frozen=True)
class ClassInfo:
    """One class; its train id is its place in the list."""

    name: str
    color: Color  # for pictures only


@dataclass(frozen=True)
class Sample:
    """One image and its mask; either file may turn out to be missing. A mask of None was never drawn."""

    id: str
    split: str
    image: Path
    mask: Path | None
    sequence: str | None = None  # the drive or film of which it is a frame, where the data set says so


@dataclass(frozen=True)
class Legend:
    """What the values of a mask mean."""

    # Stored value -> train id, IGNORE_INDEX if ignored, UNKNOWN without a meaning; larger values have none.
    label_map: np.ndarray  # [V] uint8, V at least 256
    colors: tuple[Color, ...]  # by train id
    mask_colors: Mapping[Color, int] = field(default_factory=dict)  # stored value, where masks are pictures in colours
    mask_kinds: tuple[str, ...] = INDEX_MASKS  # what masks may be, of the kinds of segdistill.data.decoding

    def label(self, value: int) -> int:
        """The train id of a stored value, IGNORE_INDEX or UNKNOWN."""
        return int(self.label_map[value]) if value < len(self.label_map) else UNKNOWN


class Layout(ABC):
    """A known way to lay a data set out in files.

    Constructing one reads only the small files that describe the data set (class list, split lists), never an image.
    """

    name: ClassVar[str]
    # Samples of each split in the official release; validate warns where there are others.
    official_samples: ClassVar[Mapping[str, int]] = {}
    # The split that is the test split too: "val" where nobody but the publisher has labels of the official one.
    tested_on: ClassVar[str] = "test"
    # Whether a split's folders hold other files than its own, so that a stray one cannot be told.
    shared_folders: ClassVar[bool] = False
    mask_kinds: ClassVar[tuple[str, ...]] = INDEX_MASKS

    @classmethod
    def recognises(cls, root: Path) -> bool:
        """Whether a folder looks like this layout, by the folders in it."""
        return False

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; the layout '{self.name}' is read from a folder")
        self.root = require_utf8(root)

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
    def splits(self) -> tuple[str, ...]:
        """The three with masks, and the one without if it has images."""
        return (*SPLITS, WITHOUT_MASKS) if any(self.samples(WITHOUT_MASKS)) else SPLITS

    @property
    def own_splits(self) -> tuple[str, ...]:
        """Those whose samples are not another split's as well."""
        return tuple(split for split in self.splits if split != "test" or self.tested_on == split)

    @property
    def mask_colors(self) -> Mapping[Color, int]:
        """The raw value of every colour, where masks are pictures in colours."""
        return {}

    @cached_property
    def legend(self) -> Legend:
        """What the values of this data set's masks mean."""
        table = np.full(max(255, *self.raw_labels) + 1, UNKNOWN, dtype=np.uint8)
        for raw, train_id in self.raw_labels.items():
            table[raw] = train_id
        return Legend(table, tuple(entry.color for entry in self.classes), self.mask_colors, self.mask_kinds)

    def strays(self, split: str) -> list[Path]:
        """What lies in the split's folders and belongs to no sample, such as a mask without an image; hidden aside."""
        if self.shared_folders:
            return []
        used = {path for sample in self.samples(split) for path in (sample.image, sample.mask)}
        return [path for folder in self.folders(split) for path in list_folder(folder) if path not in used]

    def describe_strays(self, strays: list[Path], split: str) -> str | None:
        """In words: which, and why the first of them are no samples of the split; None without any."""
        if not strays:
            return None
        names = [
            f"{path.relative_to(self.root).as_posix()} ({self._why_stray(path, split)})" for path in strays[:SHOWN]
        ]
        more = f" and {len(strays) - SHOWN} more" if len(strays) > SHOWN else ""
        return ", ".join(names) + more

    def without_samples(self) -> UserError:
        """The sentence for a data set in which no sample was found: what lies there instead."""
        folders = {split: self.folders(split)[0] for split in SPLITS}
        strays = (
            self.describe_strays([] if self.shared_folders else list_folder(folder), split)
            for split, folder in folders.items()
        )
        names = [folder.relative_to(self.root).as_posix() for folder in folders.values()]
        reason = next(
            (f"there is {text}" for text in strays if text), f"expected JPEG or PNG files in {', '.join(names)}"
        )
        return UserError(f"{self.root}: no sample in any split of the layout '{self.name}'; {reason}")

    def _why_stray(self, path: Path, split: str) -> str:
        masks = self.folders(split)[1]
        if path.is_dir():
            return f"a sub-folder: samples lie in {path.parent.relative_to(self.root).as_posix()} itself"
        if path.parent == masks:
            return "a mask without an image" if split in SPLITS else "a mask in the split without masks"
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            return f"'{path.suffix}' is not read: save it as JPEG or PNG" if path.suffix else "no JPEG or PNG file"
        return "of no sample"


def list_folder(folder: Path) -> list[Path]:
    """What a folder holds, in the order of names, hidden files aside; nothing if there is no such folder.

    Raises:
        UserError: a name that is not UTF-8, or a folder that cannot be read.
    """
    try:
        paths = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
    return [require_utf8(path) for path in paths if not path.name.startswith(".")]


def require_utf8(path: Path) -> Path:
    """The path itself, if reports and tables can hold its name.

    Raises:
        UserError: they cannot; shows the bytes that are none.
    """
    name = os.fsencode(path)
    try:
        name.decode()
    except UnicodeDecodeError:
        raise UserError(f"{name.decode(errors='backslashreplace')}: its name is not UTF-8; rename it") from None
    return path


def hue(number: int) -> Color:
    """A colour for pictures that is far from its neighbours', and never grey."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.65, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


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
