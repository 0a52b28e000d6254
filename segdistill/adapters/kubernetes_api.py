"""TrainJobs and their pods as the Kubernetes API has them: outages are waited for, and every other failure is one
sentence.
"""

import json
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from segdistill.errors import UserError
from segdistill.patience import Patience

try:
    from kubernetes import client, config
    from urllib3.exceptions import HTTPError
except ModuleNotFoundError as error:
    raise UserError(f"{error.name}: not installed; a TrainJob needs the extra 'pipeline' of segdistill") from None

logger = logging.getLogger(__name__)

T = TypeVar("T")

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
KIND = ("trainer.kubeflow.org", "v1alpha1")
PLURAL = "trainjobs"
TIMEOUTS = (10, 60)  # of one request: seconds to connect, and to be answered
BUSY = 429


class TrainJobs:
    """The TrainJobs of this pod's namespace.

    Args:
        configuration: of the client; None for the service account of this pod.
        stop: an event that ends all waiting.
        patience: how many seconds an API that is away is waited for.

    Raises:
        UserError: this is no pod of a cluster.
    """

    def __init__(self, configuration: client.Configuration | None, *, stop: threading.Event, patience: float) -> None:
        if configuration is None:
            configuration = client.Configuration()
            try:
                config.load_incluster_config(configuration)
            except config.ConfigException as error:
                raise UserError(
                    f"Kubernetes: {str(error).rstrip('.')}; a TrainJob is submitted from a pod with a service account"
                ) from None
        configuration.retries = False  # ours wait for longer, and say so
        self.namespace = NAMESPACE_FILE.read_text().strip()
        self._host = configuration.host
        self.patience = Patience(self._host, patience, stop)
        connection = client.ApiClient(configuration)
        self._custom, self._core = client.CustomObjectsApi(connection), client.CoreV1Api(connection)
        self._silent: set[str] = set()  # what we may not do, and have said so

    def create(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """Makes a job; None if there is one of its name."""
        return self._ask_of_job("create", job, field_validation="Strict", none_if="AlreadyExists")

    def read(self, name: str) -> dict[str, Any] | None:
        """A job; None if there is none of that name."""
        return self._ask_of_job("get", name, none_if="NotFound")

    def delete(self, name: str, uid: str) -> None:
        """Has a job deleted after its pods, unless it is another one by now. It is there for a while longer."""
        options = client.V1DeleteOptions(propagation_policy="Foreground", preconditions=client.V1Preconditions(uid=uid))
        self._ask_of_job("delete", name, body=options, none_if="NotFound Conflict")

    def _ask_of_job(self, verb: str, *given: Any, none_if: str, **more: Any) -> dict[str, Any] | None:
        act = getattr(self._custom, f"{verb}_namespaced_custom_object")
        return self._ask(
            verb, f"{PLURAL}.{KIND[0]}",
            lambda: act(*KIND, self.namespace, PLURAL, *given, _request_timeout=TIMEOUTS, **more), none_if=none_if,
        )  # fmt: skip

    def pods(self, name: str, replicated_job: str) -> list[dict[str, Any]]:
        """The pods of a job; none where we may not look."""
        selector = f"jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/replicatedjob-name={replicated_job}"
        found = self._look(
            "list",
            "pods",
            lambda: (
                self._core.list_namespaced_pod(
                    self.namespace, label_selector=selector, _preload_content=False, _request_timeout=TIMEOUTS
                ).data
            ),
        )
        return list(json.loads(found)["items"]) if found else []

    def log(self, pod: str, container: str, lines: int, *, previous: bool) -> list[str]:
        """The last lines of a container, or of the one before it, ``previous``; none where there are none to be had."""
        found = self._look(
            "get",
            "pods/log",
            lambda: self._core.read_namespaced_pod_log(
                pod, self.namespace, container=container, tail_lines=lines, previous=previous,
                _preload_content=False, _request_timeout=TIMEOUTS,
            ).data,
        )  # fmt: skip
        return found.decode(errors="replace").splitlines() if found else []

    def _look(self, verb: str, resource: str, act: Callable[[], bytes]) -> bytes | None:
        """What helps to understand, and is not needed."""
        try:
            return self._ask(verb, resource, act, none_if="NotFound BadRequest")
        except UserError as error:
            if resource not in self._silent:
                self._silent.add(resource)
                logger.warning("%s", error)
            return None

    def _ask(self, verb: str, resource: str, act: Callable[[], T], *, none_if: str) -> T | None:
        """The answer; None if the API refuses for one of the reasons ``none_if``."""
        try:
            return self.patience.ask(act, _outage)
        except (client.ApiException, HTTPError) as error:
            if _status(error).get("reason") in none_if.split():
                return None
            raise self._sentence(verb, resource, error) from None

    def _sentence(self, verb: str, resource: str, error: Exception) -> UserError:
        """What a failure that no waiting mends means for the user."""
        status, said = getattr(error, "status", 0), _message(error)
        if status == 401:
            return UserError(f"{self._host}: does not accept the token of the pod's service account (401)")
        # The API also forbids what is within our rights, as when a quota is used up.
        if status == 403 and f"cannot {verb} resource" in said:
            account = re.search('User "([^"]+)"', said)
            return UserError(
                f"{account.group(1) if account else 'this pod'} may not {verb} {resource} in the namespace "
                f"{self.namespace}: bind it to the role segdistill-trainjobs of pipelines/manifests/rbac.yaml"
            )
        if status == 404 and not _status(error):
            return UserError(
                f"{self._host}: knows no {resource} of version {KIND[1]}: Kubeflow Trainer 2.2 or later is needed"
            )
        return UserError(f"{self._host}: cannot {verb} {resource} in the namespace {self.namespace}: {said}")


def _outage(error: Exception) -> str | None:
    """Why waiting may help, or None where it cannot."""
    if isinstance(error, client.ApiException):
        return f"answers {error.status} ({_message(error)})" if error.status >= 500 or error.status == BUSY else None
    return f"the Kubernetes API cannot be reached ({type(error).__name__})" if isinstance(error, HTTPError) else None


def _status(error: Exception) -> dict[str, Any]:
    """The API's own account of an error; empty where the answer is not of that kind."""
    try:
        said = json.loads(getattr(error, "body", None) or "")
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _message(error: Exception) -> str:
    """The same, on one line."""
    return " ".join(str(_status(error).get("message") or getattr(error, "reason", None) or "no reason given").split())
