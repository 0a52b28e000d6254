"""The environment variables that this package reads; no other module of it reads one of these.

They say what is no matter of the parameters: where this process runs, and what it belongs to. An empty one counts as
absent. Those of other programs (AWS_*, GIT_*, proxies, certificates, torchrun's ranks) are read by their libraries;
AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL and AWS_CA_BUNDLE here, too, for pyarrow, which does not know them.

| variable | says | without it |
|---|---|---|
| ``SEGDISTILL_PIPELINE_RUN`` | the orchestrator's run: the parent in MLflow | the commit, and data and parameters |
| ``SEGDISTILL_GIT_COMMIT`` | what an image was built from | git is asked |
| ``SEGDISTILL_DATA_MD5`` | the version of the data | that of ``data.dvc`` |
| ``SEGDISTILL_TRACKER`` | of tasks: ``auto``, ``mlflow``, ``jsonl``, ``none`` | ``auto``: MLflow if it is installed |
| ``SEGDISTILL_MLFLOW`` | ``injected``: KFP's server makes the parent in MLflow, and says where it is | we make it |
| ``SEGDISTILL_WORK`` | a volume for checkpoints | they lie beside the output, and go with the pod |
| ``SEGDISTILL_SHARED`` | a volume for large outputs, which all tasks see | each pod copies its inputs |
| ``SEGDISTILL_CACHE`` | the folder for samples of data that stay in S3 | ``~/.cache/segdistill`` |
| ``SEGDISTILL_CACHE_GIB`` | how many GiB they may take there | 16 |
| ``SEGDISTILL_PROCESSES`` | how many processes of a task train together | one for each accelerator |
| ``SEGDISTILL_TRAINJOB`` | on which other nodes a task trains, as JSON | in its own pod |
| ``SEGDISTILL_TUNE_PASSWORD`` | the password of the database that ``tune.storage`` names | none |
| ``MLFLOW_TRACKING_URI`` | where runs are kept; with credentials, if they are in it | ``mlflow.db`` of the project |
| ``MLFLOW_TRACKING_USERNAME`` | read by MLflow's client; set here from an address that has credentials | none |
| ``MLFLOW_TRACKING_PASSWORD`` | likewise | none |
| ``MLFLOW_RUN_ID`` | with ``injected`` alone: the run that KFP made for this task in MLflow | an error |
| ``MLFLOW_EXPERIMENT_ID`` | with ``injected`` alone: handed on to a TrainJob; we ask the run | nothing to hand on |
| ``MLFLOW_WORKSPACE`` | likewise, for MLflow's client | likewise |
| ``MLFLOW_TRACKING_AUTH`` | likewise | likewise |

``SEGDISTILL_IMAGE_DATA`` and ``SEGDISTILL_IMAGE_TRAIN`` are read by ``components``, before there is a task.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from segdistill.errors import UserError, nearest

TRACKERS = ("auto", "mlflow", "jsonl", "none")
INJECTED = "injected"
# What the plugin of KFP's server sets in a task's container, besides a user's name and password, or a token, which it
# takes from a secret (kubeflow/pipelines 2.17, backend/src/v2/common/plugins/mlflow/handler.go).
OF_KFP = (
    "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID", "MLFLOW_WORKSPACE", "MLFLOW_TRACKING_AUTH",
)  # fmt: skip


def _read(name: str) -> str | None:
    return os.environ.get(name) or None


def _folder(name: str) -> Path | None:
    text = _read(name)
    return Path(text) if text else None


def pipeline_run() -> str | None:
    """The orchestrator's run that this process belongs to."""
    return _read("SEGDISTILL_PIPELINE_RUN")


def tune_password() -> str | None:
    """The password of the database that keeps the trials of ``segdistill tune``."""
    return _read("SEGDISTILL_TUNE_PASSWORD")


def git_commit() -> str | None:
    """The commit that this code is of."""
    return _read("SEGDISTILL_GIT_COMMIT")


def data_md5() -> str | None:
    """The version of the data."""
    return _read("SEGDISTILL_DATA_MD5")


