"""A training stage on several nodes: a TrainJob of Kubeflow Trainer v2, started and waited for by the stage's own pod.

The API is ``trainer.kubeflow.org/v1alpha1`` as of Trainer 2.3. What belongs to the pods stands in ``runtimePatches``,
which Trainer 2.2 brought in the place of ``podTemplateOverrides``. The API server is asked to refuse a field that it
does not know: by default it drops it, and on an older Trainer the job would run without its volume.

The Kubeflow SDK (0.5) is not used: it waits without saying why, ends at the first answer that does not come, and knows
no retry. Its model classes check the manifest in the tests.
"""

import contextlib
import logging
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import field
from hashlib import sha256
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from segdistill.config import config
from segdistill.errors import Interrupted, UserError

if TYPE_CHECKING:
    from kubernetes.client import Configuration

    from segdistill.adapters.kubernetes_api import TrainJobs

logger = logging.getLogger(__name__)

# JobSet refuses a job whose pods' names would be longer than 63: <name>-node-0-<999 at most>-<5 random characters>.
LONGEST_NAME = 63 - len("-node-0-999-abcde")
MOST_NODES = 1000
NODE = "node"  # Trainer's word for its replicated job, and for the container in it, that runs the training
RANK_LABEL = "batch.kubernetes.io/job-completion-index"
OURS = {"app.kubernetes.io/managed-by": "segdistill"}
GRACE_SECONDS = 120.0  # after the job's deadline, for the controller to notice it
TAIL_LINES = 20

# Each node runs this and the arguments of a module. The controller's PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK,
# PET_MASTER_ADDR and PET_MASTER_PORT say the rest: torch reads them where the command line does not.
LAUNCH = ("python", "-m", "torch.distributed.run", "-m")

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(gt=0)]


class TrainJobFailed(UserError):
    """The job ended without success."""


@config
class Resources:
    """What one node asks for, in the units of Kubernetes."""

    cpu_request: Text
    cpu_limit: Text
    memory_request: Text
    memory_limit: Text
    accelerator: Text | None = None  # as in nvidia.com/gpu
    accelerators: Count = 1


@config
class Reference:
    """Keys of a secret or a config map, and the environment variables that they become."""

    name: Text
    keys: dict[Text, Text]
    optional: bool = False


@config
class Volume:
    """A claim that every node can write to (ReadWriteMany), and where containers see it."""

    claim: Text
    path: Annotated[str, Field(pattern="^/.")]


@config
class Toleration:
    """A taint that the pods bear; without a value, any."""

    key: Text
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


@config
class TrainJob:
    """What the job is."""

    name: Annotated[str, Field(pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=LONGEST_NAME)]  # see job_name
    namespace: Text | None = None  # None: the pod's own
    runtime: Text = "torch-distributed"
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    image: Text
    command: Annotated[list[str], Field(min_length=1)]  # as [*LAUNCH, "some.module"]
    args: list[str] = field(default_factory=list)
    nodes: Annotated[int, Field(gt=0, le=MOST_NODES)]
    processes: Count  # on each node
    resources: Resources
    env: dict[Text, str] = field(default_factory=dict)  # literal values; never a secret
    secrets: list[Reference] = field(default_factory=list)
    config_maps: list[Reference] = field(default_factory=list)
    volume: Volume
    shared_memory: Text | None = None  # the size of /dev/shm, which counts as memory of the pod
    node_selector: dict[Text, str] = field(default_factory=dict)
    tolerations: list[Toleration] = field(default_factory=list)
    user: Count
    group: Count
    labels: dict[Text, str] = field(default_factory=dict)  # of the job, as in kueue.x-k8s.io/queue-name
    timeout_seconds: Count  # the time it may run; waiting in Kueue's queue does not count


def job_name(pipeline_run: str, stage: str, job: str | None, parameters: str) -> str:
    """A name under which every attempt of one task finds the same job, and no other task does.

    Args:
        pipeline_run: the orchestrator's run.
        stage: the stage's name.
        job: the cell of the matrix, for a stage that runs once per job.
        parameters: all else that makes it another task.
    """
    fingerprint = sha256("\0".join((pipeline_run, stage, job or "", parameters)).encode()).hexdigest()[:12]
    readable = re.sub("[^a-z0-9]+", "-", f"segdistill-{stage}-{job or ''}".lower())
    return f"{readable[: LONGEST_NAME - len(fingerprint) - 1].strip('-')}-{fingerprint}"


