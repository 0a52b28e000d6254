"""``python -m pipelines submit``: hands the pipeline to the API of Kubeflow Pipelines, and waits for its end if asked.

Secrets come from environment variables that the command line names; none stands on it, or is printed.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segdistill.errors import UserError
from segdistill.patience import Patience

ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
PATIENCE_SECONDS = 300.0  # with a server that is away while we wait for a run
# Of Kubeflow Pipelines: the first release that brings a task every artifact of a list and tells an exit handler how the
# run ended, and the first that heeds the user and group of ``cluster.yaml``. Read in its source: 2.5.0, the release
# before, and 2.14.4 to 2.15.0 differ there.
FIRST, FIRST_WITH_USERS = (2, 14, 0), (2, 16, 0)


@dataclass(frozen=True)
class Server:
    """Where the API is, and how it knows us: by a token, by cookies, by a pod's service account, or not at all."""

    host: str
    ui: str
    namespace: str | None = None  # None: the server has a single one
    token_variable: str | None = None
    cookies_variable: str | None = None
    in_cluster: bool = False
    certificates: Path | None = None  # of a private authority

    @property
    def authentication(self) -> str:
        """In words, without the secret."""
        if self.token_variable:
            return f"the bearer token in ${self.token_variable}"
        if self.cookies_variable:
            return f"the cookies in ${self.cookies_variable}"
        return "the token of the pod's service account" if self.in_cluster else "none"

    def connect(self) -> Any:
        """A ``kfp.Client``.

        Raises:
            UserError: what it needs is not there.
        """
        from kfp import client

        given: dict[str, Any] = {"host": self.host}
        if self.token_variable:
            given["existing_token"] = _secret(self.token_variable)
        if self.cookies_variable:
            given["cookies"] = _secret(self.cookies_variable)
        if self.in_cluster:
            place = Path(os.environ.get(client.KF_PIPELINES_SA_TOKEN_ENV) or client.KF_PIPELINES_SA_TOKEN_PATH)
            if not place.is_file():
                raise UserError(
                    f"{place}: no such file; --in-cluster is for a pod that has its service account's token there"
                )
            given["credentials"] = client.ServiceAccountTokenVolumeCredentials(str(place))
        if self.namespace:
            given["namespace"] = self.namespace
        if self.certificates:
            given["ssl_ca_cert"] = str(self.certificates)
        return client.Client(**given)

    def page(self, run: str) -> str:
        """The page of a run in the user interface."""
        return f"{self.ui.rstrip('/')}/#/runs/details/{run}"


def server(given: argparse.Namespace) -> Server:
    """The server that a command line means, which leaves its addresses to the environment if it names none.

    Raises:
        UserError: no host, though something is sent (no ``--dry-run``), two ways to be known, or an environment
            variable that is not set.
    """
    host = given.host or os.environ.get("KF_PIPELINES_ENDPOINT") or ("" if given.dry_run else None)
    if host is None:
        raise UserError("--host: missing; give the URL of the Kubeflow Pipelines API, or set KF_PIPELINES_ENDPOINT")
    if host and not host.startswith(("http://", "https://")):
        raise UserError(f"--host: '{host}' is not a URL; it begins with http:// or https://")
    if sum(map(bool, (given.token_env, given.cookies_env, given.in_cluster))) > 1:
        raise UserError("--token-env, --cookies-env and --in-cluster exclude each other; give one")
    for variable in filter(None, (given.token_env, given.cookies_env)):
        _secret(variable)
    ui = given.ui or os.environ.get("KF_PIPELINES_UI_ENDPOINT") or host
    return Server(host, ui, given.namespace, given.token_env, given.cookies_env, given.in_cluster, given.ca_cert)


