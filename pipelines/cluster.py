"""What a task asks of the cluster, read from ``pipelines/cluster.yaml``, which says what each setting means.

All of it is fixed when the pipeline is compiled, but for the accelerator's type and count, which a run may change: of
those it has the defaults.
"""

import json
import re
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from kfp import dsl, kubernetes
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from components.images import TRAIN
from segdistill import environment
from segdistill.adapters.kubernetes_values import DataKey, Key, LabelValue, ObjectName, Variable
from segdistill.config import config, parse, read_yaml
from segdistill.errors import UserError, brief
from segdistill.kubeflow.trainjob import Certificates, Queue

DEFAULT = Path(__file__).with_name("cluster.yaml")
# By default KFP tries nothing again once an hour has passed since the first attempt began. Training takes longer; what
# bounds it is the number of attempts, and the timeout of each.
RETRY_WINDOW = f"{30 * 24 * 3600}s"
SOONER = 600  # seconds
# What the MLflow plugin of KFP's server sets in a container. A variable that both it and a reference of ours set is
# refused by the API server, and the pod never starts.
OF_THE_PLUGIN = (
    *environment.OF_KFP, "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
)  # fmt: skip
UNITS = {"": 1.0, "m": 1e-3} | {
    letter + suffix: base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("", 1e3), ("i", 2.0**10))
}


def _amount(text: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]*)(\w*)", text).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def _checked(pattern: str, examples: str, most: float) -> AfterValidator:
    def check(text: str) -> str:
        if len(text) > 20 or not re.fullmatch(pattern, text, re.ASCII) or not 0 < _amount(text) <= most:
            raise ValueError(f"'{brief(text)}' is not an amount; write it like {examples}")
        return text

    return AfterValidator(check)


AsText = BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)  # YAML reads 4 as a number
Cpu = Annotated[str, AsText, _checked(r"\d+m|\d+(\.\d+)?", "4, 0.5 or 500m", 10_000)]
Memory = Annotated[str, AsText, _checked(r"\d+(\.\d+)?([KMGT]i?)?", "512Mi or 16Gi", 2**50)]
Seconds = Annotated[int, Field(gt=0, le=10**8)]
Id = Annotated[int, Field(gt=0, le=2**31 - 1)]  # 0 is root
Kind = Literal["data", "train", "report"]  # of task


@config
class Security:
    """Who a container runs as."""

    user: Id
    group: Id


@config
class Resources:
    """What one kind of task asks of a node."""

    cpu_request: Cpu
    cpu_limit: Cpu
    memory_request: Memory
    memory_limit: Memory
    timeout_seconds: Seconds  # of one attempt

    @model_validator(mode="after")
    def _requests_within_limits(self) -> "Resources":
        for name in ("cpu", "memory"):
            request, limit = getattr(self, f"{name}_request"), getattr(self, f"{name}_limit")
            if _amount(request) > _amount(limit):
                raise ValueError(f"{name}_request {request} is above {name}_limit {limit}")
        return self


@config
class Tasks:
    """The kinds of tasks."""

    data: Resources
    train: Resources
    report: Resources


@config
class Toleration:
    """A taint that a task bears."""

    key: Key
    value: LabelValue | None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


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
class Reference:
    """Keys of a config map or a secret that become environment variables."""

    name: ObjectName
    optional: bool
    tasks: Annotated[list[Kind], Field(min_length=1)]
    keys: Annotated[dict[DataKey, Variable], Field(min_length=1)]

    def without(self, variables: Collection[str]) -> "Reference | None":
        """What is left of it; None if nothing is."""
        keys = {key: variable for key, variable in self.keys.items() if variable not in variables}
        return replace(self, keys=keys) if keys else None


@config
class KueueQueue(Queue):
    """Where Kueue has the pods of some kinds of tasks wait."""

    tasks: Annotated[list[Kind], Field(min_length=1)]


