"""Test images with truth and predictions, small enough to travel inside one HTML page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segdistill.data.shards import ShardDataset, read_dataset_info
from segdistill.errors import UserError
from segdistill.files import read_sealed
from segdistill.report.inputs import EVALUATE, Measured

IGNORED = 255
MAX_WIDTH = 512  # pixels; a street scene of 2048 columns says as much at a quarter of them
ERROR_COLOR = (230, 30, 60)


@dataclass(frozen=True)
class Tile:
    """One picture over the photograph: classes, and where they are wrong; both as data URIs."""

    experiment: str
    student: str
    classes: str
    errors: str | None
    accuracy: float | None


@dataclass(frozen=True)
class Scene:
    """One test image: the photograph as data URI, and the truth, the teacher and every student."""

    sample: str
    size: tuple[int, int]  # width, height
    photograph: str
    tiles: tuple[Tile, ...]


def read(prepared: Path, teacher: Measured, measured: Sequence[Measured], number: int) -> list[Scene]:
    """Up to ``number`` evenly spread ones of the test images whose predictions were kept.

    Of several seeds the first is shown.

    Raises:
        UserError: a prediction is missing or of another size than its image.
    """
    kept = {path.stem for path in teacher.overlays.glob("*.png")}
    order = list(teacher.accuracies)
    available = [index for index, sample in enumerate(order) if sample in kept]
    if not number or not available:
        return []
    positions = np.unique(np.linspace(0, len(available) - 1, number).round().astype(int))
    test_set = ShardDataset(prepared, "test")
    colors = [item.color for item in read_dataset_info(prepared).classes]
    shown: dict[tuple[str, str], Measured] = {}
    for item in (teacher, *measured):
        shown.setdefault((item.experiment, item.student), item)
    scenes = []
    for index in (available[position] for position in positions):
        if index >= len(test_set) or test_set.sample_id(index) != order[index]:
            raise UserError(f"{prepared}: test image {index} is not '{order[index]}'; run evaluate again")
        scenes.append(_scene(test_set, index, list(shown.values()), colors))
    return scenes


def _scene(
    test_set: ShardDataset, index: int, shown: Sequence[Measured], colors: Sequence[tuple[int, int, int]]
) -> Scene:
    sample = test_set.sample_id(index)
    image, truth = test_set[index]
    height, width = truth.shape
    factor = min(1.0, MAX_WIDTH / width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    tiles = [Tile("truth", "", _paint(truth, colors, size), None, None)]
    for item in shown:
        mask = _read_mask(item.overlays / f"{sample}.png", truth.shape)
        wrong = ((mask != truth) & (truth != IGNORED)).astype(np.uint8)
        tiles.append(
            Tile(
                experiment=item.experiment,
                student=item.student,
                classes=_paint(mask, colors, size),
                errors=_paint(np.where(wrong, 0, IGNORED).astype(np.uint8), [ERROR_COLOR], size),
                accuracy=item.accuracies[sample],
            )
        )
    photograph = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    return Scene(sample, size, _data_uri(photograph, "JPEG", quality=85), tuple(tiles))


def _read_mask(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    try:
        content = read_sealed(path.parents[2], path.relative_to(path.parents[2]).as_posix(), mend=EVALUATE)
        mask = np.array(Image.open(io.BytesIO(content)).convert("L"))
    except OSError:
        raise UserError(f"{path}: missing or unreadable prediction; run evaluate again") from None
    if mask.shape != shape:
        raise UserError(f"{path}: prediction of {mask.shape}, its image has {shape}; run evaluate again")
    return mask


def _paint(labels: NDArray[np.uint8], colors: Sequence[tuple[int, int, int]], size: tuple[int, int]) -> str:
    """A palette PNG, transparent where there is no label."""
    indices = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: len(colors)] = np.asarray(colors, dtype=np.uint8)
    picture = Image.fromarray(indices)  # grey; a palette turns it into mode P, index by index
    picture.putpalette(palette.ravel().tolist())
    return _data_uri(picture, "PNG", transparency=IGNORED, optimize=True)


def _data_uri(picture: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
