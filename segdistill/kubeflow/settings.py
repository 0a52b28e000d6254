"""What pods are given, whoever starts them: the settings that ``pipelines/cluster.yaml`` and a TrainJob share."""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from segdistill.adapters.kubernetes_values import DataKey, Key, LabelValue, ObjectName, Variable
from segdistill.config import config
from segdistill.errors import brief

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
class Resources:
    """What a pod asks of its node, and what it may use there."""

    cpu_request: Cpu
    cpu_limit: Cpu
    memory_request: Memory
    memory_limit: Memory

    @model_validator(mode="after")
    def _requests_within_limits(self) -> Self:
        for name in ("cpu", "memory"):
            request, limit = getattr(self, f"{name}_request"), getattr(self, f"{name}_limit")
            if amount(request) > amount(limit):
                raise ValueError(f"{name}_request {request} is above {name}_limit {limit}")
        return self


@config
class Reference:
    """Keys of a config map or a secret, and the environment variables that they become."""

    name: ObjectName
    optional: bool
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
    """Where Kueue has it wait, and before whom."""

    name: LabelValue
    priority_class: LabelValue | None  # a WorkloadPriorityClass

    @property
    def labels(self) -> dict[str, str]:
        """What Kueue reads."""
        return {QUEUE: self.name} | ({PRIORITY: self.priority_class} if self.priority_class else {})


@config
class Volume:
    """A persistent volume, by its claim, and where containers see it."""

    claim: ObjectName
    path: Annotated[str, Field(pattern="^/.")]


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
