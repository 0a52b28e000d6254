"""Facts about every file of a data set. A broken file is a fact like any other; the verdict is made elsewhere."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segdistill import files
from segdistill.data.decoding import FILE_LIMIT, BadFile, Mask, decode_mask, decode_pixels, mask_kind
from segdistill.data.layouts import IGNORE_INDEX, UNKNOWN, UNLABELLED, Layout, Legend, Sample
from segdistill.data.layouts.layout import describe_values
from segdistill.data.parallel import ordered_map
from segdistill.errors import UserError
from segdistill.images import ImageFormat

BLOCK = 2**22  # values counted at a time: counting widens each to eight bytes


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """One sample as found on disk; None stands where a broken file leaves nothing to say."""

    split: str
    sample_id: str
    image: str  # relative to the data folder
    mask: str | None
    image_problem: str | None = None
    image_sha256: str | None = None
    image_size: tuple[int, int] | None = None  # width, height; upright
    image_pixels: str | None = None  # "3 channels of 8 bits"
    mask_problem: str | None = None
    mask_size: tuple[int, int] | None = None
    mask_kind: str | None = None  # "8-bit grey", "16-bit grey", "8-bit RGB", ...
    values: dict[int, int] | None = None  # stored value -> pixels
    unknown_labels: dict[int, int] | None = None  # those of them outside the class list
    palette_problem: str | None = None
    ignore_fraction: float | None = None
    class_pixels: tuple[int, ...] | None = None  # by train id


def inspect(layout: Layout, samples: list[Sample], *, workers: int) -> Iterator[FileFacts]:
    """The facts of every sample, in order.

    Args:
        layout: the data set.
        samples: which samples of it.
        workers: processes; 0 = all cores.
    """
    return ordered_map(
        functools.partial(inspect_sample, root=layout.root, legend=layout.legend), samples, workers=workers
    )


def inspect_sample(sample: Sample, *, root: Path, legend: Legend) -> FileFacts:
    """The facts of one sample; it raises nothing, whatever the files hold."""
    facts = {**_image_facts(sample.image), **(_mask_facts(sample.mask, legend) if sample.mask else {})}
    image = sample.image.relative_to(root).as_posix()
    mask = sample.mask.relative_to(root).as_posix() if sample.mask else None
    return FileFacts(split=sample.split, sample_id=sample.id, image=image, mask=mask, **facts)  # type: ignore[arg-type]


def read_file(path: Path) -> bytes:
    """The content of an image or a mask.

    Raises:
        BadFile: missing, empty, too large, no regular file, or not readable.
    """
    try:
        content = files.read_bytes(path, limit=FILE_LIMIT)
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise BadFile("missing" if reason == "no such file" else reason) from None
    if not content:
        raise BadFile("empty file")
    return content


def load_sample(sample: Sample, legend: Legend) -> tuple[bytes, np.ndarray, np.ndarray]:
    """The encoded image, its upright pixels, and the train ids of a sample that is whole.

    Shape:
        pixels [H, W, C] uint8 or uint16; train ids [H, W] uint8.

    Raises:
        BadFile: with the whole sentence, the file's name included.
    """
    path = sample.image
    try:
        content = read_file(path)
        pixels = decode_pixels(content)
        if sample.mask is None:
            return content, pixels, np.full(pixels.shape[:2], UNLABELLED, dtype=np.uint8)
        path = sample.mask
        mask = decode_mask(read_file(path), legend.mask_kinds, legend.mask_colors)
        if mask.values.shape != pixels.shape[:2]:
            raise BadFile(size_mismatch(_width_and_height(mask.values), _width_and_height(pixels)))
        counts = value_counts(mask.values)
        if unknown := unknown_labels(counts, legend):
            raise BadFile(outside_class_list(unknown, legend))
        if contradiction := palette_problem(mask, counts, legend):
            raise BadFile(contradiction)
    except BadFile as problem:
        raise BadFile(f"{path}: {problem}") from None
    return content, pixels, legend.label_map[mask.values]


def format_of(pixels: np.ndarray) -> ImageFormat:
    """Channels and bits of an image [H, W, C]."""
    return ImageFormat(channels=pixels.shape[2], bits=8 if pixels.dtype == np.uint8 else 16)


def _width_and_height(pixels: np.ndarray) -> tuple[int, int]:
    return pixels.shape[1], pixels.shape[0]


def value_counts(values: np.ndarray) -> dict[int, int]:
    """How many pixels store each value that occurs."""
    flat, counts = values.ravel(), np.zeros(np.iinfo(values.dtype).max + 1, dtype=np.int64)
    for start in range(0, flat.size, BLOCK):
        counts += np.bincount(flat[start : start + BLOCK], minlength=len(counts))
    return {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}


def unknown_labels(counts: dict[int, int], legend: Legend) -> dict[int, int]:
    """Those of the stored values that the layout gives no meaning."""
    return {value: pixels for value, pixels in counts.items() if legend.label(value) == UNKNOWN}


def palette_problem(mask: Mask, counts: dict[int, int], legend: Legend) -> str | None:
    """The words for a palette that says another class than the index does: of its colours, not only of its order.

    A palette that has other colours than the class list's says nothing of classes, and may share some with it by
    chance: it contradicts if more of the stored values have another class's colour than a colour of no class.
    """
    labels = {value: legend.label(value) for value in counts if value < len(mask.palette)}
    labels = {value: label for value, label in labels.items() if label < len(legend.colors)}
    colours = {value: mask.palette[value] for value in labels}
    known = {value: legend.colors.index(colour) for value, colour in colours.items() if colour in legend.colors}
    wrong = [value for value in known if colours[value] != legend.colors[labels[value]]]
    if len(wrong) <= len(colours) - len(known):
        return None
    value = wrong[0]
    return (
        f"its palette contradicts the class list: value {value} is class {labels[value]} there, but has the colour "
        f"{colours[value]} of class {known[value]}; order both alike, or change the colours of the list"
    )


def size_mismatch(mask: tuple[int, int], image: tuple[int, int]) -> str:
    """The words for a mask that does not fit its image."""
    turned = "; images are read as their EXIF orientation turns them" if mask == image[::-1] else ""
    return f"{mask[0]}x{mask[1]} pixels, but its image has {image[0]}x{image[1]}{turned}"


def outside_class_list(unknown: dict[int, int], legend: Legend) -> str:
    """The words for labels without a meaning: which, what is allowed instead, and in how many pixels."""
    allowed = describe_values(np.flatnonzero(legend.label_map != UNKNOWN).tolist())
    names = describe_values(list(unknown))
    word, pixels = ("label" if len(unknown) == 1 else "labels"), sum(unknown.values())
    return f"{word} {names} outside the class list (allowed {allowed}), in {pixels} pixel{'s' if pixels != 1 else ''}"


def _image_facts(path: Path) -> dict[str, object]:
    facts: dict[str, object] = {}
    try:
        content = read_file(path)
        facts["image_sha256"] = hashlib.sha256(content).hexdigest()
        pixels = decode_pixels(content)
        facts["image_size"] = _width_and_height(pixels)
        facts["image_pixels"] = str(format_of(pixels))
    except BadFile as problem:
        facts["image_problem"] = str(problem)
    return facts


def _mask_facts(path: Path, legend: Legend) -> dict[str, object]:
    facts: dict[str, object] = {}
    try:
        content = read_file(path)
        facts["mask_kind"] = mask_kind(content)
        if facts["mask_kind"] not in legend.mask_kinds:
            return facts
        mask = decode_mask(content, legend.mask_kinds, legend.mask_colors)
    except BadFile as problem:
        facts["mask_problem"] = str(problem)
        return facts
    counts = value_counts(mask.values)
    trained = np.zeros(256, dtype=np.int64)  # pixels by train id
    for value, pixels in counts.items():
        trained[legend.label(value)] += pixels
    facts["mask_size"] = _width_and_height(mask.values)
    facts["values"] = counts
    facts["unknown_labels"] = unknown_labels(counts, legend)
    facts["palette_problem"] = palette_problem(mask, counts, legend)
    facts["ignore_fraction"] = float(trained[IGNORE_INDEX] / mask.values.size)
    facts["class_pixels"] = tuple(int(pixels) for pixels in trained[: len(legend.colors)])
    return facts
