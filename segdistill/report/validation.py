"""What validation found, as one self-contained HTML page: Data Docs ask the network for their styles."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segdistill.report.pictures import colorize
from segdistill.report.templates import template

WIDTH = 320  # pixels of an example, and at most as many high
Colors = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Example:
    """A sample as one sees it."""

    name: str
    picture: str  # the photograph and its classes, side by side, as a data URI


def example(
    name: str, image: Image.Image, labels: NDArray[np.uint8], colors: Sequence[tuple[int, int, int]]
) -> Example:
    """A small picture of a sample.

    Shape:
        labels: [H, W] train ids.
    """
    factor = min(1.0, WIDTH / max(image.size))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    strip = Image.new("RGB", (2 * size[0] + 4, size[1]), "white")
    strip.paste(image.convert("RGB").resize(size, Image.Resampling.BILINEAR), (0, 0))
    classes = Image.fromarray(colorize(labels, colors)).resize(size, Image.Resampling.NEAREST)
    strip.paste(classes, (size[0] + 4, 0))
    content = io.BytesIO()
    strip.save(content, "JPEG", quality=90)
    return Example(name, f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}")


def page(summary: Mapping[str, Any], data: str, colors: Colors, examples: Iterable[Example], *, most: int) -> str:
    """The whole page.

    Args:
        summary: the content of summary.json.
        data: the data set's folder.
        colors: of the classes.
        examples: some samples.
        most: sentences of one rule; summary.json has them all.
    """
    return template("validation.html.jinja").render(
        summary=summary, data=data, colors=colors, examples=list(examples), most=most,
        largest=max((row["train_share"] or 0 for row in summary["classes"]), default=0),
    )  # fmt: skip
