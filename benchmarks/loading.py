"""Samples per second from the shards, against a plain Dataset over the same files. Prints Markdown.

    python benchmarks/loading.py [--data data] [--prepared artifacts/prepared]

Both read the train split in one random order and decode image and label with Pillow; rounds alternate. The shards are
read a second time without comparing each sample with its hash, which is what that costs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from _table import machine, markdown
from PIL import Image

from segdistill.data import shards as shards_module
from segdistill.data.layouts import open_layout
from segdistill.data.shards import ShardDataset


class Files:
    """The plain way: a list of paths, two files opened for each sample."""

    def __init__(self, data: Path, layout: str) -> None:
        opened = open_layout(layout, data)
        self.samples, self.label_map = list(opened.samples("train")), opened.legend.label_map

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        sample = self.samples[index]
        with Image.open(sample.image) as image, Image.open(sample.mask) as mask:
            return np.asarray(image.convert("RGB")), self.label_map[np.asarray(mask)]


def rate(read: Callable[[int], object], order: np.ndarray) -> float:
    started = time.perf_counter()
    for index in order:
        read(int(index))
    return len(order) / (time.perf_counter() - started)


def unverified_rate(read: Callable[[int], object], order: np.ndarray) -> float:
    """The rate with a hash that costs nothing and always fits."""
    with mock.patch.object(shards_module, "sample_hash", lambda image, label: mock.ANY):
        return rate(read, order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--layout", default="folder")
    parser.add_argument("--prepared", type=Path, default=Path("artifacts/prepared"))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    shards, files = ShardDataset(given.prepared, "train"), Files(given.data, given.layout)
    assert len(shards) == len(files)
    order = np.random.default_rng(0).permutation(len(files))
    first = shards[0]
    assert all(np.array_equal(one, other) for one, other in zip(first, files[0], strict=True)), "they read the same"
    shard, file = shards.__getitem__, files.__getitem__
    rounds = [(rate(file, order), rate(shard, order), unverified_rate(shard, order)) for _ in range(given.rounds)]
    rates = [statistics.median(column) for column in zip(*rounds, strict=True)]
    ratios = [statistics.median(row[number] / row[0] for row in rounds) for number in range(3)]
    height, width = first[1].shape
    print(f"{len(files)} samples of {width}x{height}, files in the page cache. {machine(['pyarrow', 'pillow'])}\n")
    names = ["plain Dataset over the files", "ShardDataset", "ShardDataset, nothing verified"]
    rows = [[name, f"{one:.0f}", f"{ratio:.2f}"] for name, one, ratio in zip(names, rates, ratios, strict=True)]
    print(markdown(["source", "samples/s", "ratio"], rows))


if __name__ == "__main__":
    main()
