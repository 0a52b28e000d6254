"""Photos and masks as people keep them: which files belong together, and which split their place names.

A mask is told from a photo by a folder (``masks/``, ``labels/``), by the end of its name (``a_mask.png``), or by being
the PNG beside another image of its name. What is left of the path is the sample's name, in which a folder may name a
split.
"""

import csv
import logging
from dataclasses import replace
from pathlib import Path

from segdistill.data.layouts import SPLITS, WITHOUT_MASKS, Sample
from segdistill.data.layouts.layout import IMAGE_SUFFIXES, SHOWN, list_folder, require_utf8
from segdistill.errors import UserError, nearest
from segdistill.files import read_text

UNDECIDED = ""  # the split of a labelled sample whose place names none
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "photos", "frames", "rgb", "jpegimages")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "annots", "gt", "segmentationclass")
MASK_ENDINGS = ("_mask", "-mask", "_masks", "_label", "-label", "_labels", "_labelids", "_gt", "_seg")
SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test", "unlabelled": WITHOUT_MASKS, "unlabeled": WITHOUT_MASKS,
}  # fmt: skip
OTHER_PICTURES = (".bmp", ".gif", ".heic", ".jp2", ".ppm", ".pgm", ".raw", ".webp")
MOST_CSV = 2**28  # bytes of a list of pairs


def pair_tree(root: Path) -> list[Sample]:
    """The samples below a folder, each with the split that its place names, WITHOUT_MASKS, or UNDECIDED.

    Raises:
        UserError: no pair, a mask without an image, two files for one name, or a picture of another format.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    images: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    undecided: list[tuple[str, Path]] = []
    others: list[Path] = []
    for path in list_files(require_utf8(root)):
        kind, key = _place(path.relative_to(root))
        if path.suffix.lower() in OTHER_PICTURES:
            raise UserError(f"{path}: '{path.suffix}' is not read; save photos as JPEG or PNG and masks as PNG")
        if kind == "mask" and path.suffix.lower() in (".tif", ".tiff", ".npy"):
            raise UserError(f"{path}: a mask of the kind '{path.suffix}' is not read; save masks as PNG")
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            others.append(path)
        elif kind is None and path.suffix.lower() == ".png":
            undecided.append((key, path))
        else:
            _add(masks if kind == "mask" else images, key, path)
    for key, path in undecided:  # beside a JPEG (TIFF, .npy) of its name it is the mask
        _add(
            masks if key in images and key not in masks and images[key].suffix.lower() != ".png" else images, key, path
        )
    if orphans := [masks[key] for key in masks if key not in images]:
        names = ", ".join(path.relative_to(root).as_posix() for path in orphans[:SHOWN])
        more = f" and {len(orphans) - SHOWN} more" if len(orphans) > SHOWN else ""
        raise UserError(f"{root}: no image for the masks {names}{more}; a mask has its image's name")
    if not masks:
        raise UserError(
            f"{root}: no image with a mask; expected images/NAME.jpg beside masks/NAME.png, or NAME.jpg beside NAME.png"
        )
    if ignored := [path for path in others if path.name != "classes.json"]:
        names = ", ".join(path.relative_to(root).as_posix() for path in ignored[:SHOWN])
        logging.getLogger(__name__).info("%d other files are left alone: %s", len(ignored), names)
    samples = []
    for key, image in sorted(images.items()):
        mask, parts = masks.get(key), key.split("/")
        place, named = next(((n, SPLIT_FOLDERS[p.lower()]) for n, p in enumerate(parts[:-1])
                             if p.lower() in SPLIT_FOLDERS), (None, UNDECIDED))  # fmt: skip
        name = "__".join(part for number, part in enumerate(parts) if number != place)
        if mask is not None and named == WITHOUT_MASKS:
            raise UserError(f"{mask}: a mask in the split without masks")
        samples.append(Sample(name, named if mask else WITHOUT_MASKS, image, mask))
    return samples


def pair_list(path: Path) -> list[Sample]:
    """The samples of a CSV file with the columns ``image``, ``mask`` and, if there, ``split``.

    Paths are from the file's folder; commas or semicolons divide. A row without a mask is an image without labels.

    Raises:
        UserError: a column, split or cell that is none.
    """
    lines = read_text(path, limit=MOST_CSV).splitlines()
    header = lines[0] if lines else ""
    delimiter = ";" if ";" in header and "," not in header else ","  # spreadsheets write either
    reader = csv.DictReader(lines, skipinitialspace=True, delimiter=delimiter)
    try:
        columns, rows = reader.fieldnames or (), [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + 1}: not CSV: {error}") from None
    named = set(columns) & {"image", "mask", "split"}
    for column in columns:
        if named and column not in named:
            raise UserError(f"{path}: unknown column '{column}'{nearest(column, ('image', 'mask', 'split'))}")
    if not {"image", "mask"} <= named:
        raise UserError(f"{path}: its first line must name its columns: image,mask or image,mask,split")
    samples = []
    for line, row in rows:
        image, mask, split = (row.get(column) or "" for column in ("image", "mask", "split"))
        if not image or None in row:
            raise UserError(f"{path}, line {line}: expected {delimiter.join(columns)}")
        if Path(image).is_absolute() or ".." in Path(image).parts:
            raise UserError(f"{path}, line {line}: '{image}' is no path from the list's folder to a file below it")
        if split and split not in (*SPLITS, WITHOUT_MASKS):
            raise UserError(f"{path}, line {line}: unknown split '{split}'{nearest(split, SPLITS)}")
        if mask and split == WITHOUT_MASKS:
            raise UserError(f"{path}, line {line}: a mask in the split without masks")
        mask_path = path.parent / mask if mask else None
        samples.append(Sample(Path(image).stem, split if mask else WITHOUT_MASKS, path.parent / image, mask_path))
    if not any(sample.mask for sample in samples):
        raise UserError(f"{path}: no row has an image and a mask")
    if len({sample.id for sample in samples}) < len(samples):  # a file's name alone is not enough
        places = [sample.image.relative_to(path.parent).with_suffix("").parts for sample in samples]
        samples = [replace(sample, id="__".join(parts)) for sample, parts in zip(samples, places, strict=True)]
    return samples


def list_files(folder: Path) -> list[Path]:
    """The files below a folder, hidden ones aside, such as those that macOS puts beside every photo.

    Raises:
        UserError: a name that is not UTF-8, or a folder that cannot be read.
    """
    paths = list_folder(folder)
    return [path for path in paths if path.is_file()] + [
        below for path in paths if path.is_dir() for below in list_files(path)
    ]


def _place(path: Path) -> tuple[str | None, str]:
    """Whether a path says "image" or "mask", or neither, and the rest of it: the sample's name with its folders."""
    folders = [part for part in path.parts[:-1] if part.lower() not in (*IMAGE_FOLDERS, *MASK_FOLDERS)]
    kind = next((word for word, names in (("mask", MASK_FOLDERS), ("image", IMAGE_FOLDERS))
                 if any(part.lower() in names for part in path.parts[:-1])), None)  # fmt: skip
    stem = path.stem
    ending = next((ending for ending in MASK_ENDINGS if stem.lower().endswith(ending)), None)
    if ending and kind != "image" and path.suffix.lower() == ".png":
        kind, stem = "mask", stem[: -len(ending)]
    return kind, "/".join([*folders, stem])


def _add(files: dict[str, Path], key: str, path: Path) -> None:
    if key in files:
        raise UserError(f"{files[key]} and {path}: two files for the sample '{key}'; rename one of them")
    files[key] = path
