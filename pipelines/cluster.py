"""What a task asks of the cluster, read from ``pipelines/cluster.yaml``, which says what each setting means.

All of it is fixed when the pipeline is compiled, but for the accelerator's type and count, which a run may change: of
those it has the defaults.
"""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from kfp import dsl, kubernetes
from pydantic import Field, model_validator

from components.images import TRAIN
from segdistill import environment
from segdistill.adapters.kubernetes_values import Key, LabelValue, ObjectName
from segdistill.config import config, parse, read_yaml
from segdistill.errors import UserError
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
    amount,
)

DEFAULT = Path(__file__).with_name("cluster.yaml")
# By default KFP tries nothing again once an hour has passed since the first attempt began. Training takes longer; what
# bounds it is the number of attempts, and the timeout of each.
RETRY_WINDOW = f"{30 * 24 * 3600}s"
SOONER = 600  # seconds
MOST_JOBS = 64  # of one cohort
# What the MLflow plugin of KFP's server sets in a container. A variable that both it and a reference of ours set is
# refused by the API server, and the pod never starts.
OF_THE_PLUGIN = (
    *environment.OF_KFP, "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
)  # fmt: skip

Kind = Literal["data", "train", "report"]  # of task
Reader = Literal[Kind, "tune"]  # of a reference: tasks of a kind, or those that share the trials of a tuning


@config
class Security:
    """Who a container runs as."""

    user: Id
    group: Id


@config
class Task(Resources):
    """What one kind of task asks of a node."""

    timeout_seconds: Seconds  # of one attempt


@config
class Tasks:
    """The kinds of tasks."""

    data: Task
    train: Task
    report: Task


@config
class Accelerator:
    """What a task that trains or evaluates runs on."""

    type: Key
    count: Annotated[int, Field(gt=0, le=1024)]
    nodes: Annotated[int, Field(gt=0, le=1000)]
    runtime: ObjectName
    node_selector: dict[Key, LabelValue]
    tolerations: list[Toleration]


@config
class Retries:
    """What happens after a failed attempt."""

    count: Annotated[int, Field(ge=0, le=1000)]
    wait_seconds: Annotated[int, Field(ge=0, le=10**6)]
    factor: Annotated[int, Field(ge=1, le=100)]  # Argo reads no other


@config
class TaskReference(Reference):
    """A reference for some kinds of tasks."""

    tasks: Annotated[list[Reader], Field(min_length=1)]


@config
class KueueQueue(Queue):
    """Where Kueue has the pods of some kinds of tasks wait."""

    tasks: Annotated[list[Kind], Field(min_length=1)]


@config
class Workspace(Volume):
    """A volume, and whether the data set lies there, too."""

    share_data: bool


@config
class Cluster:
    """The content of ``pipelines/cluster.yaml``."""

    pull_policy: Literal["Always", "IfNotPresent", "Never"]
    image_pull_secrets: list[ObjectName]
    security: Security
    tasks: Tasks
    accelerator: Accelerator | None
    shared_memory: Memory
    jobs_per_gpu: Annotated[int, Field(gt=0, le=MOST_JOBS)]
    parallel_cohorts: Annotated[int, Field(gt=0, le=100_000)] | None
    retries: Retries
    labels: dict[Key, LabelValue]
    annotations: dict[Key, str]
    queue: KueueQueue | None
    mlflow: Literal["config-map", "injected"]
    config_maps: list[TaskReference]
    secrets: list[TaskReference]
    certificates: Certificates | None
    workspace: Workspace | None

    @property
    def on_nodes(self) -> bool:
        """Whether training runs on several nodes."""
        return self.accelerator is not None and self.accelerator.nodes > 1

    def referred(self, references: list[TaskReference], reader: Reader) -> list[TaskReference]:
        """The config maps or secrets whose keys a container of this kind of task gets, and those keys."""
        left_out = OF_THE_PLUGIN if self.mlflow == "injected" else ()
        parts = [one.without(left_out) for one in references if reader in one.tasks]
        return [part for part in parts if part is not None]

    @model_validator(mode="after")
    def _each_variable_once(self) -> "Cluster":
        for kind in get_args(Kind):
            readers: list[Reader] = [kind, "tune"] if kind != "data" else [kind]
            references = [one for reader in readers for one in self.referred(self.config_maps + self.secrets, reader)]
            names = [name for one in references for name in one.keys.values()]
            names += self.certificates.variables if self.certificates else []
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"the variable {name} is given twice to tasks of the kind '{kind}'")
                if name.startswith("SEGDISTILL_") and name != "SEGDISTILL_TUNE_PASSWORD":
                    raise ValueError(f"the variable {name} is given to tasks by the pipeline itself")
        return self

    @model_validator(mode="after")
    def _several_nodes_share_a_volume(self) -> "Cluster":
        if self.on_nodes and self.workspace is None:
            raise ValueError("accelerator.nodes above 1 needs a workspace, a volume that all nodes mount")
        return self

    @model_validator(mode="after")
    def _shared_memory_fits(self) -> "Cluster":
        if amount(self.shared_memory) >= amount(self.tasks.train.memory_limit):
            limit = self.tasks.train.memory_limit
            raise ValueError(f"shared_memory {self.shared_memory} leaves nothing of tasks.train.memory_limit {limit}")
        return self