def tracker() -> str:
    """The kind of tracker of a task.

    Raises:
        UserError: there is no such kind.
    """
    kind = _read("SEGDISTILL_TRACKER") or "auto"
    if kind not in TRACKERS:
        raise UserError(f"SEGDISTILL_TRACKER: '{kind}' is unknown{nearest(kind, TRACKERS)}")
    return kind


def work_volume() -> Path | None:
    """A volume for checkpoints, which outlives a pod."""
    return _folder("SEGDISTILL_WORK")


def shared_volume() -> Path | None:
    """A volume for large outputs, which all tasks see."""
    return _folder("SEGDISTILL_SHARED")


def cache() -> tuple[Path, float]:
    """Where samples of data that stay in S3 are kept, and how many GiB of them.

    Raises:
        UserError: it is no such number.
    """
    text = _read("SEGDISTILL_CACHE_GIB") or "16"
    try:
        gibibytes = float(text)
    except ValueError:
        gibibytes = -1
    if not 0 <= gibibytes < math.inf:
        raise UserError(f"SEGDISTILL_CACHE_GIB: '{text}' is not a number of GiB; expected 0 or more")
    return _folder("SEGDISTILL_CACHE") or Path.home() / ".cache/segdistill", gibibytes


def s3_server() -> tuple[str | None, str | None]:
    """The address of the S3 server, None for AWS, and the file of the authorities that vouch for it."""
    return _read("AWS_ENDPOINT_URL_S3") or _read("AWS_ENDPOINT_URL"), _read("AWS_CA_BUNDLE")


def processes(default: int) -> int:
    """How many processes of a task train together.

    Raises:
        UserError: it is no number of them.
    """
    text = _read("SEGDISTILL_PROCESSES") or str(default)
    if not text.isdecimal() or not int(text):
        raise UserError(f"SEGDISTILL_PROCESSES: '{text}' is not a number of processes; expected 1 or more")
    return int(text)


def trainjob() -> dict[str, Any] | None:
    """The TrainJob as which a task is to run: its ``manifest``, and the path of its ``volume``; None in its own pod."""
    text = _read("SEGDISTILL_TRAINJOB")
    return dict(json.loads(text)) if text else None


def tracking_uri() -> str | None:
    """Where MLflow's runs are kept."""
    return _read("MLFLOW_TRACKING_URI")


def set_tracking_server(given: str, address: str, user: str, password: str) -> None:
    """Gives MLflow's client, and the processes below this one, an address and its password apart."""
    os.environ |= {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    if tracking_uri() == given:
        os.environ["MLFLOW_TRACKING_URI"] = address


def injected_run() -> str | None:
    """The MLflow run that KFP's server made for this task; None where we make our own.

    Raises:
        UserError: it was to make one, and did not say so.
    """
    kind = _read("SEGDISTILL_MLFLOW")
    if kind is None:
        return None
    if kind != INJECTED:
        raise UserError(f"SEGDISTILL_MLFLOW: '{kind}' is not allowed; allowed: '{INJECTED}'")
    run, uri = _read("MLFLOW_RUN_ID"), tracking_uri()
    if run is None or uri is None:
        missing = "MLFLOW_RUN_ID" if run is None else "MLFLOW_TRACKING_URI"
        raise UserError(
            f"{missing}: not set, but cluster.yaml says 'mlflow: injected'; the server of KFP sets it if its MLflow "
            "plugin is on, with injectUserEnvVars: true"
        )
    return run


def injected() -> dict[str, str]:
    """What the pods of a TrainJob are to be told of the MLflow that KFP's server chose for this task."""
    if injected_run() is None:
        return {}
    values = {name: _read(name) for name in ("SEGDISTILL_MLFLOW", *OF_KFP)}
    return {name: value for name, value in values.items() if value}


def rank() -> int:
    """This process's number among those that train together, as torchrun says; 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


def set_defaults(values: Mapping[str, str]) -> None:
    """Sets variables, for libraries that read them, where they are not set."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def changed(values: Mapping[str, str | None]) -> Iterator[None]:
    """Sets variables for a while; those given as None are only brought back afterwards, whatever was made of them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= {name: value for name, value in values.items() if value is not None}
    try:
        yield
    finally:
        for name, former in before.items():
            if former is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = former
