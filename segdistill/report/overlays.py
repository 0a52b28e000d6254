"""Test images with truth and predictions, small enough to travel inside one HTML page."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segdistill.data.shards import ShardDataset
from segdistill.errors import UserError
from segdistill.files import read_sealed
from segdistill.report.inputs import EVALUATE, Measured
from segdistill.report.pictures import evenly_spread, visible
from segdistill.report.text import percent

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
    score: str | None  # what stands beside its name


@dataclass(frozen=True)
class Scene:
    """One test image: the photograph as data URI, and the truth, the teacher and every student."""

    sample: str
    size: tuple[int, int]  # width, height
    photograph: str
    tiles: tuple[Tile, ...]


def read(
    prepared: Path, networks: Sequence[Measured], colors: Sequence[tuple[int, int, int]], number: int
) -> list[Scene]:
    """Up to ``number`` evenly spread ones of the test images whose predictions were kept.

    Args:
        prepared: the data set.
        networks: whose predictions to show, the teacher's first; of several seeds the first is shown.
        colors: of the classes.
        number: of scenes.

    Raises:
        UserError: a prediction is missing or of another size than its image.
    """
    kept = {path.stem for path in networks[0].overlays.glob("*.png")}
    samples = list(networks[0].accuracies)
    available = [index for index, sample in enumerate(samples) if sample in kept]
    if not number or not available:
        return []
    positions = evenly_spread(len(available), number)
    test_set = ShardDataset(prepared, "test")
    first: dict[tuple[str, str], Measured] = {}
    for network in networks:
        first.setdefault((network.experiment, network.student), network)
    scenes = []
    for index in (available[position] for position in positions):
        if index >= len(test_set) or test_set.sample_id(index) != samples[index]:
            raise UserError(f"{prepared}: test image {index} is not '{samples[index]}'; run evaluate again")
        image, truth = test_set[index]
        predictions = [
            (
                network,
                _read_mask(network.overlays / f"{samples[index]}.png", truth.shape),
                f"{percent(network.accuracies[samples[index]])} %",
            )
            for network in first.values()
        ]
        scenes.append(scene(samples[index], image, truth, predictions, colors))
    return scenes


def scene(
    sample: str,
    image: np.ndarray,
    truth: NDArray[np.uint8],
    predictions: Iterable[tuple[Measured, NDArray[np.uint8], str]],
    colors: Sequence[tuple[int, int, int]],
) -> Scene:
    """A test image with its truth, and what networks take it for, each with its score in words."""
    height, width = truth.shape
    factor = min(1.0, MAX_WIDTH / width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    tiles = [Tile("truth", "", _paint(truth, colors, size), None, None)]
    for network, mask, score in predictions:
        errors = np.where((mask != truth) & (truth != IGNORED), 0, IGNORED).astype(np.uint8)
        tiles.append(
            Tile(
                experiment=network.experiment,
                student=network.student,
                classes=_paint(mask, colors, size),
                errors=_paint(errors, [ERROR_COLOR], size),
                score=score,
            )
        )
    photograph = Image.fromarray(visible(image)).resize(size, Image.Resampling.LANCZOS)
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
