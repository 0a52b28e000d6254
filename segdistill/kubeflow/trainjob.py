"""Has a TrainJob run to its end, as often as the task that does so is tried again.

The Kubeflow SDK (0.5) is not used for it: it waits without saying for what, ends at the first answer that does not
come, and knows no retry.
"""

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from segdistill.errors import Interrupted, UserError, stop_on_signal

if TYPE_CHECKING:
    from kubernetes.client import Configuration  # noqa: TID251  - a type alone

    from segdistill.adapters.kubernetes_api import TrainJobs

logger = logging.getLogger(__name__)

NODE = "node"  # Trainer's word for its replicated job, and for the container in it, that runs the training
GRACE_SECONDS = 120.0  # after the job's deadline, for the controller to notice it
TAIL_LINES = 20
RANK_LABEL = "batch.kubernetes.io/job-completion-index"


class TrainJobFailed(UserError):
    """The job ended without success."""


def run(
    job: dict[str, Any], *, configuration: "Configuration | None" = None, poll: float = 10.0, patience: float = 300.0
) -> None:
    """Has the job run to its end, and removes it.

    An earlier attempt of the same task may have left a job of this name: one that runs or has succeeded is taken over,
    one that failed is replaced. If this process is told to stop, or loses sight of the API, the job goes on, because a
    pod that is lost may be tried again, and hours of several nodes are not to be lost with it. A job that nobody takes
    over ends at its timeout.

    Args:
        job: what to run, as the API takes it.
        configuration: of the Kubernetes client; None for the service account of this pod.
        poll: seconds between two looks.
        patience: how many seconds the API may be away, or a deletion take.

    Raises:
        TrainJobFailed: it failed, ran out of time, or was deleted by others; it is deleted.
        UserError: the API does not let us, or is away for too long.
        Interrupted: SIGTERM came; the job goes on.
    """
    from segdistill.adapters.kubernetes_api import TrainJobs

    with stop_on_signal() as stop:
        attempt = _Attempt(TrainJobs(configuration, stop=stop, patience=patience), job, poll)
        uid = attempt.begin()
        try:
            attempt.wait(uid)
        except TrainJobFailed:
            attempt.clean_up(uid)
            raise
        except (UserError, Interrupted) as error:
            raise type(error)(f"{error}; {attempt.title} goes on, and the next attempt takes it over") from None
        attempt.clean_up(uid)


class _Attempt:
    """One attempt at having a job run."""

    def __init__(self, jobs: "TrainJobs", job: dict[str, Any], poll: float) -> None:
        self.jobs, self.job, self.poll = jobs, job, poll
        self.name, self.timeout = job["metadata"]["name"], job["spec"]["activeDeadlineSeconds"]
        self.title = f"TrainJob {jobs.namespace}/{self.name}"

    def begin(self) -> str:
        """Makes the job, or takes over the one that is there; returns its uid."""
        while True:
            made = self.jobs.create(self.job)
            if made is not None:
                nodes, processes = (self.job["spec"]["trainer"][key] for key in ("numNodes", "numProcPerNode"))
                logger.info("%s: created, %d nodes with %d processes each", self.title, nodes, processes)
                return str(made["metadata"]["uid"])
            there = self.jobs.read(self.name)
            if there is None:
                continue
            uid = str(there["metadata"]["uid"])
            state, why = _state(there)
            if "deletionTimestamp" not in there["metadata"]:
                if state != "Failed":
                    logger.info("%s: taken over from an earlier attempt", self.title)
                    return uid
                logger.info("%s: an earlier attempt's failed (%s); it is replaced", self.title, why)
                self.jobs.delete(self.name, uid)
            self._wait_until_gone(uid)

    def _wait_until_gone(self, uid: str) -> None:
        # Its pods go before it does. Were they still there, they and the next ones would write to the same checkpoint.
        patience = self.jobs.patience
        deadline = time.monotonic() + patience.seconds
        while (there := self.jobs.read(self.name)) is not None and there["metadata"]["uid"] == uid:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.title}: deleted, but still there after {patience.seconds:g} seconds; one of its pods may "
                    "be on a node that is lost"
                )
            patience.pause(self.poll)

    def wait(self, uid: str) -> None:
        """Waits for the job's end, and tells how its pods fare."""
        observer = _Observer(self.jobs, self.name, self.title)
        deadline = self._deadline()
        while True:
            there = self.jobs.read(self.name)
            if there is None or there["metadata"]["uid"] != uid or "deletionTimestamp" in there["metadata"]:
                words = observer.last_words()
                raise TrainJobFailed(f"{self.title}: deleted by somebody else while we waited for it{words}")
            state, why = _state(there)
            observer.look(state)
            if state == "Complete":
                return
            if state == "Failed":
                raise TrainJobFailed(f"{self.title}: failed: {why}{observer.last_words()}")
            if state == "Suspended":
                deadline = self._deadline()
            elif time.monotonic() > deadline:
                raise TrainJobFailed(
                    f"{self.title}: not at its end {GRACE_SECONDS:g} seconds after its timeout of "
                    f"{self.timeout}; is the controller of Kubeflow Trainer running?{observer.last_words()}"
                )
            self.jobs.patience.pause(self.poll)

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout + GRACE_SECONDS

    def clean_up(self, uid: str) -> None:
        """The training's result stands; a job that cannot be deleted must not change it."""
        try:
            self.jobs.delete(self.name, uid)
        except (UserError, Interrupted) as error:
            logger.warning("%s: not deleted: %s", self.title, error)


def _state(job: dict[str, Any]) -> tuple[str, str]:
    """The condition that holds, and why; both are empty until the job is suspended or at its end."""
    conditions = {one["type"]: one for one in job.get("status", {}).get("conditions", []) if one["status"] == "True"}
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

    def __init__(self, jobs: "TrainJobs", name: str, title: str) -> None:
        self.jobs, self.name, self.title = jobs, name, title
        self.told = ""
        self.failures: dict[tuple[int, str], _Failure] = {}

    def look(self, state: str) -> None:
        pods = self.jobs.pods(self.name, NODE)
        for pod in pods:
            self._keep_failure(pod)
        counts = Counter(_fares(pod) for pod in pods)
        parts = [f"{count} of {len(pods)} pods {fares}" for fares, count in counts.items()] or ["no pods"]
        now = ", ".join([*([state.lower()] if state else []), *parts])
        if now != self.told:
            self.told = now
            logger.info("%s %s: %s", time.strftime("%H:%M:%S"), self.title, now)

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
