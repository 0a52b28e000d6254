"""What networks need to know of a data set's pixels: their format, and the normalisation that the train split gives.

Sums are whole numbers, so that neither the number of workers nor the order of samples changes a digit.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from segdistill.data.checks import format_of
from segdistill.errors import UserError
from segdistill.images import RGB, ImageFormat

BLOCK = 2**18  # pixels at a time: each value is widened to eight bytes


def pixel_facts(pixels: np.ndarray) -> dict[str, Any]:
    """Of one image, ready for JSON: its format and, but for photographs, each channel's sum and sum of squares.

    Shape:
        pixels: [H, W, C] uint8 or uint16.
    """
    images = format_of(pixels)
    facts: dict[str, Any] = {"channels": images.channels, "bits": images.bits}
    if images.is_rgb:
        return facts
    values = pixels.reshape(-1, images.channels)
    sums, squares = np.zeros((2, images.channels), dtype=np.uint64)
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK].astype(np.uint64)
        sums += block.sum(0)
        squares += (block * block).sum(0)
    return {**facts, "pixels": len(values), "sums": sums.tolist(), "squares": squares.tolist()}


def data_format(rows: Iterable[Mapping[str, Any]]) -> ImageFormat:
    """The format of all images, with the statistics of those of the train split.

    Args:
        rows: of the manifest, with :func:`pixel_facts` under ``facts``.

    Raises:
        UserError: two images of different formats.
    """
    rows = list(rows)
    if not rows:
        return RGB
    formats = [ImageFormat(channels=row["facts"]["channels"], bits=row["facts"]["bits"]) for row in rows]
    if other := next((place for place, images in enumerate(formats) if images != formats[0]), 0):
        raise UserError(
            f"{rows[other]['image_file']}: {formats[other]}, but {rows[0]['image_file']} has {formats[0]}: all of a"
            " data set must have the same"
        )
    facts = [row["facts"] for row in rows if row["split"] == "train" and "sums" in row["facts"]]
    if not facts:
        return formats[0]
    count, white = sum(image["pixels"] for image in facts), 2 ** formats[0].bits - 1
    sums, squares = ([sum(values) for values in zip(*(image[name] for image in facts), strict=True)]
                     for name in ("sums", "squares"))  # fmt: skip
    variances = [(count * square - total * total) / count**2 for total, square in zip(sums, squares, strict=True)]
    return ImageFormat(
        channels=formats[0].channels, bits=formats[0].bits, mean=tuple(total / (count * white) for total in sums),
        std=tuple(math.sqrt(variance) / white for variance in variances),
    )  # fmt: skip
