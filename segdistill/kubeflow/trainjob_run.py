"""Has a TrainJob run to its end, as often as the task that does so is tried again.

The Kubeflow SDK (0.5) is not used for it: it waits without saying for what, ends at the first answer that does not
come, and knows no retry.
"""

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from segdistill.errors import Interrupted, UserError, stop_on_sigterm
from segdistill.kubeflow.trainjob import NODE, TrainJob, manifest

if TYPE_CHECKING:
    from kubernetes.client import Configuration  # noqa: TID251  - a type alone

    from segdistill.adapters.kubernetes_api import TrainJobs

logger = logging.getLogger(__name__)

GRACE_SECONDS = 120.0  # after the job's deadline, for the controller to notice it
TAIL_LINES = 20
RANK_LABEL = "batch.kubernetes.io/job-completion-index"


class TrainJobFailed(UserError):
    """The job ended without success."""


def run(
    job: TrainJob, *, configuration: "Configuration | None" = None, poll: float = 10.0, patience: float = 300.0
) -> None:
    """Has the job run to its end, and removes it.

    An earlier attempt of the same task may have left a job of this name: one that runs or has succeeded is taken over,
    one that failed is replaced. If this process is told to stop, or loses sight of the API, the job goes on, because a
    pod that is lost may be tried again, and hours of several nodes are not to be lost with it. A job that nobody takes
    over ends at its timeout.

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

    with stop_on_sigterm() as stop:
        jobs = TrainJobs(job.namespace, configuration, stop=stop, patience=patience)
        shown = f"TrainJob {jobs.namespace}/{job.name}"
        uid = _begin(jobs, job, shown, poll)
        try:
            _wait(jobs, job, shown, uid, poll)
        except TrainJobFailed:
            _clean_up(jobs, job, shown, uid)
            raise
        except (UserError, Interrupted) as error:
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
                logger.info("%s: taken over from an earlier attempt", shown)
                return uid
            logger.info("%s: an earlier attempt's failed (%s); it is replaced", shown, why)
            jobs.delete(job.name, uid)
        _wait_until_gone(jobs, job, shown, uid, poll)


def _wait_until_gone(jobs: "TrainJobs", job: TrainJob, shown: str, uid: str, poll: float) -> None:
    # Its pods go before it does. Were they still there, they and the next ones would write to the same checkpoint.
    deadline = time.monotonic() + jobs.patience.seconds
    while (there := jobs.read(job.name)) is not None and there["metadata"]["uid"] == uid:
        if time.monotonic() > deadline:
            raise UserError(
                f"{shown}: deleted, but still there after {jobs.patience.seconds:g} seconds; one of its pods may be on a node "
                "that is lost"
            )
        jobs.patience.pause(poll)


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
        jobs.patience.pause(poll)


def _clean_up(jobs: "TrainJobs", job: TrainJob, shown: str, uid: str) -> None:
    """The training's result stands; a job that cannot be deleted must not change it."""
    try:
        jobs.delete(job.name, uid)
    except (UserError, Interrupted) as error:
        logger.warning("%s: not deleted: %s", shown, error)


def _state(found: dict[str, Any]) -> tuple[str, str]:
    """The condition that holds, and why; both are empty until the job is suspended or at its end."""
    conditions = {one["type"]: one for one in found.get("status", {}).get("conditions", []) if one["status"] == "True"}
    for name in ("Complete", "Failed", "Suspended"):
        if name in conditions:
            said = (conditions[name].get("reason"), conditions[name].get("message"))
            return name, ": ".join(" ".join(part.split()).rstrip(".") for part in said if part)
    return "", ""


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
        parts = [f"{count} of {len(pods)} pods {fares}" for fares, count in counts.items()] or ["no pods"]
        now = ", ".join([*([state.lower()] if state else []), *parts])
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
            return f"waits ({condition.get('reason')}: {' '.join(condition.get('message', '').split())})"
    return str(status.get("phase", "Unknown")).lower()
