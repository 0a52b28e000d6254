"""A training stage on several nodes, as a TrainJob of Kubeflow Trainer v2; ``trainjob_run.py`` has it run.

The API is ``trainer.kubeflow.org/v1alpha1`` as of Trainer 2.3. What belongs to the pods stands in ``runtimePatches``,
which Trainer 2.2 brought in the place of ``podTemplateOverrides``. The API server is asked to refuse a field that it
does not know: by default it drops it, and on an older Trainer the job would run without its volume.
"""

import re
from dataclasses import field
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from segdistill.adapters.kubernetes_values import DataKey, Key, LabelValue, ObjectName, Variable
from segdistill.config import config

# JobSet refuses a job whose pods' names would be longer than 63: <name>-node-0-<999 at most>-<5 random characters>.
LONGEST_NAME = 63 - len("-node-0-999-abcde")
MOST_NODES = 1000
NODE = "node"  # Trainer's word for its replicated job, and for the container in it, that runs the training
OURS = {"app.kubernetes.io/managed-by": "segdistill"}
MANAGER = "pipelines.segdistill/task"  # Trainer's webhook asks for a domain and a path, which the CRD does not say
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"  # labels that Kueue reads
# The controller's own variables, which the webhook refuses among ours.
RESERVED = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")

# Each node runs this and the arguments of a module. The controller's variables (RESERVED) say the rest: torch reads
# them where the command line does not.
LAUNCH = ("python", "-m", "torch.distributed.run", "-m")

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(gt=0)]


@config
class Resources:
    """What one node asks for, in the units of Kubernetes."""

    cpu_request: Text
    cpu_limit: Text
    memory_request: Text
    memory_limit: Text
    accelerator: Key | None = None  # as in nvidia.com/gpu
    accelerators: Count = 1


@config
class Reference:
    """Keys of a secret or a config map, and the environment variables that they become."""

    name: ObjectName
    keys: dict[DataKey, Variable]
    optional: bool = False


@config
class Certificates:
    """Those of private authorities: a config map that containers see as a folder, and what libraries are told of it."""

    config_map: ObjectName
    key: DataKey  # of the config map, and so the file's name
    path: Annotated[str, Field(pattern="^/.*[^/]$")]  # the folder
    variables: Annotated[list[Variable], Field(min_length=1)]  # that name the file

    @property
    def environment(self) -> dict[str, str]:
        """The variables with their value."""
        return dict.fromkeys(self.variables, f"{self.path}/{self.key}")


@config
class Queue:
    """Where Kueue has it wait, and before whom."""

    name: LabelValue
    priority_class: LabelValue | None  # a WorkloadPriorityClass

    @property
    def labels(self) -> dict[str, str]:
        """What Kueue reads."""
        return {QUEUE: self.name} | ({PRIORITY: self.priority_class} if self.priority_class else {})


@config
class Volume:
    """A claim that every node can write to (ReadWriteMany), and where containers see it."""

    claim: ObjectName
    path: Annotated[str, Field(pattern="^/.")]


@config
class Toleration:
    """A taint that the pods bear; without a value, any."""

    key: Key
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


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
    resources: Resources
    env: dict[Variable, str] = field(default_factory=dict)  # literal values; never a secret
    secrets: list[Reference] = field(default_factory=list)
    config_maps: list[Reference] = field(default_factory=list)
    volume: Volume
    shared_memory: Text | None = None  # the size of /dev/shm, which counts as memory of the pod
    certificates: Certificates | None = None
    image_pull_secrets: list[ObjectName] = field(default_factory=list)
    node_selector: dict[Key, LabelValue] = field(default_factory=dict)
    tolerations: list[Toleration] = field(default_factory=list)
    user: Count
    group: Count
    queue: Queue | None = None  # Kueue's
    labels: dict[Key, LabelValue] = field(default_factory=dict)  # of the job and of its pods
    annotations: dict[Key, str] = field(default_factory=dict)  # likewise
    timeout_seconds: Count  # the time it may run; waiting in Kueue's queue does not count

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
    trainer |= {key: value for key, value in (("args", job.args), ("env", _environment(job))) if value}
    metadata: dict[str, Any] = {
        "name": job.name, "labels": {**job.labels, **(job.queue.labels if job.queue else {}), **OURS},
    }  # fmt: skip
    if job.annotations:
        metadata["annotations"] = job.annotations
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
            {"key": taint.key, "operator": "Exists", "effect": taint.effect}
            if taint.value is None
            else {"key": taint.key, "operator": "Equal", "value": taint.value, "effect": taint.effect}
            for taint in job.tolerations
        ]
    # A mesh's proxy would stand between the processes, and never end.
    metadata: dict[str, Any] = {"labels": {**job.labels, **OURS, "sidecar.istio.io/inject": "false"}}
    if job.annotations:
        metadata["annotations"] = job.annotations
    return {"metadata": metadata, "spec": spec}
