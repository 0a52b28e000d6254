"""What a container's end means for the pipeline: KFP's own Docker runner sometimes takes a failure for a success."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from kfp import dsl, local
from services import ROOT, tasks

from pipelines import docker_runner


def one_task(image: str, *command: str) -> Any:
    @dsl.container_component
    def task() -> dsl.ContainerSpec:
        return dsl.ContainerSpec(image=image, command=list(command))

    @dsl.pipeline(name="one-task")
    def pipeline() -> None:
        task()

    return pipeline


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def _spin() -> None:
    while True:
        pass


@pytest.fixture
def load() -> Iterator[None]:
    busy = [multiprocessing.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(4)]
    for process in busy:
        process.start()
    yield
    for process in busy:
        process.kill()
        process.join()


@pytest.fixture(autouse=True)
def _nothing_left_for_the_next(client: docker.DockerClient) -> Iterator[None]:
    yield
    for container in tasks(client, all=True):
        container.remove(force=True, v=True)


def test_a_stage_that_exits_3_is_a_failed_pipeline_every_time(
    base_image: str, client: docker.DockerClient, load: None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local.init(docker_runner.runner(folder / "exits"), pipeline_root=str(folder / "exits"))
    failing = one_task(base_image, "sh", "-c", "exit 3")
    failed = 0
    for _ in range(20):
        try:
            failing()
        except RuntimeError:
            failed += 1
    assert failed == 20
    assert capsys.readouterr().out.count("FAILED: exit code 3") == 20
    one_task(base_image, "true")()
    assert not tasks(client, all=True)


def test_a_stage_that_is_killed_for_memory_is_a_failure_that_says_so(
    base_image: str, client: docker.DockerClient, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder / "memory"
    local.init(docker_runner.runner(root, memory="64m"), pipeline_root=str(root))
    with pytest.raises(RuntimeError):
        one_task(base_image, "python3", "-c", "print('begins', flush=True); bytearray(10**9)")()
    said = capsys.readouterr().out
    assert "| begins" in said
    assert "FAILED: out of memory, its limit is 64m" in said
    assert not tasks(client, all=True)


def test_a_container_is_an_ordinary_users_and_writes_to_its_folders_only(
    base_image: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-environment")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/of/this/machine")
    root, work = folder / "user", folder / "work"
    local.init(docker_runner.runner(root, work=work), pipeline_root=str(root))
    script = (
        f"echo user $(id -u); touch {root}/a $SEGDISTILL_WORK/b /tmp/c ~/d; touch /e || touch /usr/f || echo no; env"
    )
    one_task(base_image, "sh", "-c", script)()
    said = [line.partition(" | ")[2] for line in capsys.readouterr().out.splitlines()]
    assert f"user {os.getuid() or 1000}" in said
    assert "no" in said
    assert (root / "a").exists()
    assert (work / "b").exists()
    assert "AWS_SECRET_ACCESS_KEY=of-the-environment" in said
    assert not [line for line in said if line.startswith("AWS_CA_BUNDLE")]


CTRL_C = """
import sys
from pathlib import Path
from kfp import dsl, local
from pipelines import docker_runner

image, root = sys.argv[1:]

@dsl.container_component
def sleep(item: int) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(image=image, command=["sh", "-c", "echo sleeps; sleep 600"], args=[item])

@dsl.pipeline(name="sleeps")
def pipeline():
    with dsl.ParallelFor([1, 2], parallelism=2) as item:
        sleep(item=item)

local.init(docker_runner.runner(Path(root)), pipeline_root=root)
pipeline()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_containers_too(
    number: int, base_image: str, client: docker.DockerClient, folder: Path
) -> None:
    root = folder / f"ctrl-c-{number}"
    process = subprocess.Popen(
        [sys.executable, "-c", CTRL_C, base_image, str(root)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 120
        while len(tasks(client)) < 2:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(number)
        output = process.communicate(timeout=120)[0].decode()
    finally:
        process.kill()
    assert process.returncode, output
    assert not tasks(client, all=True)
