"""The layout of one's own data: ``images/<split>``, ``masks/<split>`` and ``classes.json``."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import pydantic

from segdistill.config import config, parse
from segdistill.data.layouts.layout import (
    IGNORE_INDEX,
    IMAGE_SUFFIXES,
    SPLITS,
    UNKNOWN,
    WITHOUT_MASKS,
    ClassInfo,
    Layout,
    Sample,
    list_folder,
)
from segdistill.errors import UserError, nearest
from segdistill.files import read_json

Byte = Annotated[int, pydantic.Field(ge=0, le=255, strict=True)]


@config
class ClassEntry:
    """One class in ``classes.json``."""

    name: str
    color: tuple[Byte, Byte, Byte]


@config
class ClassList:
    """The content of ``classes.json``."""

    classes: list[ClassEntry]
    # The stored value that means "no label": 255, unless ``values`` gives that a meaning.
    ignore_index: Byte | None = None
    # Stored value -> name of a class, or null for "no label"; without it, a class's place in the list is its value.
    values: dict[str, str | None] | None = None


class Folder(Layout):
    """``images/<split>/<id>.jpg|png|tif|npy``, ``masks/<split>/<id>.png`` and ``classes.json``: what a pixel means.

    ``images/unlabelled/<id>.*``, which may be absent, has no masks.
    """

    name = "folder"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._classes, self._raw_labels = read_classes(root / "classes.json")
        for kind in ("images", "masks"):
            if not (root / kind).is_dir():
                raise UserError(f"{root / kind}: no such folder; the layout 'folder' needs {kind}/<split> in {root}")
        for path in list_folder(root / "images"):
            if path.is_dir() and path.name not in (*SPLITS, WITHOUT_MASKS):
                raise UserError(f"{path}: unknown split '{path.name}'{nearest(path.name, (*SPLITS, WITHOUT_MASKS))}")

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        return self._classes

    @property
    def raw_labels(self) -> Mapping[int, int]:
        return self._raw_labels

    def folders(self, split: str) -> tuple[Path, Path]:
        return self.root / "images" / split, self.root / "masks" / split

    def samples(self, split: str) -> Iterator[Sample]:
        images, masks = self.folders(split)
        # A mask of another kind than .png is taken along, so that it can be refused for what it is.
        best_first = sorted(list_folder(masks), key=lambda mask: (mask.suffix.lower() != ".png", mask.suffix != ".png"))
        mask_of = {mask.stem: mask for mask in reversed(best_first)}
        for path in list_folder(images):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                mask = mask_of.get(path.stem, masks / f"{path.stem}.png")
                yield Sample(path.stem, split, path, None if split == WITHOUT_MASKS else mask)


def read_classes(path: Path) -> tuple[tuple[ClassInfo, ...], dict[int, int]]:
    """The classes, and the train id (or IGNORE_INDEX) of every stored value that has a meaning."""
    if not path.exists():
        raise UserError(f"{path}: no such file; it lists the classes of the layout 'folder'")
    data = read_json(path)
    try:
        content = parse(ClassList, data, "")
        names = [entry.name for entry in content.classes]
        check_names(names)
        raw_labels = _raw_labels(content, names)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return tuple(ClassInfo(entry.name, entry.color) for entry in content.classes), raw_labels


def check_names(names: list[str]) -> None:
    """Raises a UserError for names that cannot be those of a data set's classes."""
    if not 2 <= len(names) <= UNKNOWN:
        raise UserError(f"classes: {len(names)} given; allowed: 2 to {UNKNOWN}")
    for name in names:
        if not name.strip():
            raise UserError(f"classes.{names.index(name)}.name: empty; every class needs a name")
        if not name.isprintable():
            raise UserError(f"classes.{names.index(name)}.name: {name!r} has characters that no table can show")
        if names.count(name) > 1:
            raise UserError(f"classes: the name '{name}' stands there twice; each class needs its own")


def _raw_labels(content: ClassList, names: list[str]) -> dict[int, int]:
    ignored = IGNORE_INDEX if content.ignore_index is None else content.ignore_index
    if content.values is None:
        if ignored < len(names):
            allowed = f"allowed: {len(names)} to 255"
            raise UserError(f"ignore_index: {ignored} is also the index of a class; {allowed}")
        return {**{index: index for index in range(len(names))}, ignored: IGNORE_INDEX}
    table = {}
    for key, name in content.values.items():
        if key not in _BYTES:
            raise UserError(f"values: '{key}' is no value of a mask; allowed: 0 to 255")
        if name is not None and name not in names:
            raise UserError(f"values.{key}: no class '{name}'{nearest(name, names)}")
        table[int(key)] = IGNORE_INDEX if name is None else names.index(name)
    if content.ignore_index is not None and table.get(ignored, IGNORE_INDEX) != IGNORE_INDEX:
        raise UserError(f"ignore_index: {ignored} is also a value of '{content.values[str(ignored)]}'; say one of both")
    return {ignored: IGNORE_INDEX, **table}


_BYTES = frozenset(map(str, range(256)))
