"""The layouts we read, one file each. A new one is a file and a line in the table."""

from pathlib import Path

from segdistill.data.layouts.ade20k import Ade20k
from segdistill.data.layouts.camvid import CamVid
from segdistill.data.layouts.camvid_original import CamVidOriginal
from segdistill.data.layouts.cityscapes import Cityscapes, CityscapesCoarse
from segdistill.data.layouts.coco_stuff import CocoStuff
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
from segdistill.data.layouts.pascal_context import PascalContext59, PascalContext60
from segdistill.data.layouts.voc import Voc, VocAugmented
from segdistill.data.zips import with_zips
from segdistill.errors import UserError, nearest

# Of several that recognise a folder the first counts; the others are chosen by name.
LAYOUTS: dict[str, type[Layout]] = {
    layout.name: layout
    for layout in (
        Folder,
        CamVid,
        CamVidOriginal,
        Cityscapes,
        CityscapesCoarse,
        Ade20k,
        Voc,
        VocAugmented,
        PascalContext59,
        PascalContext60,
        CocoStuff,
    )
}


def open_layout(name: str, root: Path) -> Layout:
    """The data set in a folder, in which zips stand for what they hold.

    Raises:
        UserError: no such layout or folder, an archive that is not safe, or a description (class list, split list)
            that cannot be read.
    """
    if name not in LAYOUTS:
        raise UserError(f"unknown layout '{name}'{nearest(name, LAYOUTS)}")
    return LAYOUTS[name](with_zips(root))


def recognised_layout(root: Path) -> str:
    """The name of the first layout that a folder looks like: "folder" if it looks like none."""
    folder = with_zips(root)
    return next((name for name, layout in LAYOUTS.items() if layout.recognises(folder)), Folder.name)


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
    "recognised_layout",
]
