"""Writes a synthetic data set in the "folder" layout: images/<split>, masks/<split>, classes.json."""

import functools
import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from segdistill.config import Seed, config, parse
from segdistill.data import parallel
from segdistill.files import new_folder, require_free
from segdistill.streets._scene import CLASSES, IGNORE_INDEX, scene

DEFAULT_SAMPLES: Mapping[str, int] = {"train": 480, "val": 80, "test": 120}
FIRST_INDEX: Mapping[str, int] = {"train": 0, "val": 10_000_000, "test": 20_000_000}  # so no scene is in two splits
# What is learnt within minutes from small pictures; the thin classes, 4 % of the pixels, are not, by any network.
LARGE = ("sky", "building", "road", "pavement", "tree", "car")
CHUNK = 16  # scenes that a worker draws in one go

Side = Annotated[int, Field(ge=16, le=4096)]  # of a picture, pixels
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Classes = Literal["large", "all"]


@config
class Samples:
    """How many scenes each split gets."""

    train: Count
    val: Count
    test: Count


@config
class Arguments:
    """What decides the bytes of a data set."""

    seed: Seed
    size: tuple[Side, Side]
    samples: Samples
    classes: Classes


def write(
    out: Path,
    *,
    seed: int = 0,
    size: tuple[int, int] = (128, 96),
    samples: Mapping[str, int] = DEFAULT_SAMPLES,
    classes: Classes = "large",
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Draws a data set into a new folder; same arguments, same bytes, however many workers draw it.

    Args:
        out: the folder to make; it may exist if it is empty.
        size: width and height of every picture.
        samples: how many scenes each split gets.
        classes: "all" 11 of them, or the 6 "large" ones, with the others void; the pictures are the same.
        workers: processes; one per core by default.
        progress: show a bar, if stderr is a terminal.

    Raises:
        UserError: ``out`` holds something already, a bad argument, or the disk is full. Nothing is left behind.
    """
    require_free(out)
    parse(Arguments, {"seed": seed, "size": size, "samples": samples, "classes": classes}, "")
    chunks = [
        (split, range(first, min(first + CHUNK, count)))
        for split, count in samples.items()
        for first in range(0, count, CHUNK)
    ]
    with new_folder(out) as folder:
        for split in samples:
            (folder / "images" / split).mkdir(parents=True)
            (folder / "masks" / split).mkdir(parents=True)
        drawn = parallel.ordered_map(
            functools.partial(_draw, folder, seed, size, _indices(classes)), chunks, workers=workers or 0
        )
        if progress:
            drawn = parallel.progress(drawn, "synthetic streets", sum(samples.values()), weight=int)
        for _ in drawn:
            pass
        _describe(folder, seed, size, samples, classes)


def _kept(classes: Classes) -> list[tuple[str, tuple[int, int, int]]]:
    return [entry for entry in CLASSES if classes == "all" or entry[0] in LARGE]


def _indices(classes: Classes) -> np.ndarray:
    """What becomes of each value of a scene's mask: [256] uint8."""
    table, kept = np.full(256, IGNORE_INDEX, np.uint8), _kept(classes)
    for index, entry in enumerate(CLASSES):
        if entry in kept:
            table[index] = kept.index(entry)
    return table


def _draw(folder: Path, seed: int, size: tuple[int, int], indices: np.ndarray, chunk: tuple[str, range]) -> int:
    """Draws and writes some scenes of a split; returns how many."""
    split, numbers = chunk
    for number in numbers:
        image, mask = scene(seed, FIRST_INDEX[split] + number, size)
        name = f"{split}_{number:05d}"
        _save(folder / "images" / split / f"{name}.jpg", image, quality=92, subsampling=0)
        # Run-length matching only: zlib's usual search may choose its matches differently from one CPU to another.
        _save(folder / "masks" / split / f"{name}.png", indices[mask], compress_level=9, compress_type=zlib.Z_RLE)
    return len(numbers)


def _save(path: Path, pixels: np.ndarray, **options: int) -> None:
    buffer = io.BytesIO()  # if Pillow itself met a full disk, it would hide why it failed
    Image.fromarray(pixels).save(buffer, "JPEG" if path.suffix == ".jpg" else "PNG", **options)
    path.write_bytes(buffer.getvalue())


def _describe(folder: Path, seed: int, size: tuple[int, int], samples: Mapping[str, int], classes: Classes) -> None:
    described = {
        "classes": [{"name": name, "color": list(colour)} for name, colour in _kept(classes)],
        "ignore_index": IGNORE_INDEX,
    }
    (folder / "classes.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    counts = ", ".join(f"{split} {samples[split]}" for split in FIRST_INDEX)
    thin = ", ".join(name for name, _ in CLASSES if name not in LARGE)
    which = (
        "the 11 classes of CamVid" if classes == "all" else f"6 of CamVid's 11 classes; the thin ones ({thin}) are void"
    )
    text = f"""Synthetic streets
=================
Drawn street scenes, made by `segdistill data synth`. No photograph is in them. Masks have {which}.

seed {seed}, {size[0]}x{size[1]} pixels (width x height), scenes: {counts}

images/<split>/<id>.jpg   RGB
masks/<split>/<id>.png    one byte a pixel = index of the class in classes.json; {IGNORE_INDEX} = void, not scored

The same seed, size and numbers give the same bytes again.
"""
    (folder / "README.txt").write_text(text, encoding="utf-8")