def read_cluster(path: Path = DEFAULT) -> Cluster:
    """The settings in a file.

    Raises:
        UserError: the first mistake in it.
    """
    content = read_yaml(path)
    try:
        return parse(Cluster, content, "")
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(': ')}") from None


class Placement:
    """Puts tasks on a cluster, each by its kind; without a cluster, leaves them as they are."""

    def __init__(self, cluster: Cluster | None, *, caching: bool = True) -> None:
        self.cluster, self.caching = cluster, caching

    @property
    def parameters(self) -> dict[str, str]:
        """The pipeline's parameters that are a matter of the cluster.

        KFP's server reads both as text, and sets no limit where the type is empty.
        """
        asked = self.cluster.accelerator if self.cluster else None
        return {
            "accelerator_type": asked.type if asked else "",
            "accelerator_count": str(asked.count) if asked else "0",
        }

    @property
    def parallelism(self) -> int | None:
        """How many cohorts run at a time; None: as many as there is room for."""
        return self.cluster.parallel_cohorts if self.cluster else None

    def data(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A task that reads the data set."""
        return self._place(task, self.cluster, "data") if self.cluster else task

    def report(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A task that reads results."""
        return self._place(task, self.cluster, "report") if self.cluster else task

    def train(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A task that trains or evaluates, on the ``accelerators`` that are among its inputs.

        kfp 2.17.0 hands a parameter into a loop for a task's inputs, and not for its resources alone.
        """
        asked = self.cluster
        if asked is None:
            return task
        if asked.on_nodes:  # this pod only starts the others, and waits
            task.set_env_variable("SEGDISTILL_TRAINJOB", json.dumps(_trainjob(asked), sort_keys=True))
            waiting = replace(asked.tasks.report, timeout_seconds=asked.tasks.train.timeout_seconds)
            return self._place(task, replace(asked, queue=None), "train", waiting)  # the job waits in the queue, not it
        if asked.accelerator is not None:
            for label, value in asked.accelerator.node_selector.items():
                kubernetes.add_node_selector(task, label, value)
            for taint in asked.accelerator.tolerations:
                kubernetes.add_toleration(task, taint.key, taint.operator, taint.value, taint.effect)
        task.set_accelerator_type(task.inputs["accelerator"]).set_accelerator_limit(task.inputs["accelerators"])
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=asked.shared_memory)
        if asked.workspace is not None:
            task.set_env_variable("SEGDISTILL_WORK", f"{asked.workspace.path}/work")
        return self._place(task, asked, "train")

    def with_trials(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A task, placed already, that reads the store of a tuning's trials, which KFP's cache knows nothing of."""
        if self.cluster:
            _refer(task, self.cluster, "tune")
        return task.set_caching_options(False)

    def _place(
        self, task: dsl.PipelineTask, asked: Cluster, kind: Kind, resources: Task | None = None
    ) -> dsl.PipelineTask:
        resources = resources or getattr(asked.tasks, kind)
        task.set_cpu_request(resources.cpu_request).set_cpu_limit(resources.cpu_limit)
        task.set_memory_request(resources.memory_request).set_memory_limit(resources.memory_limit)
        task.set_caching_options(self.caching)
        kubernetes.set_timeout(task, resources.timeout_seconds)
        task.set_retry(
            asked.retries.count,
            backoff_duration=f"{asked.retries.wait_seconds}s",
            backoff_factor=asked.retries.factor,
            backoff_max_duration=RETRY_WINDOW,
        )
        if asked.workspace is not None and (kind == "train" or asked.workspace.share_data):
            kubernetes.mount_pvc(task, asked.workspace.claim, asked.workspace.path)
        if asked.workspace is not None and asked.workspace.share_data:
            task.set_env_variable("SEGDISTILL_SHARED", f"{asked.workspace.path}/shared")
        kubernetes.set_image_pull_policy(task, asked.pull_policy)
        if asked.image_pull_secrets:
            kubernetes.set_image_pull_secrets(task, asked.image_pull_secrets)
        for name, value in asked.labels.items():
            kubernetes.add_pod_label(task, name, value)
        for name, value in asked.annotations.items():
            kubernetes.add_pod_annotation(task, name, value)
        if asked.queue is not None and kind in asked.queue.tasks:
            for name, value in asked.queue.labels.items():
                kubernetes.add_pod_label(task, name, value)
        if asked.certificates is not None:
            kubernetes.use_config_map_as_volume(task, asked.certificates.config_map, asked.certificates.path)
            for name, value in asked.certificates.environment.items():
                task.set_env_variable(name, value)
        if asked.mlflow == "injected":
            task.set_env_variable("SEGDISTILL_MLFLOW", "injected")
        kubernetes.set_security_context(task, asked.security.user, asked.security.group, run_as_non_root=True)
        kubernetes.use_field_path_as_env(task, "SEGDISTILL_PIPELINE_RUN", "metadata.labels['pipeline/runid']")
        _refer(task, asked, kind)
        return task


def _refer(task: dsl.PipelineTask, asked: Cluster, reader: Reader) -> None:
    """Gives a task the variables that are by reference."""
    for item in asked.referred(asked.config_maps, reader):
        kubernetes.use_config_map_as_env(task, item.name, item.keys, optional=item.optional)
    for item in asked.referred(asked.secrets, reader):
        kubernetes.use_secret_as_env(task, item.name, item.keys, optional=item.optional)


def _trainjob(asked: Cluster) -> dict[str, Any]:
    """What a task that trains on several nodes is to ask of Kubeflow Trainer: the fields that no run changes."""
    accelerator, train, workspace = asked.accelerator, asked.tasks.train, asked.workspace
    assert accelerator is not None and workspace is not None  # or it would not be on nodes

    # KFP's plugin gives its variables to the pods of KFP. The waiting one hands them on, but for a name and a password.
    left_out = environment.OF_KFP if asked.mlflow == "injected" else ()
    secrets = [part for one in asked.secrets if "train" in one.tasks and (part := one.without(left_out))]
    queue = asked.queue if asked.queue is not None and "train" in asked.queue.tasks else None

    return {
        "runtime": accelerator.runtime,
        "image": TRAIN,
        "nodes": accelerator.nodes,
        "resources": _as(Resources, train),
        "env": {"SEGDISTILL_WORK": f"{workspace.path}/work"},
        "secrets": [_as(Reference, one) for one in secrets],
        "config_maps": [_as(Reference, one) for one in asked.referred(asked.config_maps, "train")],
        "certificates": asdict(asked.certificates) if asked.certificates else None,
        "image_pull_secrets": asked.image_pull_secrets,
        "labels": asked.labels,
        "annotations": asked.annotations,
        "queue": _as(Queue, queue) if queue else None,
        "volume": _as(Volume, workspace),
        "shared_memory": asked.shared_memory,
        "node_selector": accelerator.node_selector,
        "tolerations": [asdict(taint) for taint in accelerator.tolerations],
        "user": asked.security.user,
        "group": asked.security.group,
        "timeout_seconds": max(1, train.timeout_seconds - SOONER),  # so that the job ends before its attempt does
    }


def _as(kind: type, settings: Any) -> dict[str, Any]:
    """The fields that settings have as a ``kind``, without those of their own."""
    return {one.name: getattr(settings, one.name) for one in fields(kind)}
