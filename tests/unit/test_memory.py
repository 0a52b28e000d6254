"""Decoded samples are kept as far as there is room, whoever reads them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from _folders import make_folder, prepare

from segdistill.data import memory, shards
from segdistill.data.memory import GIBIBYTE, Memory
from segdistill.data.shards import ShardDataset

SAMPLES = {"train": 7, "val": 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return prepare(make_folder(folder / "data", SAMPLES), folder / "prepared", shard_samples=1)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each image that is decoded."""
    calls: list[int] = []
    decode = shards.decode_pixels
    monkeypatch.setattr(shards, "decode_pixels", lambda *args, **rest: calls.append(1) or decode(*args, **rest))
    return calls


def test_a_sample_that_fits_is_decoded_once_and_the_others_each_time(prepared: Path, decoded: list[int]) -> None:
    size = sum(part.nbytes for part in ShardDataset(prepared, "train")[0])
    plain = list(ShardDataset(prepared, "train"))
    for room, again in ((0, 9), (3, 6), (8, 1), (9, 0)):
        shared = Memory(room * size / GIBIBYTE)
        train, val = (ShardDataset(prepared, split, shared) for split in SAMPLES)
        for _ in range(2):
            decoded.clear()
            samples = [*train, *val]
        assert len(decoded) == again
        for sample, expected in zip(samples[:7], plain, strict=True):
            assert all(np.array_equal(*parts) for parts in zip(sample, expected, strict=True))


def test_by_default_half_of_the_free_memory_stays_free(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1000
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    mine = Memory("auto")
    assert mine.take(400)
    free = 600  # whoever took it
    assert mine.take(100) and not mine.take(101)


@pytest.mark.parametrize(
    ("limit", "free"),
    [("max\n", 4096_000), ("3000000\n", 2000_000), ("9000000\n", 4096_000), ("10\n", 0), (None, 4096_000)],
)
def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, free: int
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 8000 kB\nMemAvailable:   4000 kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.stat").write_text("anon 1000000\nfile 500000\nanon_thp 7\n")
    monkeypatch.setattr(memory, "MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    assert memory.free_memory() == free
    monkeypatch.setattr(memory, "MACHINE", tmp_path / "nothing")
    assert memory.free_memory() == 0


def test_threads_read_the_same_samples_though_few_shards_are_open(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MOST_OPEN", 1)
    dataset, expected = ShardDataset(prepared, "train"), list(ShardDataset(prepared, "train"))
    start = threading.Barrier(4)

    def read(thread: int) -> bool:
        start.wait()
        order = np.random.default_rng(thread).permutation(np.arange(70) % 7)
        return all(np.array_equal(dataset[int(index)][0], expected[int(index)][0]) for index in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
