"""The distillation methods, by name.

Importing this package imports no torch: a method's module is loaded when it is asked for. To add a method, write its
file, its line here, and its formula once more in tests/contracts/formulas.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from segdistill.config import parse
from segdistill.errors import UserError, nearest

if TYPE_CHECKING:
    from segdistill.methods.method import Method
    from segdistill.models.outputs import ModelInfo

METHODS = {
    "kd": "segdistill.methods.kd:PixelWise",
    "apd": "segdistill.methods.apd:AdaptivePerspective",
    "at": "segdistill.methods.at:AttentionTransfer",
    "c2vkd": "segdistill.methods.c2vkd:CNNToViT",
    "cirkd": "segdistill.methods.cirkd:CrossImageRelations",
    "cwd": "segdistill.methods.cwd:ChannelWise",
    "dist": "segdistill.methods.dist:Correlation",
    "dkd": "segdistill.methods.dkd:Decoupled",
    "fitnet": "segdistill.methods.fitnet:FeatureRegression",
    "ifvd": "segdistill.methods.ifvd:IntraClassVariation",
    "mgd": "segdistill.methods.mgd:MaskedGeneration",
    "pseudo": "segdistill.methods.pseudo:PseudoLabels",
    "skd": "segdistill.methods.skd:Structured",
    "dml": "segdistill.methods.dml:MutualLearning",
    "hfd_bsd": "segdistill.methods.hfd_bsd:CollaborativeLearning",
    "kdcl": "segdistill.methods.kdcl:CollaborativeEnsemble",
}


def load(name: str) -> type[Method]:
    """The class of a method in the table."""
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]


def parse_method(data: Any, where: str) -> tuple[type[Method], Any]:
    """The class and the config of one entry of an experiment's list of methods.

    Args:
        data: ``{"name": "kd", "temperature": 2.0}``, as params.yaml gives it; what is absent has the method's default.
        where: the dotted path of ``data``, for messages.

    Raises:
        UserError: the first mistake, with its dotted path and the nearest valid name.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected a mapping such as {{name: kd}}, not {data!r}")
    if "name" not in data:
        raise UserError(f"{where}.name: missing; it says which method this is; allowed: {', '.join(METHODS)}")
    name = data["name"]
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(f"{where}.name: unknown method {name!r}{nearest(str(name), METHODS)}")
    method = load(name)
    return method, parse(method.Config, dict(data), where)


def build_offline(configs: Sequence[Any], student: ModelInfo, teacher: ModelInfo) -> dict[str, Method]:
    """The methods by which a frozen teacher teaches one student.

    Args:
        configs: what :func:`parse_method` gave.

    Returns:
        Methods by name, in order, without those of weight 0; the second of a name is ``<name>-2``.

    Raises:
        UserError: a method that takes co-trained students, or a pair that a method is not defined for.
    """
    _require_one_label_set({"student": student, "teacher": teacher})
    return _build(configs, "offline", (student, teacher))


def build_online(configs: Sequence[Any], peers: Mapping[str, ModelInfo]) -> dict[str, Method]:
    """The methods by which co-trained students, by name, teach each other; see :func:`build_offline`."""
    _require_one_label_set(peers)
    return _build(configs, "online", (peers,))


def _build(configs: Sequence[Any], kind: str, models: tuple[Any, ...]) -> dict[str, Method]:
    methods: dict[str, Method] = {}
    for config in configs:
        if not config.weight:  # switched off: it costs nothing
            continue
        method: Any = load(config.name)
        if method.kind != kind:
            takes = {"offline": "a frozen teacher and one student", "online": "several co-trained students"}
            raise UserError(f"method '{config.name}' takes {takes[method.kind]}, not {takes[kind]}")
        copies = sum(key.split("-")[0] == config.name for key in methods)
        methods[f"{config.name}-{copies + 1}" if copies else config.name] = method(config, *models)
    return methods


def _require_one_label_set(models: Mapping[str, ModelInfo]) -> None:
    counts = {name: model.num_classes for name, model in models.items()}
    if len(set(counts.values())) > 1:
        networks = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"networks that teach each other need the same classes, not as many as: {networks}")
