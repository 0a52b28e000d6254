"""Facts about every file of a data set. A broken file is a fact like any other; the verdict is made elsewhere."""

import functools
import hashlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from segdistill.data.layouts import IGNORE_INDEX, UNKNOWN, Layout, Sample
from segdistill.data.layouts.layout import describe_values
from segdistill.data.parallel import ordered_map

IMAGE_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")  # 8 bits a channel: nothing is lost as RGB
INDEX_MASKS = ("8-bit grey", *(f"{bits}-bit palette" for bits in (1, 2, 4, 8)))  # pixels hold class indices
_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}


class BadFile(Exception):
    """Why a file cannot be used, in words that follow its name and a colon."""


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """One sample as found on disk; None stands where a broken file leaves nothing to say."""

    split: str
    sample_id: str
    image: str  # relative to the data folder
    mask: str
    image_problem: str | None = None
    image_sha256: str | None = None
    image_size: tuple[int, int] | None = None  # width, height
    mask_problem: str | None = None
    mask_size: tuple[int, int] | None = None
    mask_kind: str | None = None  # "8-bit grey", "16-bit grey", "8-bit RGB", ...
    label_min: int | None = None  # raw values, ignored ones aside
    label_max: int | None = None
    unknown_labels: dict[int, int] | None = None  # raw values outside the class list -> pixels
    ignore_fraction: float | None = None
    class_pixels: tuple[int, ...] | None = None  # by train id


def inspect(layout: Layout, samples: list[Sample], *, workers: int) -> Iterator[FileFacts]:
    """The facts of every sample, in order.

    Args:
        layout: the data set.
        samples: which samples of it.
        workers: processes; 0 = all cores.
    """
    task = functools.partial(
        inspect_sample, root=layout.root, label_map=layout.label_map, num_classes=len(layout.classes)
    )
    return ordered_map(task, samples, workers=workers)


def inspect_sample(sample: Sample, *, root: Path, label_map: np.ndarray, num_classes: int) -> FileFacts:
    """The facts of one sample; it raises nothing, whatever the files hold."""
    facts = {**_image_facts(sample.image), **_mask_facts(sample.mask, label_map, num_classes)}
    image, mask = (path.relative_to(root).as_posix() for path in (sample.image, sample.mask))
    return FileFacts(split=sample.split, sample_id=sample.id, image=image, mask=mask, **facts)  # type: ignore[arg-type]


