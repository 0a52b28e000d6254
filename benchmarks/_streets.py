"""Synthetic streets for a benchmark, prepared."""

from collections.abc import Sequence
from pathlib import Path

from segdistill import streets
from segdistill.config import parse
from segdistill.engine.tracker import NullTracker
from segdistill.stages import prepare


def make_data(folder: Path, size: Sequence[int], samples: int) -> Path:
    """A data set of so many training samples of a height and width; returns the prepared one."""
    height, width = size
    streets.write(folder / "data", size=(width, height), samples={"train": samples, "val": 1, "test": 1})
    (folder / "summary.json").write_text('{"success": true, "layout": "folder"}')
    settings = {"layout": "folder", "shard_samples": 256, "max_side": None, "workers": 1}
    config = parse(prepare.Config, settings, "prepare")
    prepare.run(config, data=folder / "data", report=folder, prepared=folder / "prepared", tracker=NullTracker())
    return folder / "prepared"
