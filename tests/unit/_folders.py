"""Tiny data sets in the layout "folder", whole or broken in one way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segdistill.engine.tracker import Tracker
from segdistill.stages import prepare as stage

CLASSES = ("sky", "road", "car")
SPLITS = ("train", "val", "test")


def make_folder(root: Path, samples: dict[str, int] | None = None, size: tuple[int, int] = (12, 8)) -> Path:
    """Random images and masks in which every class and some void occurs; ``train/0000`` is a JPEG, the rest PNG."""
    random = np.random.default_rng(0)
    for split, count in (samples or {"train": 4, "val": 2, "test": 2}).items():
        for number in range(count):
            suffix = "jpg" if (split, number) == ("train", 0) else "png"
            pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            save(root / "images" / split / f"{number:04d}.{suffix}", pixels)
            labels = random.integers(0, len(CLASSES), (size[1], size[0]), dtype=np.uint8)
            labels[0, :2] = 255
            save(root / "masks" / split / f"{number:04d}.png", labels)
    write_classes(root)
    return root


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_classes(root: Path, **changes: object) -> None:
    classes = [{"name": name, "color": [number, 0, 0]} for number, name in enumerate(CLASSES)]
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.json").write_text(json.dumps({"classes": classes, "ignore_index": 255} | changes))


def read_mask(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def truncate(path: Path, share: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def prepare(data: Path, prepared: Path, **changes: Any) -> Path:
    """The shards of a data set that counts as validated."""
    report = prepared.parent / "report"
    report.mkdir(parents=True, exist_ok=True)
    (report / "summary.json").write_text('{"success": true, "layout": "folder"}')
    settings: dict[str, Any] = {"layout": "folder", "shard_samples": 3, "max_side": None, "workers": 1}
    config = stage.Config(**settings | changes)
    stage.run(config, data=data, report=report, prepared=prepared, tracker=Tracker())
    return prepared
