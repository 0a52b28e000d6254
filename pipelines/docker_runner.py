"""The pipeline in real containers on this machine: KFP's local Docker runner, with a truthful end of every task.

kfp 2.17.0 lets Docker remove a container as soon as it ends, and then takes one that is gone before it was asked for
its exit code for a success (kubeflow/pipelines#13332): under load, many failed tasks pass. So the one function that
runs a container is ours. It keeps the container until it has said how it ended; everything else stays KFP's.
"""

import codecs
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import docker
from docker.models.containers import Container
from docker.types import Mount
from kfp import local
from kfp.local import docker_task_handler

from segdistill.errors import UserError

# What tasks get of this process's environment, by prefix: where servers are, the credentials for them, threads.
PASSED_ON = ("AWS_", "MLFLOW_", "OMP_", "SEGDISTILL_")
# Places on this machine, and what the images know better.
KEPT = (
    "AWS_CA_BUNDLE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE",
    "SEGDISTILL_GIT_COMMIT", "SEGDISTILL_IMAGE_", "SEGDISTILL_SHARED", "SEGDISTILL_WORK",
)  # fmt: skip
ORDINARY_USER = 1000  # the images' user, for a caller who is root
WORK = "/work"  # where a container sees the folder of checkpoints
TASK = "segdistill.task"  # the label that names a container's task
STOPPED = 130  # a shell's exit code for Ctrl-C

_running: dict[str, Container] = {}  # by id
_stopping = threading.Event()


def runner(
    root: Path, *, work: Path | None = None, memory: str | None = None, environment: Mapping[str, str] | None = None
) -> local.DockerRunner:
    """A runner for ``local.init``, whose containers are an ordinary user's and write to two folders and /tmp only.

    Ctrl-C and SIGTERM end the containers too; so call it in the main thread.

    Args:
        root: what ``local.init`` gets as ``pipeline_root``; made here, so that the containers may write to it.
        work: a folder for the checkpoints of training, from which another attempt goes on.
        memory: a container's limit as Docker writes it, such as ``4g``; a container that wants more is ended.
        environment: variables for the tasks, besides those that begin as ``PASSED_ON`` says.

    Raises:
        UserError: no Docker engine answers.
    """
    try:
        docker.from_env().close()
    except docker.errors.DockerException as error:
        raise UserError(f"no Docker engine answers; start one, or name its socket in DOCKER_HOST: {error}") from None
    user, group = (os.getuid(), os.getgid()) if os.getuid() else (ORDINARY_USER, ORDINARY_USER)
    for folder in (root, work):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.getuid():
                os.chown(folder, user, group)
    given = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON) and not key.startswith(KEPT)}
    settings: dict[str, Any] = {
        "network_mode": "host",  # servers on this machine's loopback are in reach
        "user": f"{user}:{group}",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "read_only": True,
        "tmpfs": {"/tmp": "exec,mode=1777"},
        "working_dir": "/tmp",
        "shm_size": "1g",  # workers of a data loader hand over batches there
        "environment": {"HOME": "/tmp", **given, **({"SEGDISTILL_WORK": WORK} if work else {}), **(environment or {})},
    }
    if work is not None:
        settings["mounts"] = [Mount(WORK, str(work.resolve()), type="bind")]
    if memory is not None:
        settings |= {"mem_limit": memory, "memswap_limit": memory}  # swap would only put the end off
    _stopping.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    docker_task_handler.run_docker_container = run_container
    return local.DockerRunner(**settings)


def run_container(
    client: docker.DockerClient, image: str, command: Sequence[str], volumes: Mapping[str, Any], **settings: Any
) -> int:
    """Runs one task to its end, in place of KFP's function of another name; returns its exit code, never 0 for a loss.

    Args:
        client: of the engine.
        image: with a tag or a digest; pulled if it is not here.
        command: KFP's, whose option names the task.
        volumes: KFP's: the pipeline's root.
        settings: of ``containers.create``.
    """
    task = _task(command)
    try:
        client.images.get(image)
    except docker.errors.ImageNotFound:
        _say(task, f"pulling {image}")
        client.images.pull(image)
    if _stopping.is_set():
        return STOPPED
    container = client.containers.create(image, list(command), volumes=volumes, labels={TASK: task}, **settings)
    _running[container.id] = container
    try:
        if _stopping.is_set():  # since the line above; from here on _stop() removes it, and each call below fails
            return STOPPED
        container.start()
        _stream(container, task)
        code = int(container.wait()["StatusCode"])
        container.reload()
        state = container.attrs["State"]
    except docker.errors.APIError:
        if _stopping.is_set():
            return STOPPED
        raise
    finally:
        _running.pop(container.id, None)
        _remove(container)
    if state["OOMKilled"]:
        limit = settings.get("mem_limit")
        _say(task, f"FAILED: out of memory{f', its limit is {limit}' if limit else ''} (exit code {code})")
        return code or 137  # a process that outlives a killed child may not have noticed
    if code > 128 and code - 128 in set(signal.Signals):
        _say(task, f"FAILED: ended by {signal.Signals(code - 128).name} (exit code {code})")
    elif code:
        _say(task, f"FAILED: exit code {code}")
    return code


def _task(command: Sequence[str]) -> str:
    """The function that a lightweight component executes, by KFP's own option."""
    words = list(command)
    return words[words.index("--function_to_execute") + 1] if "--function_to_execute" in words else "container"


def _stream(container: Container, task: str) -> None:
    """Shows the log line by line, since tasks that run at the same time share the screen."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
    for chunk in container.logs(stream=True, follow=True):
        *whole, line = (line + decoder.decode(chunk)).split("\n")
        for text in whole:
            _say(task, text)
    if line:
        _say(task, line)


def _say(task: str, text: str) -> None:
    sys.stdout.write(f"{task} | {text}\n")  # not print, which KFP replaces while tasks run
    sys.stdout.flush()


def _remove(container: Container) -> None:
    try:
        container.remove(force=True, v=True)
    except docker.errors.APIError as error:
        if error.status_code not in (404, 409):  # it is gone, or going
            raise


def _stop(number: int, frame: FrameType | None) -> None:
    """Ends the containers, then the pipeline: KFP waits for its threads, and they wait for the containers."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _stopping.set()
    for container in list(_running.values()):
        with contextlib.suppress(docker.errors.APIError):
            _remove(container)
    raise KeyboardInterrupt
