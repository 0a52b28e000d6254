"""A stage on several nodes: its TrainJob against the published classes, and against a small server that stands for the
Kubernetes API.
"""

import copy
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from stand_in import Request, serving

from pipelines.cluster import Cluster
from pipelines.trainjob import manifest
from segdistill.config import parse, read_yaml
from segdistill.errors import Interrupted, UserError
from segdistill.kubeflow import nodes, trainjob
from segdistill.kubeflow.nodes import LAUNCH, job_name
from segdistill.kubeflow.trainjob import TrainJobFailed, run

ROOT = Path(__file__).resolve().parents[2]
JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs"
PODS = "/api/v1/namespaces/team/pods"
ACCOUNT = "system:serviceaccount:team:pipeline-runner"

NAME = "segdistill-distill-kd-s1-0123456789ab"
DEFAULT = read_yaml(ROOT / "pipelines/cluster.yaml")
LEAST: dict[str, Any] = DEFAULT | {
    "accelerator": DEFAULT["accelerator"] | {"nodes": 2, "tolerations": []},
    "config_maps": [],
    "secrets": [],
    "workspace": {"claim": "segdistill-workspace", "path": "/workspace", "share_data": False},
}
EVERYTHING = LEAST | {
    "accelerator": DEFAULT["accelerator"] | {
        "nodes": 2,
        "runtime": "torch-of-the-team",
        "node_selector": {"pool": "gpu"},
        "tolerations": [
            {"key": "nvidia.com/gpu", "value": None, "effect": "NoSchedule"},
            {"key": "team", "value": "vision", "effect": "NoExecute"},
        ],
    },
    "config_maps": DEFAULT["config_maps"],
    "secrets": [
        {"name": "s3", "keys": {"key_id": "AWS_ACCESS_KEY_ID"}, "optional": True, "tasks": ["train"]},
        {"name": "others", "keys": {"key": "OTHER"}, "optional": True, "tasks": ["data"]},
    ],
    "certificates": {
        "config_map": "private-authority", "key": "ca.crt", "path": "/etc/authority", "variables": ["SSL_CERT_FILE"],
    },
    "image_pull_secrets": ["registry"],
    "queue": {"name": "vision", "priority_class": "research", "tasks": ["train"]},
    "labels": {"team": "vision"},
    "annotations": {"example.com/contact": "vision team <vision@example.com>"},
}  # fmt: skip


SECRET = {"name": "s", "keys": {"k": "X"}, "optional": True, "tasks": ["train"]}


@pytest.fixture(autouse=True)
def _of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGDISTILL_PIPELINE_RUN", "run-7")


def job(content: dict[str, Any] = LEAST) -> dict[str, Any]:
    task: Any = SimpleNamespace(accelerator="nvidia.com/gpu", accelerators=4 if content is EVERYTHING else 0)
    command = [*LAUNCH, "segdistill.some_module"]
    return nodes._job(manifest(parse(Cluster, content, "")), task, NAME, command, "/workspace/task.json", 4)


# The manifest


def through_the_published_classes(content: dict[str, Any]) -> dict[str, Any]:
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed; it is in the extra 'dev'"
    )
    return models.TrainerV1alpha1TrainJob.from_dict(copy.deepcopy(content)).to_dict()


@pytest.mark.parametrize("content", [LEAST, EVERYTHING], ids=["least", "everything"])
def test_every_field_of_the_manifest_is_one_of_the_published_classes(content: dict[str, Any]) -> None:
    made = job(content)
    assert through_the_published_classes(made) == made


