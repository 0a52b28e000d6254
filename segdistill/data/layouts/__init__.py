"""The layouts we read, one file each. A new one is a file and a word in the table."""

from pathlib import Path

from segdistill.data.layouts.camvid import CamVid
from segdistill.data.layouts.folder import Folder
from segdistill.data.layouts.layout import (
    IGNORE_INDEX,
    SPLITS,
    UNKNOWN,
    UNLABELLED,
    WITHOUT_MASKS,
    ClassInfo,
    Layout,
    Legend,
    Sample,
)
from segdistill.errors import UserError, nearest

LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in (Folder, CamVid)}


def open_layout(name: str, root: Path) -> Layout:
    """The data set in a folder.

    Raises:
        UserError: no such layout or folder, or a description (class list, split list) that cannot be read.
    """
    if name not in LAYOUTS:
        raise UserError(f"unknown layout '{name}'{nearest(name, LAYOUTS)}")
    return LAYOUTS[name](root)


__all__ = [
    "IGNORE_INDEX",
    "LAYOUTS",
    "SPLITS",
    "UNKNOWN",
    "UNLABELLED",
    "WITHOUT_MASKS",
    "ClassInfo",
    "Layout",
    "Legend",
    "Sample",
    "open_layout",
]