def read_bytes(path: Path) -> bytes:
    """The content of a file that must not be empty.

    Raises:
        BadFile: missing, empty, or not readable.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadFile("missing") from None
    except OSError as error:
        raise BadFile(f"cannot be read: {error.strerror}") from None
    if not content:
        raise BadFile("empty file")
    return content


def decode_image(content: bytes) -> Image.Image:
    """A fully decoded JPEG or PNG.

    Raises:
        BadFile: another format, truncated, damaged, or more than 8 bits a channel.
    """
    image = _decode(content, ("JPEG", "PNG"))
    if image.mode not in IMAGE_MODES:
        raise BadFile(f"pixels of mode {image.mode}; an image must have 8 bits a channel")
    return image


def decode_mask(content: bytes) -> np.ndarray:
    """The raw values of an index mask.

    Shape:
        returns: [H, W] uint8.

    Raises:
        BadFile: not a PNG, damaged, or pixels that are no class indices (16 bits, RGB).
    """
    kind = mask_kind(content)
    if kind not in INDEX_MASKS:
        raise BadFile(f"{kind} where an index mask is due (8-bit grey or palette, value = class)")
    return np.asarray(_decode(content, ("PNG",)), dtype=np.uint8)


def mask_kind(content: bytes) -> str:
    """Bit depth and colour type of a PNG, as its header says: a decoder would hide them by widening the values.

    Raises:
        BadFile: not a PNG.
    """
    if content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:16] != b"IHDR" or len(content) < 26:
        raise BadFile("not a PNG file")
    return f"{content[24]}-bit {_PNG_COLOURS.get(content[25], 'unknown')}"


def load_sample(sample: Sample, label_map: np.ndarray) -> tuple[bytes, Image.Image, np.ndarray]:
    """The encoded image, the decoded image, and the train ids [H, W] uint8 of a sample that is whole.

    Raises:
        BadFile: with the whole sentence, the file's name included.
    """
    path = sample.image
    try:
        content = read_bytes(path)
        image = decode_image(content)
        path = sample.mask
        raw = decode_mask(read_bytes(path))
        if raw.shape[::-1] != image.size:
            raise BadFile(size_mismatch((raw.shape[1], raw.shape[0]), image.size))
        labels = label_map[raw]
        if unknown := unknown_counts(raw, label_map):
            raise BadFile(outside_class_list(unknown, label_map))
    except BadFile as problem:
        raise BadFile(f"{path}: {problem}") from None
    return content, image, labels


def unknown_counts(raw: np.ndarray, label_map: np.ndarray) -> dict[int, int]:
    """Raw values that the layout gives no meaning, and in how many pixels each stands."""
    counts = np.bincount(raw.ravel(), minlength=256)  # [256]
    return {value: int(counts[value]) for value in range(256) if counts[value] and label_map[value] == UNKNOWN}


def size_mismatch(mask: tuple[int, int], image: tuple[int, int]) -> str:
    """The words for a mask that does not fit its image."""
    return f"{mask[0]}x{mask[1]} pixels, but its image has {image[0]}x{image[1]}"


def outside_class_list(unknown: dict[int, int], label_map: np.ndarray) -> str:
    """The words for labels without a meaning: which, what is allowed instead, and in how many pixels."""
    allowed = describe_values([value for value in range(256) if label_map[value] != UNKNOWN])
    names = describe_values(list(unknown))
    word, pixels = ("label" if len(unknown) == 1 else "labels"), sum(unknown.values())
    return f"{word} {names} outside the class list (allowed {allowed}), in {pixels} pixel{'s' if pixels != 1 else ''}"


def _decode(content: bytes, formats: tuple[str, ...]) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which is of no concern here
            image = Image.open(io.BytesIO(content), formats=formats)
            image.load()
    except Image.UnidentifiedImageError:
        raise BadFile(f"not a {' or '.join(formats)} file, or its header is damaged") from None
    except Exception as error:  # a decoder fed with garbage may raise anything
        raise BadFile(f"damaged or truncated: {error}") from None
    return image


def _image_facts(path: Path) -> dict[str, object]:
    facts: dict[str, object] = {}
    try:
        content = read_bytes(path)
        facts["image_sha256"] = hashlib.sha256(content).hexdigest()
        facts["image_size"] = decode_image(content).size
    except BadFile as problem:
        facts["image_problem"] = str(problem)
    return facts


def _mask_facts(path: Path, label_map: np.ndarray, num_classes: int) -> dict[str, object]:
    facts: dict[str, object] = {}
    try:
        content = read_bytes(path)
        facts["mask_kind"] = mask_kind(content)
        if facts["mask_kind"] not in INDEX_MASKS:
            return facts
        raw = decode_mask(content)
    except BadFile as problem:
        facts["mask_problem"] = str(problem)
        return facts
    counts = np.bincount(raw.ravel(), minlength=256)  # [256]
    labels = [value for value in range(256) if counts[value] and label_map[value] != IGNORE_INDEX]
    trained = np.bincount(label_map, weights=counts, minlength=256).astype(np.int64)  # [256], by train id
    facts["mask_size"] = (raw.shape[1], raw.shape[0])
    facts["label_min"], facts["label_max"] = (labels[0], labels[-1]) if labels else (None, None)
    facts["unknown_labels"] = unknown_counts(raw, label_map)
    facts["ignore_fraction"] = float(trained[IGNORE_INDEX] / raw.size)
    facts["class_pixels"] = tuple(int(pixels) for pixels in trained[:num_classes])
    return facts