@config
class Workspace:
    """A persistent volume, by its claim, and where a container sees it."""

    claim: ObjectName
    path: Annotated[str, Field(pattern="^/.")]
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
    parallel_jobs: Annotated[int, Field(gt=0, le=100_000)] | None
    retries: Retries
    labels: dict[Key, LabelValue]
    annotations: dict[Key, str]
    queue: KueueQueue | None
    mlflow: Literal["config-map", "injected"]
    config_maps: list[Reference]
    secrets: list[Reference]
    certificates: Certificates | None
    workspace: Workspace | None

    @property
    def on_nodes(self) -> bool:
        """Whether training runs on several nodes."""
        return self.accelerator is not None and self.accelerator.nodes > 1

    def referred(self, references: list[Reference], kind: Kind) -> list[Reference]:
        """The config maps or secrets whose keys a container of this kind of task gets, and those keys."""
        left_out = OF_THE_PLUGIN if self.mlflow == "injected" else ()
        parts = [one.without(left_out) for one in references if kind in one.tasks]
        return [part for part in parts if part is not None]

    @model_validator(mode="after")
    def _each_variable_once(self) -> "Cluster":
        for kind in get_args(Kind):
            references = self.referred(self.config_maps, kind) + self.referred(self.secrets, kind)
            names = [name for one in references for name in one.keys.values()]
            names += self.certificates.variables if self.certificates else []
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"the variable {name} is given twice to tasks of the kind '{kind}'")
                if name.startswith("SEGDISTILL_"):
                    raise ValueError(f"the variable {name} is given to tasks by the pipeline itself")
        return self

    @model_validator(mode="after")
    def _several_nodes_share_a_volume(self) -> "Cluster":
        if self.on_nodes and self.workspace is None:
            raise ValueError("accelerator.nodes above 1 needs a workspace, a volume that all nodes mount")
        return self

    @model_validator(mode="after")
    def _shared_memory_fits(self) -> "Cluster":
        if _amount(self.shared_memory) >= _amount(self.tasks.train.memory_limit):
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
        """How many jobs run at a time; None: as many as there is room for."""
        return self.cluster.parallel_jobs if self.cluster else None

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
                operator: Literal["Equal", "Exists"] = "Exists" if taint.value is None else "Equal"
                kubernetes.add_toleration(task, taint.key, operator, taint.value, taint.effect)
        task.set_accelerator_type(task.inputs["accelerator"]).set_accelerator_limit(task.inputs["accelerators"])
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=asked.shared_memory)
        if asked.workspace is not None:
            task.set_env_variable("SEGDISTILL_WORK", f"{asked.workspace.path}/work")
        return self._place(task, asked, "train")

    def _place(
        self, task: dsl.PipelineTask, asked: Cluster, kind: Kind, resources: Resources | None = None
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
        for item in asked.referred(asked.config_maps, kind):
            kubernetes.use_config_map_as_env(task, item.name, item.keys, optional=item.optional)
        for item in asked.referred(asked.secrets, kind):
            kubernetes.use_secret_as_env(task, item.name, item.keys, optional=item.optional)
        return task


def _trainjob(asked: Cluster) -> dict[str, Any]:
    """What a task that trains on several nodes is to ask of Kubeflow Trainer: the fields that no run changes."""
    accelerator, train, workspace = asked.accelerator, asked.tasks.train, asked.workspace
    assert accelerator is not None and workspace is not None  # or it would not be on nodes

    def given(references: list[Reference]) -> list[dict[str, Any]]:
        return [{"name": one.name, "keys": one.keys, "optional": one.optional} for one in references]

    # KFP's plugin gives its variables to the pods of KFP. The waiting one hands them on, but for a name and a password.
    left_out = environment.OF_KFP if asked.mlflow == "injected" else ()
    secrets = [part for one in asked.secrets if "train" in one.tasks and (part := one.without(left_out))]
    queue = asked.queue if asked.queue is not None and "train" in asked.queue.tasks else None

    return {
        "runtime": accelerator.runtime,
        "image": TRAIN,
        "nodes": accelerator.nodes,
        "resources": {
            "cpu_request": train.cpu_request,
            "cpu_limit": train.cpu_limit,
            "memory_request": train.memory_request,
            "memory_limit": train.memory_limit,
        },
        "env": {"SEGDISTILL_WORK": f"{workspace.path}/work"},
        "secrets": given(secrets),
        "config_maps": given(asked.referred(asked.config_maps, "train")),
        "certificates": asdict(asked.certificates) if asked.certificates else None,
        "image_pull_secrets": asked.image_pull_secrets,
        "labels": asked.labels,
        "annotations": asked.annotations,
        "queue": {"name": queue.name, "priority_class": queue.priority_class} if queue else None,
        "volume": {"claim": workspace.claim, "path": workspace.path},
        "shared_memory": asked.shared_memory,
        "node_selector": accelerator.node_selector,
        "tolerations": [asdict(taint) for taint in accelerator.tolerations],
        "user": asked.security.user,
        "group": asked.security.group,
        "timeout_seconds": max(1, train.timeout_seconds - SOONER),  # so that the job ends before its attempt does
    }