def _secret(variable: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise UserError(f"{variable}: this environment variable is to hold the credentials, and is not set")
    return value


@dataclass(frozen=True)
class Submission:
    """What is sent."""

    arguments: Mapping[str, Any]
    experiment: str
    run: str
    service_account: str | None

    def shown(self, to: Server, package: str) -> str:
        """All of it as JSON, for people."""
        import yaml

        executors = next(iter(yaml.safe_load_all(package)))["deploymentSpec"]["executors"]
        images = sorted({one["container"]["image"] for one in executors.values() if "container" in one})
        facts = {
            "host": to.host or None,
            "authentication": to.authentication,
            "namespace": to.namespace,
            "experiment": self.experiment,
            "run": self.run,
            "service_account": self.service_account,
            "images": images,
            "arguments": self.arguments,
        }
        return json.dumps(facts, indent=2)

    def send(self, to: Server, package: str) -> tuple[Any, str]:
        """Starts the run; returns the client and the run's id.

        Args:
            to: the server.
            package: the compiled pipeline. Its caching stands: what KFP's client could override forgets the loop.

        Raises:
            UserError: the server is not there, or does not want it, or is too old for it.
        """
        with tempfile.TemporaryDirectory() as folder, _in_one_sentence(to):
            file = Path(folder) / "segdistill.yaml"
            file.write_text(package)
            client = to.connect()
            check_version(client, to)
            sent = client.create_run_from_pipeline_package(
                str(file),
                arguments=dict(self.arguments),
                run_name=self.run,
                experiment_name=self.experiment,
                namespace=to.namespace,
                service_account=self.service_account,
            )
        return client, sent.run_id


def check_version(client: Any, to: Server) -> None:
    """Asks a server which version it is; warns of one that does not say, or that would ignore a setting.

    Raises:
        UserError: it is older than the first that runs this pipeline.
    """
    answer = client._healthz_api.healthz_service_get_healthz(_preload_content=False)  # kfp 2.17.0 drops the version
    told = ""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        told = str(json.loads(answer.data)["tag_name"])
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", told)
    if found is None:
        _warn(f"{to.host}: does not say which version it is; this pipeline needs {_dotted(FIRST)} or later")
        return
    version = tuple(map(int, found.groups()))
    if version < FIRST:
        raise UserError(f"{to.host}: Kubeflow Pipelines {told}; this pipeline needs {_dotted(FIRST)} or later")
    if version < FIRST_WITH_USERS:
        _warn(
            f"{to.host}: Kubeflow Pipelines {told} ignores 'security' of cluster.yaml, which needs "
            f"{_dotted(FIRST_WITH_USERS)} or later: containers run as the user of their image"
        )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def wait(client: Any, to: Server, run: str, seconds: float = 10) -> str:
    """Tells of every task whose state changes until the run has ended; returns the run's last state.

    KFP's own waiting says nothing, ends at the first answer that does not come, and never at a cancelled run.

    Raises:
        UserError: the server no longer answers us. The run goes on without us.
    """
    known: dict[str, str] = {}
    patience = Patience(to.host, PATIENCE_SECONDS)
    while True:
        try:
            answer = patience.ask(lambda: client.get_run(run), lambda error: _outage(to, error))
        except (UserError, *_errors_of_a_server()) as error:
            reason = str(error) if isinstance(error, UserError) else f"{to.host}: {_reason(to, error)}"
            raise UserError(f"{reason}; the run goes on: {to.page(run)}") from None
        for task in (answer.run_details.task_details if answer.run_details else None) or []:
            if task.state and known.get(task.task_id) != task.state:
                known[task.task_id] = task.state
                _say(f"{time.strftime('%H:%M:%S')} {task.display_name}: {task.state.lower()}")
        if answer.state in ENDED:
            if answer.error and answer.error.message:
                _say(answer.error.message)
            return str(answer.state)
        time.sleep(seconds)


def _errors_of_a_server() -> tuple[type[Exception], ...]:
    import kfp_server_api
    import urllib3

    return kfp_server_api.ApiException, urllib3.exceptions.HTTPError


def _outage(to: Server, error: Exception) -> str | None:
    """Why waiting may help, or None where it cannot."""
    final = not isinstance(error, _errors_of_a_server()) or getattr(error, "status", None) in (401, 403, 404)
    return None if final else _reason(to, error)


@contextlib.contextmanager
def _in_one_sentence(to: Server) -> Iterator[None]:
    """Keeps the client's prints and log to itself; an error is a UserError."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (*_errors_of_a_server(), TimeoutError) as error:
        raise UserError(f"{to.host}: {_reason(to, error)}") from None
    finally:
        logging.disable(before)


def _reason(to: Server, error: Any) -> str:
    status = getattr(error, "status", None)
    if status in (401, 403):
        return f"refused us ({status} {error.reason}); authentication: {to.authentication}"
    if status:
        return f"{status} {error.reason}: {_message(error)}"
    return f"no answer: {str(getattr(error, 'reason', error)).rpartition('>: ')[2]}"


def _message(error: Any) -> str:
    """What the server says of its error, on one line."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        said = json.loads(error.body)
        return " ".join(str(said.get("error_message") or said.get("message") or said["error"]).split())
    return "no more is known"


def _warn(line: str) -> None:
    sys.stderr.write(f"pipelines submit: {line}\n")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
