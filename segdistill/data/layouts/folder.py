"""The layout of one's own data: ``images/<split>``, ``masks/<split>`` and ``classes.json``."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import pydantic

from segdistill.config import config, parse
from segdistill.data.layouts.layout import IGNORE_INDEX, SPLITS, UNKNOWN, ClassInfo, Layout, Sample
from segdistill.errors import UserError, nearest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

Byte = Annotated[int, pydantic.Field(ge=0, le=255)]


@config
class ClassEntry:
    """One class in ``classes.json``."""

    name: str
    color: tuple[Byte, Byte, Byte]


@config
class ClassList:
    """The content of ``classes.json``."""

    classes: list[ClassEntry]
    ignore_index: Byte = IGNORE_INDEX


class Folder(Layout):
    """``images/<split>/<id>.jpg|png`` beside ``masks/<split>/<id>.png``; a mask's pixel is its class's index."""

    name = "folder"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._list = _read_classes(root / "classes.json")
        for kind in ("images", "masks"):
            if not (root / kind).is_dir():
                raise UserError(f"{root / kind}: no such folder; the layout 'folder' needs {kind}/<split> in {root}")
        for path in sorted((root / "images").iterdir()):
            if path.is_dir() and path.name not in SPLITS and not path.name.startswith("."):
                raise UserError(f"{path}: unknown split '{path.name}'{nearest(path.name, SPLITS)}")

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        return tuple(ClassInfo(entry.name, entry.color) for entry in self._list.classes)

    @property
    def raw_labels(self) -> Mapping[int, int]:
        return {**{index: index for index in range(len(self._list.classes))}, self._list.ignore_index: IGNORE_INDEX}

    def folders(self, split: str) -> tuple[Path, Path]:
        return self.root / "images" / split, self.root / "masks" / split

    def samples(self, split: str) -> Iterator[Sample]:
        images, masks = self.folders(split)
        for path in sorted(images.iterdir()) if images.is_dir() else []:
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
                yield Sample(path.stem, split, path, masks / f"{path.stem}.png")


def _read_classes(path: Path) -> ClassList:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it lists the classes of the layout 'folder'") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    try:
        content = parse(ClassList, data, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    names = [entry.name for entry in content.classes]
    if not 2 <= len(names) <= UNKNOWN:
        raise UserError(f"{path}: classes: {len(names)} given; allowed: 2 to {UNKNOWN}")
    for name in names:
        if not name.strip():
            raise UserError(f"{path}: classes.{names.index(name)}.name: empty; every class needs a name")
        if names.count(name) > 1:
            raise UserError(f"{path}: classes: the name '{name}' stands there twice; each class needs its own")
    if content.ignore_index < len(names):
        allowed = f"allowed: {len(names)} to 255"
        raise UserError(f"{path}: ignore_index: {content.ignore_index} is also the index of a class; {allowed}")
    return content