def manifest(job: TrainJob) -> dict[str, Any]:
    """The job as the API takes it."""
    asked = job.resources
    accelerators = {asked.accelerator: str(asked.accelerators)} if asked.accelerator else {}
    trainer = {
        "image": job.image,
        "command": job.command,
        "numNodes": job.nodes,
        "numProcPerNode": job.processes,
        "resourcesPerNode": {
            "requests": {"cpu": asked.cpu_request, "memory": asked.memory_request, **accelerators},
            "limits": {"cpu": asked.cpu_limit, "memory": asked.memory_limit, **accelerators},
        },
    }
    environment: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in job.env.items()]
    for kind, references in (("configMapKeyRef", job.config_maps), ("secretKeyRef", job.secrets)):
        for item in references:
            for key, variable in item.keys.items():
                source = {kind: {"name": item.name, "key": key, "optional": item.optional}}
                environment.append({"name": variable, "valueFrom": source})
    trainer |= {key: value for key, value in (("args", job.args), ("env", environment)) if value}
    metadata = {"name": job.name, "labels": {**job.labels, **OURS}}
    patch = {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": _pod(job)}}}]}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata | ({"namespace": job.namespace} if job.namespace else {}),
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": job.runtime_kind, "name": job.runtime},
            "trainer": trainer,
            "runtimePatches": [{"manager": "segdistill", "trainingRuntimeSpec": {"template": {"spec": patch}}}],
            # It also ends a job that nobody waits for any more.
            "activeDeadlineSeconds": job.timeout_seconds,
        },
    }


