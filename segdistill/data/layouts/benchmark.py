"""What the layouts of published data sets share: files are read as they lie, unpacked or in their zips."""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import ClassVar

from segdistill.data.layouts.layout import IMAGE_SUFFIXES, WITHOUT_MASKS, ClassInfo, Layout, Sample, list_folder
from segdistill.errors import UserError
from segdistill.files import MIB, read_text

MOST_LIST = 64 * MIB  # bytes of a list of names
_NAME = re.compile(r"[\w-][\w.-]*")


class Benchmark(Layout):
    """A published data set. A subclass says what is published, and which files are a split's samples."""

    published_classes: ClassVar[tuple[ClassInfo, ...]]
    labels: ClassVar[Mapping[int, int]]  # train id, or IGNORE_INDEX, of each value that official masks store
    archives: ClassVar[str]  # the names of what is downloaded, in words
    tops: ClassVar[tuple[str, ...]] = ("",)  # folders that the archives, or their tool, make around the others
    required: ClassVar[tuple[str, ...]]  # folders without which it is not this data set

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        top = self._top(root)
        if top is None:
            missing = " and ".join(self.required)
            raise UserError(
                f"{root}: has no {missing}; the layout '{self.name}' is what {self.archives} unpack to: segdistill data"
                f" import {self.name} FOLDER_OF_ARCHIVES"
            )
        self.top = top  # the folder that has the required ones
        self._samples: dict[str, tuple[Sample, ...]] = {}

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return cls._top(root) is not None

    @classmethod
    def _top(cls, root: Path) -> Path | None:
        tops = (root / top for top in cls.tops)
        return next((top for top in tops if all((top / folder).is_dir() for folder in cls.required)), None)

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        return self.published_classes

    @property
    def raw_labels(self) -> Mapping[int, int]:
        return self.labels

    def samples(self, split: str) -> Iterator[Sample]:
        if split not in self._samples:
            repeated = split == "test" and self.tested_on != split
            listed = self.samples(self.tested_on) if repeated else self.list_samples(split)
            self._samples[split] = tuple(replace(sample, split=split) for sample in listed)
        yield from self._samples[split]

    @abstractmethod
    def list_samples(self, split: str) -> Iterator[Sample]:
        """The samples of a split that has its own; read from disk once."""

    def first_folder(self, *names: str) -> Path:
        """The first of these folders, below the top or the root, that is there; else where it is expected."""
        places = [top / name for name in names for top in dict.fromkeys((self.top, self.root))]
        return next((place for place in places if place.is_dir()), places[0])


def class_table(text: str) -> tuple[ClassInfo, ...]:
    """Classes in the order of their train ids, from ``name RRGGBB, name RRGGBB``."""
    entries = (" ".join(entry.split()).rpartition(" ") for entry in text.split(","))
    return tuple(
        ClassInfo(name, (int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16))) for name, _, code in entries
    )


def list_images(folder: Path) -> Iterator[Path]:
    """The JPEG and PNG files of a folder, in the order of their names."""
    return (path for path in list_folder(folder) if path.suffix.lower() in IMAGE_SUFFIXES)


def list_pairs(split: str, images: Path, masks: Path) -> Iterator[Sample]:
    """The images of a folder, each with the mask of its name; of the split without masks none."""
    for image in list_images(images):
        yield Sample(image.stem, split, image, None if split == WITHOUT_MASKS else masks / f"{image.stem}.png")


def read_names(path: Path) -> list[str]:
    """The names of a list of images: one a line, alone or as the first of several paths (``/JPEGImages/NAME.jpg ...``).

    Raises:
        UserError: no such file, or a line without a name.
    """
    names = []
    for number, line in enumerate(read_text(path, limit=MOST_LIST).splitlines(), start=1):
        if not line.strip():
            continue
        name = PurePosixPath(line.split()[0]).name.removesuffix(".jpg")
        if not _NAME.fullmatch(name):
            raise UserError(f"{path}, line {number}: expected the name of an image, found '{line.strip()[:200]}'")
        names.append(name)
    return names
