"""Synthetic streets for a benchmark: as files, and prepared."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segdistill import streets
from segdistill.config import parse
from segdistill.data.parallel import ordered_map
from segdistill.engine.tracker import Tracker
from segdistill.stages import prepare

LARGEST = 1024  # pixels of the longer side that is drawn; a larger scene is enlarged, or it would take seconds
NOISE = 2.0  # of a sensor, standard deviation: makes a PNG of 2048x1024 as large as those of Cityscapes, 2 to 3 MB


def make_files(folder: Path, size: Sequence[int], samples: int, workers: int = 0) -> Path:
    """A data set in the layout "folder" of so many training samples of a height and width."""
    height, width = size
    jobs = [
        (split, number) for split, count in (("train", samples), ("val", 1), ("test", 1)) for number in range(count)
    ]
    for _ in ordered_map(functools.partial(_write, folder, (width, height)), jobs, workers=workers):
        pass
    classes = [{"name": entry[0], "color": list(entry[1])} for entry in streets.CLASSES]
    (folder / "classes.json").write_text(json.dumps({"classes": classes, "ignore_index": streets.IGNORE_INDEX}))
    return folder


def prepare_files(data: Path, prepared: Path, **settings: Any) -> Path:
    """The shards of such a data set."""
    (data.parent / "summary.json").write_text('{"success": true, "layout": "folder"}')
    defaults = {"layout": "folder", "shard_samples": 256, "max_side": None, "workers": 1}
    config = parse(prepare.Config, defaults | settings, "prepare")
    prepare.run(config, data=data, report=data.parent, prepared=prepared, tracker=Tracker())
    return prepared


def make_data(folder: Path, size: Sequence[int], samples: int) -> Path:
    """Both; returns the prepared data."""
    return prepare_files(make_files(folder / "data", size, samples), folder / "prepared")


def _write(folder: Path, size: tuple[int, int], job: tuple[str, int]) -> None:
    split, number = job
    reduction = max(1, -(-max(size) // LARGEST))
    drawn = (-(-size[0] // reduction), -(-size[1] // reduction))
    pixels, labels = streets.scene(0, number + 10_000 * ("train", "val", "test").index(split), drawn)
    image, mask = Image.fromarray(pixels), Image.fromarray(labels)
    if reduction > 1:
        image, mask = image.resize(size, Image.Resampling.BICUBIC), mask.resize(size, Image.Resampling.NEAREST)
        noise = np.random.default_rng(number).normal(0, NOISE, (size[1], size[0], 3))
        image = Image.fromarray(np.rint(np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    for kind, picture in (("images", image), ("masks", mask)):
        path = folder / kind / split / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