def _pod(job: TrainJob) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": "workspace", "persistentVolumeClaim": {"claimName": job.volume.claim}},
    ]
    mounts = [{"name": "workspace", "mountPath": job.volume.path}]
    if job.shared_memory:
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": job.shared_memory}})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    spec: dict[str, Any] = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": job.user,
            "runAsGroup": job.group,
            "fsGroup": job.group,
            "fsGroupChangePolicy": "OnRootMismatch",  # not file by file on each start
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": volumes,
        "containers": [
            {
                "name": NODE,
                "volumeMounts": mounts,
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    }
    if job.node_selector:
        spec["nodeSelector"] = job.node_selector
    if job.tolerations:
        spec["tolerations"] = [
            {"key": taint.key, "operator": "Exists", "effect": taint.effect}
            if taint.value is None
            else {"key": taint.key, "operator": "Equal", "value": taint.value, "effect": taint.effect}
            for taint in job.tolerations
        ]
    # A mesh's proxy would stand between the processes, and never end.
    return {"metadata": {"labels": {**OURS, "sidecar.istio.io/inject": "false"}}, "spec": spec}


def run(
    job: TrainJob, *, configuration: "Configuration | None" = None, poll: float = 10.0, patience: float = 300.0
) -> None:
    """Has the job run to its end, and removes it.

    An earlier attempt of the same task may have left a job of this name: one that runs or has succeeded is taken over,
    one that failed is replaced. If this process is told to stop, or loses sight of the API, the job goes on, because a
    pod that is lost is tried again, and hours of several nodes are not to be lost with it. A job that nobody takes over
    ends at its timeout.

    Args:
        job: what to run.
        configuration: of the Kubernetes client; None for the service account of this pod.
        poll: seconds between two looks.
        patience: how many seconds the API may be away, or a deletion take.

    Raises:
        TrainJobFailed: it failed, ran out of time, or was deleted by others; it is deleted.
        UserError: the API does not let us, or is away for too long.
        Interrupted: SIGTERM came; the job goes on.
    """
    from segdistill.adapters.kubernetes_api import TrainJobs

    with _stop_on_sigterm() as stop:
        jobs = TrainJobs(job.namespace, configuration, stop=stop, patience=patience)
        shown = f"TrainJob {jobs.namespace}/{job.name}"
        begun = False
        try:
            uid = _begin(jobs, job, shown, poll)
            begun = True
            _wait(jobs, job, shown, uid, poll)
        except TrainJobFailed:
            _clean_up(jobs, job, shown, uid)
            raise
        except (UserError, Interrupted) as error:
            if not begun:
                raise
            raise type(error)(f"{error}; {shown} goes on, and the next attempt takes it over") from None
        _clean_up(jobs, job, shown, uid)


def _begin(jobs: "TrainJobs", job: TrainJob, shown: str, poll: float) -> str:
    """Makes the job, or takes over the one that is there; returns its uid."""
    while True:
        made = jobs.create(manifest(job))
        if made is not None:
            logger.info("%s: created, %d nodes with %d processes each", shown, job.nodes, job.processes)
            return str(made["metadata"]["uid"])
        there = jobs.read(job.name)
        if there is None:
            continue
        uid = str(there["metadata"]["uid"])
        state, why = _state(there)
        if "deletionTimestamp" not in there["metadata"]:
            if state != "Failed":
                logger.info("%s: taken over from an earlier attempt, %s", shown, state.lower())
                return uid
            logger.info("%s: an earlier attempt's failed (%s); it is replaced", shown, why)
            jobs.delete(job.name, uid)
        _wait_until_gone(jobs, job, shown, uid, poll)


def _wait_until_gone(jobs: "TrainJobs", job: TrainJob, shown: str, uid: str, poll: float) -> None:
    # Its pods go before it does. Were they still there, they and the next ones would write to the same checkpoint.
    deadline = time.monotonic() + jobs.patience
    while (there := jobs.read(job.name)) is not None and there["metadata"]["uid"] == uid:
        if time.monotonic() > deadline:
            raise UserError(
                f"{shown}: deleted, but still there after {jobs.patience:g} seconds; one of its pods may be on a node "
                "that is lost"
            )
        jobs.pause(poll)


def _wait(jobs: "TrainJobs", job: TrainJob, shown: str, uid: str, poll: float) -> None:
    observer = _Observer(jobs, job, shown)
    deadline = time.monotonic() + job.timeout_seconds + GRACE_SECONDS
    while True:
        found = jobs.read(job.name)
        if found is None or found["metadata"]["uid"] != uid or "deletionTimestamp" in found["metadata"]:
            raise TrainJobFailed(f"{shown}: deleted by somebody else while we waited for it{observer.last_words()}")
        state, why = _state(found)
        observer.look(state)
        if state == "Complete":
            return
        if state == "Failed":
            raise TrainJobFailed(f"{shown}: failed: {why}{observer.last_words()}")
        if state == "Suspended":
            deadline = time.monotonic() + job.timeout_seconds + GRACE_SECONDS
        elif time.monotonic() > deadline:
            raise TrainJobFailed(
                f"{shown}: not at its end {GRACE_SECONDS:g} seconds after its timeout of {job.timeout_seconds}; is the "
                f"controller of Kubeflow Trainer running?{observer.last_words()}"
            )
        jobs.pause(poll)


def _clean_up(jobs: "TrainJobs", job: TrainJob, shown: str, uid: str) -> None:
    """The training's result stands; a job that cannot be deleted must not change it."""
    try:
        jobs.delete(job.name, uid)
    except (UserError, Interrupted) as error:
        logger.warning("%s: not deleted: %s", shown, error)


def _state(found: dict[str, Any]) -> tuple[str, str]:
    """The condition that holds, "Created" where none does, and why."""
    conditions = {one["type"]: one for one in found.get("status", {}).get("conditions", []) if one["status"] == "True"}
    for name in ("Complete", "Failed", "Suspended"):
        if name in conditions:
            said = (conditions[name].get("reason"), conditions[name].get("message"))
            return name, ": ".join(" ".join(part.split()).rstrip(".") for part in said if part)
    return "Created", ""


class _Failure(NamedTuple):
    """The end of one container; the smallest of several is the first, and of the lowest rank."""

    ended: str
    rank: int
    what: str
    log: list[str]


class _Observer:
    """Tells how the pods fare whenever that changes, and keeps what a failed one said last.

    The pods of a failed job are soon gone, and their logs with them: with the restart policy that JobSet sets, a
    container is started anew in its pod a few times, and then the pod is deleted.
    """

    def __init__(self, jobs: "TrainJobs", job: TrainJob, shown: str) -> None:
        self.jobs, self.job, self.shown = jobs, job, shown
        self.told = ""
        self.failures: dict[tuple[int, str], _Failure] = {}

    def look(self, state: str) -> None:
        pods = self.jobs.pods(self.job.name, NODE)
        for pod in pods:
            self._keep_failure(pod)
        counts = Counter(_fares(pod) for pod in pods)
        now = ", ".join([state.lower(), *(f"{count} of {len(pods)} pods {fares}" for fares, count in counts.items())])
        if now != self.told:
            self.told = now
            logger.info("%s %s: %s", time.strftime("%H:%M:%S"), self.shown, now)

    def _keep_failure(self, pod: dict[str, Any]) -> None:
        name, rank = pod["metadata"]["name"], int(pod["metadata"]["labels"].get(RANK_LABEL, "0"))
        for container in pod.get("status", {}).get("containerStatuses", []):
            present, past = container.get("state", {}), container.get("lastState", {})
            end = present.get("terminated") or past.get("terminated")
            if container["name"] != NODE or not end or not end["exitCode"]:
                continue
            ended = end.get("finishedAt") or ""
            if (rank, ended) not in self.failures:
                log = self.jobs.log(name, NODE, TAIL_LINES, previous="terminated" not in present)
                what = f"{name} ended with exit code {end['exitCode']} ({end.get('reason', 'no reason given')})"
                self.failures[rank, ended] = _Failure(ended, rank, what, log)

    def last_words(self) -> str:
        """Which node was the first to fail at its last start, for the sentence; its log is printed."""
        latest = {failure.rank: failure for failure in sorted(self.failures.values())}
        if not latest:
            return ""
        first = min(latest.values())  # the others failed because it was gone
        if first.log:
            logger.error("the last lines of its log:\n%s", "\n".join(first.log))
        return f"; {first.what}"


def _fares(pod: dict[str, Any]) -> str:
    """A pod's phase, or what it waits for."""
    status = pod.get("status", {})
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason"):
            return f"waits ({waiting['reason']})"
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"waits ({condition.get('reason')}: {condition.get('message')})"
    return str(status.get("phase", "Unknown")).lower()


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; the former handler comes back afterwards."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, frame: FrameType | None) -> None:
        stop.set()

    former = signal.signal(signal.SIGTERM, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, former)