def fields(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Every field of the schema in a manifest: names of environment variables, labels and resources are free."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield value, key
            if key not in ("labels", "annotations", "limits", "requests", "nodeSelector"):
                yield from fields(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from fields(inner)


def test_a_mistyped_field_anywhere_in_the_manifest_would_be_noticed() -> None:
    made = job(EVERYTHING)
    count = len(list(fields(made)))
    assert count > 80
    for number in range(count):
        wrong = copy.deepcopy(made)
        holder, key = list(fields(wrong))[number]
        holder[f"{key}x"] = holder.pop(key)
        try:
            survived = through_the_published_classes(wrong)
        except ValueError:
            continue  # the field is required
        assert survived != wrong, key


def test_the_manifest_says_what_was_asked_for() -> None:
    made = job(EVERYTHING)
    assert made["metadata"] == {
        "name": NAME,
        "labels": {
            "team": "vision",
            "kueue.x-k8s.io/queue-name": "vision",
            "kueue.x-k8s.io/priority-class": "research",
            "app.kubernetes.io/managed-by": "segdistill",
        },
        "annotations": {"example.com/contact": "vision team <vision@example.com>"},
    }
    spec = made["spec"]
    assert spec["runtimeRef"]["name"] == "torch-of-the-team"
    assert spec["activeDeadlineSeconds"] < DEFAULT["tasks"]["train"]["timeout_seconds"]
    trainer = spec["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["resourcesPerNode"] == {
        "requests": {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "4"},
        "limits": {"cpu": "16", "memory": "48Gi", "nvidia.com/gpu": "4"},
    }
    assert trainer["env"] == [
        {"name": "SEGDISTILL_WORK", "value": "/workspace/work"},
        {"name": "SSL_CERT_FILE", "value": "/etc/authority/ca.crt"},
        {
            "name": "MLFLOW_TRACKING_URI",
            "valueFrom": {
                "configMapKeyRef": {"name": "segdistill", "key": "mlflow_tracking_uri", "optional": False},
            },
        },
        {
            "name": "AWS_ACCESS_KEY_ID",
            "valueFrom": {"secretKeyRef": {"name": "s3", "key": "key_id", "optional": True}},
        },
        {"name": "SEGDISTILL_PIPELINE_RUN", "value": "run-7"},
    ]
    pod = pod_of(made)
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "vision", "effect": "NoExecute"},
    ]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
    (container,) = pod["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"workspace": "/workspace", "shared-memory": "/dev/shm", "certificates": "/etc/authority"}
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert {volume["name"] for volume in pod["volumes"]} == set(mounted)
    (patch,) = made["spec"]["runtimePatches"]
    pods = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert pods["metadata"]["annotations"] == EVERYTHING["annotations"]
    # Kueue is to see the job, and not each of its pods once more.
    assert pods["metadata"]["labels"]["team"] == "vision" and "kueue.x-k8s.io/queue-name" not in str(pods)


# What Trainer's webhook, its CRD and the API server refuse, beyond the published classes


def is_domain_prefixed_path(text: str) -> bool:
    """``IsDomainPrefixedPath`` of k8s.io/apimachinery: a domain of RFC 1123, a slash, and a path of RFC 3986."""
    domain, slash, path = text.partition("/")
    label = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
    return bool(
        slash and len(domain) <= 253 and re.fullmatch(rf"{label}(\.{label})*", domain)
        and re.fullmatch(r"[A-Za-z0-9/\-._~%!$&'()*+,;=:]+", path)
    )  # fmt: skip


def is_label(key: str, value: str) -> bool:
    """``IsQualifiedName`` and ``IsValidLabelValue`` of the same."""
    *prefix, name = key.split("/")
    word = "[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
    return bool(
        len(prefix) <= 1 and all(is_domain_prefixed_path(f"{one}/x") for one in prefix)
        and len(name) <= 63 and re.fullmatch(word, name) and len(value) <= 63 and re.fullmatch(f"({word})?", value)
    )  # fmt: skip


def refusals(made: dict[str, Any]) -> list[str]:
    """Of a job for the runtime ``torch-distributed``, as Trainer 2.2 and 2.3 have it: jobset.go, torch.go, the CRD."""
    said, spec = [], made["spec"]
    name, trainer = made["metadata"]["name"], spec["trainer"]
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(f"{name}-node-0-999-abcde") > 63:
        said.append("name")
    variables = [one["name"] for one in trainer.get("env", [])]
    reserved = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
    if reserved & set(variables) or len(set(variables)) < len(variables) or len(variables) > 128:
        said.append("env")
    if len(trainer["image"]) > 500:
        said.append("image")
    labels = [made["metadata"]["labels"]]
    for patch in spec["runtimePatches"]:
        if not is_domain_prefixed_path(patch["manager"]) or len(patch["manager"]) > 253:
            said.append("manager")
        for replicated in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            pods = replicated["template"]["spec"]["template"]
            labels.append(pods["metadata"]["labels"])
            if set(pods["metadata"]) - {"labels", "annotations"}:
                said.append("metadata")
            for container in pods["spec"]["containers"]:
                if (replicated["name"], container["name"]) != ("node", "node") or "env" in container:
                    said.append("container")
                mounts = [one["name"] for one in container["volumeMounts"]]
                if sorted(mounts) != sorted({one["name"] for one in pods["spec"]["volumes"]}):
                    said.append("volumes")
    if not all(is_label(*label) for some in labels for label in some.items()):
        said.append("label")
    return said


@pytest.mark.parametrize("content", [LEAST, EVERYTHING], ids=["least", "everything"])
def test_the_webhook_of_trainer_takes_the_job(content: dict[str, Any]) -> None:
    assert refusals(job(content)) == []


@pytest.mark.parametrize(
    "manager",
    ["segdistill", "/task", "segdistill/", "Seg.io/x", "a_b.io/x", "a..io/x", "acme.io/a b", "x" * 254 + "/y"],
)
def test_a_manager_that_is_no_path_with_a_domain_would_be_refused(manager: str) -> None:
    made = job()
    made["spec"]["runtimePatches"][0]["manager"] = manager
    assert refusals(made) == ["manager"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": {"team": "vision & co"}}, "labels.team: 'vision & co' is no value of a label"),
        ({"labels": {"team": "v" * 64}}, f"labels.team: '{'v' * 64}' is no value of a label"),
        ({"labels": {"a/b/c": "x"}}, "labels.a/b/c: 'a/b/c' is no key"),
        ({"annotations": {"-": "x"}}, "annotations.-: '-' is no key"),
        (
            {"queue": {"name": "a b", "priority_class": None, "tasks": ["train"]}},
            "queue.name: 'a b' is no value of a label",
        ),
        ({"image_pull_secrets": ["My_Secret"]}, "image_pull_secrets.0: 'My_Secret' is no name of an object"),
        ({"secrets": [SECRET | {"keys": {"k": "A-B"}}]}, "secrets.0.keys.k: 'A-B' is no environment variable"),
        ({"secrets": [SECRET | {"keys": {"k": "PET_NNODES"}}]}, "the variable PET_NNODES is Kubeflow Trainer's own"),
        ({"secrets": [SECRET, SECRET]}, "the variable X is given twice"),
    ],
)
def test_what_the_cluster_would_refuse_is_refused_when_it_is_read(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        job(LEAST | change)


def pod_of(made: dict[str, Any]) -> dict[str, Any]:
    (patch,) = made["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]["template"]["spec"]


def test_what_was_not_asked_for_is_left_to_the_runtime() -> None:
    made = job()
    assert [one["name"] for one in made["spec"]["trainer"]["env"]] == ["SEGDISTILL_WORK", "SEGDISTILL_PIPELINE_RUN"]
    assert not {"nodeSelector", "tolerations", "imagePullSecrets"} & pod_of(made).keys()
    assert [volume["name"] for volume in pod_of(made)["volumes"]] == ["workspace", "shared-memory"]
    assert "nvidia.com/gpu" not in str(made)


def test_a_jobs_name_is_the_tasks_own_and_fits_the_names_of_its_pods() -> None:
    task = ("2f7c", "train_teacher", "{}")
    others = [
        ("2f7d", *task[1:]),
        ("2f7c", "distill-kd-s1", task[2]),
        ("2f7c", "distill-kd-s2", task[2]),
        (*task[:2], '{"settings": {"x": 1}}'),
        ("2f7c", "distill-an_experiment_with_a_name_that_goes_on_and_on-s1", ""),
    ]
    assert job_name(*task) == job_name(*task)
    names = {job_name(*one) for one in [task, *others]}
    assert len(names) == 6
    for name in names:
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name)
        assert len(f"{name}-node-0-999-abcde") <= 63  # as JobSet does


def test_torch_reads_from_the_environment_what_the_controller_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import run as torchrun

    said = {"NNODES": "2", "NPROC_PER_NODE": "4", "NODE_RANK": "1", "MASTER_ADDR": "job-node-0-0.job"}
    for name, value in said.items():
        monkeypatch.setenv(f"PET_{name}", value)
    assert LAUNCH[:3] == ("python", "-m", torchrun.__name__)
    found = torchrun.parse_args([*LAUNCH[3:], "some.module", "task.json"])
    assert {name: str(getattr(found, name.lower())) for name in said} == said
    assert (found.module, found.training_script, found.training_script_args) == (True, "some.module", ["task.json"])


# The API


class Api:
    """What Kubernetes does with TrainJobs, their pods and logs, as far as we ask for it; every request is kept."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.conditions: list[Any] = [("Complete", "JobsCompleted", "jobset completed")]  # one a look; the last stays
        self.pods: list[list[dict[str, Any]]] = [[]]  # likewise
        self.logs: dict[tuple[str, bool], str] = {}  # by pod and "previous"
        self.outages: list[int] = []  # of the next requests: a status, or 0 to close the connection
        self.forbidden: set[tuple[str, str]] = set()  # method and path
        self.deletion_takes = 2  # looks
        self.on_look: Callable[[int], None] = lambda number: None
        self.made = 0
        self.host = ""

    def answer(self, request: Request) -> tuple[int, Any] | None:
        self.requests.append(request)
        if self.outages:
            status = self.outages.pop(0)
            return (status, "no healthy upstream") if status else None
        return self.reply(request.method, request.path, request.query, request.body)

    def reply(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        verb = {"POST": "create", "GET": "get", "DELETE": "delete"}[method]
        if (method, path) in self.forbidden:
            said = f'User "{ACCOUNT}" cannot {"list" if path == PODS else verb} resource "{path.split("/")[-1]}"'
            return status(403, "Forbidden", f"trainjobs.trainer.kubeflow.org is forbidden: {said} in API group ...")
        if path == PODS:
            wanted = "jobset.sigs.k8s.io/jobset-name={},jobset.sigs.k8s.io/replicatedjob-name=node"
            assert query["labelSelector"] == [wanted.format(NAME)]
            return 200, {"items": self.pods.pop(0) if len(self.pods) > 1 else self.pods[0]}
        if path.startswith(PODS):
            assert query["container"] == ["node"] and query["tailLines"] == ["20"]
            log = self.logs.get((path.split("/")[-2], query["previous"] == ["True"]))
            return (200, log) if log is not None else status(400, "BadRequest", "previous container not found")
        if method == "POST":
            # By default the server drops a field that it does not know.
            assert path == JOBS and query["fieldValidation"] == ["Strict"]
            return self.make(body)
        assert path.startswith(f"{JOBS}/")
        return self.look(path.rpartition("/")[2]) if method == "GET" else self.delete(path.rpartition("/")[2], body)

    def make(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["metadata"]["name"]
        if name in self.jobs:
            return status(409, "AlreadyExists", f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        self.made += 1
        self.jobs[name] = body | {"metadata": body["metadata"] | {"uid": f"uid-{self.made}"}}
        return 201, self.jobs[name]

    def look(self, name: str) -> tuple[int, Any]:
        looks = sum(one.method == "GET" and one.path.startswith(JOBS) for one in self.requests)
        self.on_look(looks)
        if name not in self.jobs:
            return status(404, "NotFound", f'trainjobs.trainer.kubeflow.org "{name}" not found')
        found = self.jobs[name]
        if "deletionTimestamp" in found["metadata"]:
            found["looks_left"] -= 1
            if found["looks_left"] < 0:
                del self.jobs[name]
                return status(404, "NotFound", f'trainjobs.trainer.kubeflow.org "{name}" not found')
        elif "status" not in found:
            condition = self.conditions.pop(0) if len(self.conditions) > 1 else self.conditions[0]
            return 200, found | with_condition(condition)
        return 200, found

    def delete(self, name: str, body: Any) -> tuple[int, Any]:
        assert body["propagationPolicy"] == "Foreground"  # the pods first
        if name not in self.jobs:
            return status(404, "NotFound", f'trainjobs.trainer.kubeflow.org "{name}" not found')
        found = self.jobs[name]
        if body["preconditions"]["uid"] != found["metadata"]["uid"]:
            return status(409, "Conflict", "the UID in the precondition does not match the UID in record")
        found["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        found["looks_left"] = self.deletion_takes
        return 200, found

    def there_is(self, condition: Any) -> None:
        """A job that an earlier attempt made."""
        self.make(job())
        if condition:
            self.jobs[NAME] |= with_condition(condition)

    def asked(self) -> list[str]:
        """The requests about the job, as verbs, looks at it that follow each other as one."""
        verbs = [one.method for one in self.requests if one.path.startswith(JOBS)]
        return [one for number, one in enumerate(verbs) if one != "GET" or verbs[number - 1 : number] != ["GET"]]


def status(code: int, reason: str, message: str) -> tuple[int, dict[str, Any]]:
    return code, {"kind": "Status", "code": code, "reason": reason, "message": message}


def with_condition(condition: Any) -> dict[str, Any]:
    if condition is None:
        return {}
    kind, reason, message = condition
    former = {"type": "Suspended", "status": "False", "reason": "Resumed", "message": "TrainJob is resumed"}
    return {"status": {"conditions": [former, {"type": kind, "status": "True", "reason": reason, "message": message}]}}


def pod(rank: int, state: dict[str, Any] | None = None, *, before: dict[str, Any] | None = None, **rest: Any) -> Any:
    container = {"name": "node", "state": state or {"running": {}}, "lastState": before or {}}
    return {
        "metadata": {
            "name": f"job-node-0-{rank}-abcde",
            "labels": {"batch.kubernetes.io/job-completion-index": str(rank)},
        },
        "status": {"phase": "Running", "containerStatuses": [container]} | rest,
    }


def ended(code: int, second: str) -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": "Error", "finishedAt": f"2026-01-01T00:00:{second}Z"}}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> Iterator[Api]:
    pytest.importorskip("kubernetes")
    from segdistill.adapters import kubernetes_api

    (tmp_path / "namespace").write_text("team\n")
    monkeypatch.setattr(kubernetes_api, "NAMESPACE_FILE", tmp_path / "namespace")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logging.getLogger("segdistill"), "propagate", True)
    caplog.set_level(logging.INFO, logger="segdistill")
    stand_in = Api()
    with serving(stand_in.answer) as stand_in.host:
        yield stand_in


def run_against(api: Api, *, patience: float = 20.0, timeout: int = 3600) -> None:
    from kubernetes.client import Configuration

    made = job()
    made["spec"]["activeDeadlineSeconds"] = timeout
    run(made, configuration=Configuration(host=api.host), poll=0.01, patience=patience)


FAILED = ("Failed", "FailedJobs", "jobset failed due to one or more job failures")


def test_a_job_is_made_waited_for_and_removed(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    api.conditions = [None, None, None, ("Complete", "JobsCompleted", "jobset completed")]
    waiting = {"phase": "Pending", "containerStatuses": []}
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU is free"}
    api.pods = [
        [pod(0, **waiting, conditions=[unschedulable]), pod(1, {"waiting": {"reason": "ImagePullBackOff"}})],
        [pod(0), pod(1)],
        [pod(0), pod(1)],  # told once
        [pod(0, ended(0, "09")), pod(1, ended(0, "09"))],
    ]
    run_against(api)
    assert api.asked() == ["POST", "GET", "DELETE"]
    assert api.requests[0].body["spec"]["trainer"] == job()["spec"]["trainer"]
    told = [re.sub(r"^\d\d:\d\d:\d\d ", "", record.message) for record in caplog.records]
    shown = f"TrainJob team/{NAME}"
    assert told == [
        f"{shown}: created, 2 nodes with 4 processes each",
        f"{shown}: 1 of 2 pods waits (Unschedulable: no GPU is free), 1 of 2 pods waits (ImagePullBackOff)",
        f"{shown}: 2 of 2 pods running",
        f"{shown}: complete, 2 of 2 pods running",
    ]


def test_two_attempts_make_one_job(api: Api) -> None:
    """The first attempt is told to stop, as when its pod is evicted."""
    api.conditions = [None]
    api.on_look = lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 3 else None
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="goes on, and the next attempt takes it over"):
        run_against(api)
    assert signal.getsignal(signal.SIGTERM) is former
    assert list(api.jobs) == [NAME] and api.asked() == ["POST", "GET"]
    api.on_look, api.conditions = (lambda number: None), [None, ("Complete", "JobsCompleted", "")]
    run_against(api)
    assert api.made == 1 and api.asked() == ["POST", "GET", "POST", "GET", "DELETE"]


@pytest.mark.parametrize("condition", [None, ("Complete", "JobsCompleted", ""), ("Suspended", "Suspended", "")])
def test_a_job_that_an_earlier_attempt_left_is_taken_over(
    condition: Any, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    api.there_is(None)
    api.conditions = [condition, ("Complete", "JobsCompleted", "")]
    run_against(api)
    assert api.made == 1 and "DELETE" in api.asked()
    assert "taken over from an earlier attempt" in caplog.text


def test_an_earlier_attempts_failed_job_is_replaced_after_its_pods_have_gone(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    api.there_is(FAILED)
    run_against(api)
    assert api.made == 2
    assert api.asked() == ["POST", "GET", "DELETE", "GET", "POST", "GET", "DELETE"]
    assert "an earlier attempt's failed (FailedJobs: jobset failed due to one or more job failures)" in caplog.text


def test_a_job_that_is_being_deleted_is_waited_for(api: Api) -> None:
    api.there_is(None)
    api.delete(NAME, {"propagationPolicy": "Foreground", "preconditions": {"uid": "uid-1"}})
    run_against(api)
    assert api.made == 2


def test_a_job_that_cannot_be_deleted_is_not_waited_for_for_ever(api: Api) -> None:
    api.there_is(FAILED)
    api.deletion_takes = 10**9
    with pytest.raises(UserError, match=r"still there after 0\.2 seconds; one of its pods may be on a node that is"):
        run_against(api, patience=0.2)
    assert api.made == 1


def test_a_failed_job_names_the_pod_that_failed_first_shows_its_log_and_is_removed(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    api.conditions = [None, None, None, FAILED]
    # Rank 1 fails twice, and takes rank 0 with it; then the pods are gone.
    api.pods = [
        [pod(0, before=ended(1, "03")), pod(1, before=ended(2, "01"))],
        [pod(0), pod(1)],
        [pod(0, ended(1, "59")), pod(1, ended(2, "58"))],
        [],
    ]
    api.logs = {
        ("job-node-0-1-abcde", True): "the first time",
        ("job-node-0-1-abcde", False): "epoch 3\nCUDA out of memory",
        ("job-node-0-0-abcde", False): "connection closed by peer",
    }
    with pytest.raises(TrainJobFailed) as raised:
        run_against(api)
    assert str(raised.value) == (
        f"TrainJob team/{NAME}: failed: FailedJobs: jobset failed due to one or more job failures; "
        "job-node-0-1-abcde ended with exit code 2 (Error)"
    )
    assert caplog.records[-1].message == "the last lines of its log:\nepoch 3\nCUDA out of memory"
    assert api.asked()[-1] == "DELETE"


def test_of_nodes_that_fail_in_the_same_second_rank_0_is_named_by_the_log_of_its_last_start(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    api.conditions = [None, FAILED]
    api.pods = [[pod(1, before=ended(1, "07")), pod(0, before=ended(1, "07"))], []]
    api.logs = {("job-node-0-0-abcde", True): "bad luck", ("job-node-0-0-abcde", False): "started anew"}
    with pytest.raises(TrainJobFailed, match="job-node-0-0-abcde ended with exit code 1"):
        run_against(api)
    assert caplog.records[-1].message.endswith(":\nbad luck")


def test_a_job_over_its_deadline_is_a_failure_and_a_controller_that_sleeps_too(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.conditions = [("Failed", "DeadlineExceeded", "TrainJob exceeded its active deadline")]
    with pytest.raises(TrainJobFailed, match="DeadlineExceeded: TrainJob exceeded its active deadline"):
        run_against(api)
    api.jobs.clear()
    api.conditions = [None]
    monkeypatch.setattr(trainjob, "GRACE_SECONDS", 0.0)
    with pytest.raises(TrainJobFailed, match="is the controller of Kubeflow Trainer running"):
        run_against(api, timeout=1)
    assert api.asked()[-1] == "DELETE"


def test_the_time_in_kueues_queue_does_not_count(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=iter(range(0, 10**6, 500)).__next__, strftime=time.strftime)
    monkeypatch.setattr(trainjob, "time", clock)
    api.conditions = [("Suspended", "Suspended", "TrainJob is suspended")] * 50 + [("Complete", "", "")]
    run_against(api)


def test_a_job_that_somebody_deletes_is_a_failure(api: Api) -> None:
    api.conditions = [None]
    api.on_look = lambda number: api.jobs.clear() if number == 3 else None
    with pytest.raises(TrainJobFailed, match="deleted by somebody else"):
        run_against(api)


def test_a_job_that_somebody_made_anew_is_not_ours_to_delete(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    def replace(number: int) -> None:
        if number == 3:
            api.jobs.clear()
            api.there_is(None)

    api.conditions, api.on_look = [None], replace
    with pytest.raises(TrainJobFailed, match="deleted by somebody else"):
        run_against(api)
    (there,) = api.jobs.values()
    assert there["metadata"]["uid"] == "uid-2" and "deletionTimestamp" not in there["metadata"]
    assert "not deleted" not in caplog.text


def test_an_api_that_is_away_for_a_while_is_waited_for(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    api.outages = [503, 0, 429, 500]  # the first request: a job may or may not have been made
    api.conditions = [None] * 3 + [("Complete", "", "")]
    api.on_look = lambda number: api.outages.extend([0, 504]) if number == 2 else None
    run_against(api)
    assert api.made == 1 and api.asked()[-1] == "DELETE"
    assert caplog.text.count("trying for up to 20 seconds") == caplog.text.count("answers again") == 2


def test_an_api_that_stays_away_ends_the_waiting_but_not_the_job(api: Api) -> None:
    api.conditions = [None]
    api.on_look = lambda number: api.outages.extend([503] * 10**4) if number == 3 else None
    with pytest.raises(UserError) as raised:
        run_against(api, patience=0.5)
    assert not isinstance(raised.value, TrainJobFailed)
    assert str(raised.value) == (
        f"{api.host}: answers 503 (Service Unavailable); gave up after trying for 0.5 seconds; "
        f"TrainJob team/{NAME} goes on, and the next attempt takes it over"
    )
    assert list(api.jobs) == [NAME]


def test_a_job_that_was_made_although_the_answer_got_lost_is_not_made_twice(api: Api) -> None:
    real, lost = api.make, [True]

    def make(body: dict[str, Any]) -> tuple[int, Any]:
        answer = real(body)
        return (504, "upstream timed out") if lost and lost.pop() else answer

    api.make = make  # type: ignore[method-assign]
    run_against(api)
    assert api.made == 1 and api.asked() == ["POST", "POST", "GET", "DELETE"]


@pytest.mark.parametrize(
    ("method", "path", "right"),
    [
        ("POST", JOBS, "create trainjobs.trainer.kubeflow.org"),
        ("GET", f"{JOBS}/{NAME}", "get trainjobs.trainer.kubeflow.org"),
    ],
)
def test_a_missing_right_is_one_sentence_that_names_it(method: str, path: str, right: str, api: Api) -> None:
    api.forbidden = {(method, path)}
    with pytest.raises(UserError) as raised:
        run_against(api)
    assert str(raised.value).startswith(
        f"{ACCOUNT} may not {right} in the namespace team: bind it to the role segdistill-trainjobs of "
        "pipelines/manifests/rbac.yaml"
    )


def test_without_rights_on_pods_the_job_runs_all_the_same(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    api.forbidden = {("GET", PODS)}
    api.conditions = [None, None, ("Complete", "", "")]
    run_against(api)
    assert caplog.text.count("may not list pods in the namespace team") == 1


def test_a_job_that_cannot_be_removed_does_not_change_what_has_become_of_it(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    api.forbidden = {("DELETE", f"{JOBS}/{NAME}")}
    run_against(api)
    assert f"not deleted: {ACCOUNT} may not delete trainjobs" in caplog.text


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ((404, "404 page not found\n"), "Kubeflow Trainer 2.2 or later is needed"),
        (
            status(400, "BadRequest", 'strict decoding error: unknown field "spec.runtimePatches"'),
            "cannot create trainjobs.trainer.kubeflow.org in the namespace team: strict decoding error: unknown field",
        ),
        (status(403, "Forbidden", "exceeded quota: gpus"), "in the namespace team: exceeded quota: gpus"),
        (status(401, "Unauthorized", "Unauthorized"), "does not accept the token of the pod's service account (401)"),
    ],
)
def test_what_the_api_says_against_a_job_is_one_sentence(answer: Any, sentence: str, api: Api) -> None:
    api.make = lambda body: answer  # type: ignore[method-assign]
    with pytest.raises(UserError) as raised:
        run_against(api)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)
    assert len(api.requests) == 1  # waiting would not help


def test_outside_of_a_cluster_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kubernetes")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(UserError, match="a TrainJob is submitted from a pod with a service account"):
        run(job())


def test_in_a_pod_the_service_account_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kubernetes")
    from kubernetes.config import incluster_config

    from segdistill.adapters import kubernetes_api

    for name in ("token", "ca.crt", "namespace"):
        (tmp_path / name).write_text(f"the-{name}\n")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr(kubernetes_api, "NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    seen: list[Any] = []
    monkeypatch.setattr(kubernetes_api.client, "ApiClient", seen.append)
    jobs = kubernetes_api.TrainJobs(None, stop=threading.Event(), patience=1)
    (configuration,) = seen
    assert (jobs.namespace, configuration.host) == ("the-namespace", "https://10.0.0.1:443")
    assert configuration.get_api_key_with_prefix("authorization").split() == ["bearer", "the-token"]


# The rights


def test_the_role_has_the_rights_that_are_used_and_no_more(api: Api) -> None:
    """All that the adapter ever asks for, from the requests of a job that fails and of one that does not."""
    api.conditions = [None, FAILED]
    api.pods, api.logs = [[pod(0, ended(1, "01"))]], {("job-node-0-0-abcde", False): "bad luck"}
    with pytest.raises(TrainJobFailed):
        run_against(api)
    api.conditions = [("Complete", "", "")]
    run_against(api)
    used = set()
    for request in api.requests:
        group = "trainer.kubeflow.org" if request.path.startswith("/apis") else ""
        below = request.path.split("/namespaces/team/")[1].split("/")
        resource = "/".join([below[0], *below[2:]])
        verb = {"POST": "create", "DELETE": "delete", "GET": "get" if len(below) > 1 else "list"}[request.method]
        used.add((group, resource, verb))
    granted = set()
    for document in yaml.safe_load_all((ROOT / "pipelines/manifests/rbac.yaml").read_text()):
        if document["kind"] == "Role" and document["metadata"]["name"] == "segdistill-trainjobs":
            for rule in document["rules"]:
                granted |= {
                    (group, resource, verb)
                    for group in rule["apiGroups"]
                    for resource in rule["resources"]
                    for verb in rule["verbs"]
                }
    assert granted == used
