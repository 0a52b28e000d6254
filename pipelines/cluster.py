"""What tasks ask of the cluster: the content of ``pipelines/cluster.yaml``, which says what each setting means."""

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipelines.kubernetes_values import DataKey, Key, LabelValue, ObjectName, Variable
from segdistill import environment
from segdistill.config import config, parse, read_yaml
from segdistill.errors import UserError, brief

DEFAULT = Path(__file__).with_name("cluster.yaml")
MOST_JOBS = 64  # of one cohort
# Variables of Trainer's controller, whose webhook refuses them among others'.
OF_TRAINER = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
# What the MLflow plugin of KFP's server sets in a container. A variable that both it and a reference of ours set is
# refused by the API server, and the pod never starts.
OF_THE_PLUGIN = (
    *environment.OF_KFP, "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
)  # fmt: skip

Kind = Literal["data", "train", "report"]  # of task
Reader = Literal[Kind, "tune"]  # of a reference: tasks of a kind, or those that share the trials of a tuning

QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"  # labels that Kueue reads
UNITS = {"": 1.0, "m": 1e-3} | {
    letter + suffix: base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("", 1e3), ("i", 2.0**10))
}


def amount(text: str) -> float:
    """A quantity of Kubernetes as a number: of processors, or of bytes."""
    number, unit = re.fullmatch(r"([0-9.]*)(\w*)", text).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def _checked(pattern: str, examples: str, most: float) -> AfterValidator:
    def check(text: str) -> str:
        if len(text) > 20 or not re.fullmatch(pattern, text, re.ASCII) or not 0 < amount(text) <= most:
            raise ValueError(f"'{brief(text)}' is not an amount; write it like {examples}")
        return text

    return AfterValidator(check)


AsText = BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)  # YAML reads 4 as a number
Cpu = Annotated[str, AsText, _checked(r"\d+m|\d+(\.\d+)?", "4, 0.5 or 500m", 10_000)]
Memory = Annotated[str, AsText, _checked(r"\d+(\.\d+)?([KMGT]i?)?", "512Mi or 16Gi", 2**50)]
Seconds = Annotated[int, Field(gt=0, le=10**8)]
Id = Annotated[int, Field(gt=0, le=2**31 - 1)]  # of a user or a group; 0 is root


@config
class Security:
    """Who a container runs as."""

    user: Id
    group: Id


@config
class Task:
    """What one kind of task asks of its node, and what it may use there."""

    cpu_request: Cpu
    cpu_limit: Cpu
    memory_request: Memory
    memory_limit: Memory
    timeout_seconds: Seconds  # of one attempt

    @model_validator(mode="after")
    def _requests_within_limits(self) -> Self:
        for name in ("cpu", "memory"):
            request, limit = getattr(self, f"{name}_request"), getattr(self, f"{name}_limit")
            if amount(request) > amount(limit):
                raise ValueError(f"{name}_request {request} is above {name}_limit {limit}")
        return self


@config
class Tasks:
    """The kinds of tasks."""

    data: Task
    train: Task
    report: Task


@config
class Toleration:
    """A taint that pods bear; without a value, any."""

    key: Key
    value: LabelValue | None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]

    @property
    def operator(self) -> Literal["Equal", "Exists"]:
        """As Kubernetes writes it."""
        return "Exists" if self.value is None else "Equal"


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
    """Keys of a config map or a secret, the environment variables that they become, and for which tasks."""

    name: ObjectName
    optional: bool
    tasks: Annotated[list[Reader], Field(min_length=1)]
    keys: Annotated[dict[DataKey, Variable], Field(min_length=1)]

    def without(self, variables: Collection[str]) -> Self | None:
        """What is left of it; None if nothing is."""
        keys = {key: variable for key, variable in self.keys.items() if variable not in variables}
        return replace(self, keys=keys) if keys else None  # type: ignore[type-var]


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
    """Where Kueue has the pods of some kinds of tasks wait, and before whom."""

    name: LabelValue
    priority_class: LabelValue | None  # a WorkloadPriorityClass
    tasks: Annotated[list[Kind], Field(min_length=1)]


@config
class Workspace:
    """A persistent volume by its claim, where containers see it, and whether the data set lies there, too."""

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
    jobs_per_gpu: Annotated[int, Field(gt=0, le=MOST_JOBS)]
    parallel_cohorts: Annotated[int, Field(gt=0, le=100_000)] | None
    retries: Retries
    labels: dict[Key, LabelValue]
    annotations: dict[Key, str]
    queue: Queue | None
    mlflow: Literal["config-map", "injected"]
    config_maps: list[Reference]
    secrets: list[Reference]
    certificates: Certificates | None
    workspace: Workspace | None

    @property
    def on_nodes(self) -> bool:
        """Whether training runs on several nodes."""
        return self.accelerator is not None and self.accelerator.nodes > 1

    def queue_labels(self, kind: Kind) -> dict[str, str]:
        """The labels by which Kueue has a pod, or a job, wait."""
        if self.queue is None or kind not in self.queue.tasks:
            return {}
        priority = {PRIORITY: self.queue.priority_class} if self.queue.priority_class else {}
        return {QUEUE: self.queue.name} | priority

    def referred(self, references: list[Reference], reader: Reader) -> list[Reference]:
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
                if name in OF_TRAINER:
                    raise ValueError(f"the variable {name} is Kubeflow Trainer's own")
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
