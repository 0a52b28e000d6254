"""A training stage on several nodes, as a TrainJob of Kubeflow Trainer v2; ``trainjob_run.py`` has it run.

The API is ``trainer.kubeflow.org/v1alpha1`` as of Trainer 2.3. What belongs to the pods stands in ``runtimePatches``,
which Trainer 2.2 brought in the place of ``podTemplateOverrides``. The API server is asked to refuse a field that it
does not know: by default it drops it, and on an older Trainer the job would run without its volume.
"""

import re
from collections.abc import Mapping
from dataclasses import field
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from segdistill.adapters.kubernetes_values import Key, LabelValue, ObjectName, Variable
from segdistill.config import config
from segdistill.kubeflow.settings import (
    Certificates,
    Id,
    Memory,
    Queue,
    Reference,
    Resources,
    Seconds,
    Toleration,
    Volume,
)

# JobSet refuses a job whose pods' names would be longer than 63: <name>-node-0-<999 at most>-<5 random characters>.
LONGEST_NAME = 63 - len("-node-0-999-abcde")
MOST_NODES = 1000
NODE = "node"  # Trainer's word for its replicated job, and for the container in it, that runs the training
OURS = {"app.kubernetes.io/managed-by": "segdistill"}
MANAGER = "pipelines.segdistill/task"  # Trainer's webhook asks for a domain and a path, which the CRD does not say
# The controller's own variables, which the webhook refuses among ours.
RESERVED = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")

# Each node runs this and the arguments of a module. The controller's variables (RESERVED) say the rest: torch reads
# them where the command line does not.
LAUNCH = ("python", "-m", "torch.distributed.run", "-m")

Count = Annotated[int, Field(gt=0)]


@config
class TrainJob:
    """What the job is."""

    name: Annotated[str, Field(pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=LONGEST_NAME)]  # see job_name
    namespace: ObjectName | None = None  # None: the pod's own
    runtime: ObjectName = "torch-distributed"
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    image: Annotated[str, Field(min_length=1, max_length=500)]
    command: Annotated[list[str], Field(min_length=1)]  # as [*LAUNCH, "some.module"]
    args: list[str] = field(default_factory=list)
    nodes: Annotated[int, Field(gt=0, le=MOST_NODES)]
    processes: Count  # on each node
    resources: Resources  # of one node
    accelerator: Key | None = None  # as in nvidia.com/gpu
    accelerators: Count = 1
    env: dict[Variable, str] = field(default_factory=dict)  # literal values; never a secret
    secrets: list[Reference] = field(default_factory=list)
    config_maps: list[Reference] = field(default_factory=list)
    volume: Volume  # that every node can write to (ReadWriteMany)
    shared_memory: Memory | None = None  # the size of /dev/shm, which counts as memory of the pod
    certificates: Certificates | None = None
    image_pull_secrets: list[ObjectName] = field(default_factory=list)
    node_selector: dict[Key, LabelValue] = field(default_factory=dict)
    tolerations: list[Toleration] = field(default_factory=list)
    user: Id
    group: Id
    queue: Queue | None = None  # Kueue's
    labels: dict[Key, LabelValue] = field(default_factory=dict)  # of the job and of its pods
    annotations: dict[Key, str] = field(default_factory=dict)  # likewise
    timeout_seconds: Seconds  # the time it may run; waiting in Kueue's queue does not count

    @model_validator(mode="after")
    def _each_variable_once(self) -> "TrainJob":
        # The API takes a name once, and Trainer its own from nobody else.
        names = [variable["name"] for variable in _environment(self)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the environment variable {name} is given twice")
            if name in RESERVED:
                raise ValueError(f"the environment variable {name} is Trainer's own")
        return self


def job_name(pipeline_run: str, label: str, parameters: str) -> str:
    """A name under which every attempt of one task finds the same job, and no other task does.

    Args:
        pipeline_run: the orchestrator's run.
        label: the stage, and its cohort if it has one.
        parameters: all else that makes it another task.
    """
    fingerprint = sha256("\0".join((pipeline_run, label, parameters)).encode()).hexdigest()[:12]
    readable = re.sub("[^a-z0-9]+", "-", f"segdistill-{label}".lower())
    return f"{readable[: LONGEST_NAME - len(fingerprint) - 1].strip('-')}-{fingerprint}"


def manifest(job: TrainJob) -> dict[str, Any]:
    """The job as the API takes it."""
    asked = job.resources
    accelerators = {job.accelerator: str(job.accelerators)} if job.accelerator else {}
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
    trainer |= {key: value for key, value in (("args", job.args), ("env", _environment(job))) if value}
    metadata = {"name": job.name, **_metadata(job, job.queue.labels if job.queue else {})}
    patch = {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": _pod(job)}}}]}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata | ({"namespace": job.namespace} if job.namespace else {}),
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": job.runtime_kind, "name": job.runtime},
            "trainer": trainer,
            "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": patch}}}],
            # It also ends a job that nobody waits for any more.
            "activeDeadlineSeconds": job.timeout_seconds,
        },
    }


def _metadata(job: TrainJob, labels: Mapping[str, str]) -> dict[str, Any]:
    """Of the job or of its pods, with labels of its own."""
    metadata: dict[str, Any] = {"labels": {**job.labels, **labels, **OURS}}
    return metadata | ({"annotations": job.annotations} if job.annotations else {})


def _environment(job: TrainJob) -> list[dict[str, Any]]:
    literal = [*job.env.items(), *(job.certificates.environment.items() if job.certificates else [])]
    environment: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in literal]
    for kind, references in (("configMapKeyRef", job.config_maps), ("secretKeyRef", job.secrets)):
        for item in references:
            for key, variable in item.keys.items():
                source = {kind: {"name": item.name, "key": key, "optional": item.optional}}
                environment.append({"name": variable, "valueFrom": source})
    return environment


def _pod(job: TrainJob) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": "workspace", "persistentVolumeClaim": {"claimName": job.volume.claim}},
    ]
    mounts = [{"name": "workspace", "mountPath": job.volume.path}]
    if job.shared_memory:
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": job.shared_memory}})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    if job.certificates:
        volumes.append({"name": "certificates", "configMap": {"name": job.certificates.config_map}})
        mounts.append({"name": "certificates", "mountPath": job.certificates.path})
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
    if job.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in job.image_pull_secrets]
    if job.node_selector:
        spec["nodeSelector"] = job.node_selector
    if job.tolerations:
        spec["tolerations"] = [
            {"key": taint.key, "operator": taint.operator, "effect": taint.effect}
            | ({} if taint.value is None else {"value": taint.value})
            for taint in job.tolerations
        ]
    # A mesh's proxy would stand between the processes, and never end.
    return {"metadata": _metadata(job, {"sidecar.istio.io/inject": "false"}), "spec": spec}
