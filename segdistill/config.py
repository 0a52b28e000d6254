"""Configuration: frozen dataclasses, checked once where they enter.

A stage's config has no defaults, since ``params.yaml`` says what we run; a method's config defaults to its paper's
values. An unknown or mistyped key is a :class:`UserError` with the dotted path and the nearest valid name.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import pydantic
import yaml
from pydantic.dataclasses import dataclass as pydantic_dataclass

from segdistill.errors import UserError, nearest

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass whose values pydantic checks and whose unknown keys are errors."""
    settings = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
    return pydantic_dataclass(cls, frozen=True, kw_only=True, config=settings)  # type: ignore[return-value]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; YAML 1.1's trap that ``1e-4`` is a string is undone by the typed configs.

    Raises:
        UserError: the file is absent, not YAML, or not a mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(data).__name__}")
    return data


def parse(cls: type[T], data: Any, where: str) -> T:
    """Builds a config from plain data.

    Args:
        cls: a ``@config`` class, or any type pydantic can check (a union of configs, a list of them).
        data: what YAML or JSON gave.
        where: the dotted path of ``data``, for messages.

    Raises:
        UserError: the first mistake, with its dotted path, and for an unknown key the nearest valid one.
    """
    try:
        return pydantic.TypeAdapter(cls).validate_python(data)
    except pydantic.ValidationError as error:
        raise UserError(_sentence(error.errors(include_url=False), cls, where)) from None


def to_dict(value: Any) -> Any:
    """Plain data (dict, list, str, number) of a config, the inverse of :func:`parse`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``: the dotted names that trackers log."""
    if isinstance(data, Mapping) and data:
        items = [(str(key), item) for key, item in data.items()]
    elif isinstance(data, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in data):
        items = [(str(index), item) for index, item in enumerate(data)]
    else:
        return {prefix: data}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else key))
    return flat


def _sentence(errors: list[Any], cls: Any, where: str) -> str:
    # A mistyped key shows twice, as unknown and as missing: name the unknown one, its neighbour is the cure.
    unknown = [error for error in errors if error["type"] in ("unexpected_keyword_argument", "extra_forbidden")]
    error = (unknown or errors)[0]
    location, owner = _walk(cls, error["loc"])
    path = ".".join([part for part in (where, *location) if part])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        names = [field.name for field in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
        return f"{path}: unknown key{nearest(location[-1], names)}"
    if error["type"] == "missing":
        return f"{path}: missing; it has no default"
    if error["type"] == "union_tag_invalid":
        tag, tags = error["ctx"]["tag"], [name.strip(" '") for name in error["ctx"]["expected_tags"].split(",")]
        return f"{path}.name: unknown name '{tag}'{nearest(tag, tags)}"
    if error["type"] == "union_tag_not_found":
        return f"{path}.name: missing; it says which kind this is"
    if error["type"] == "literal_error":
        allowed = error["ctx"]["expected"]
        return f"{path}: {error['input']!r} is not allowed; allowed: {allowed}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    shown = "" if error["type"] == "value_error" else f", not {error['input']!r}"
    return f"{path}: {message[0].lower()}{message[1:]}{shown}"


def _walk(cls: Any, location: tuple[Any, ...]) -> tuple[list[str], Any]:
    """The dotted parts of a pydantic location, without the union tags in it, and the class that owns the last part."""
    parts: list[str] = []
    owner, current = cls, cls
    for step in location:
        members = _members(current)
        fields: dict[str, Any] = {}
        for member in members:
            if dataclasses.is_dataclass(member):
                hints = typing.get_type_hints(member)
                fields.update({field.name: hints[field.name] for field in dataclasses.fields(member)})
        tagged = [member for member in members if step in (_tag(member), getattr(member, "__name__", None))]
        if step not in fields and tagged:
            current = owner = tagged[0]
            continue
        parts.append(str(step))
        owner = next((member for member in members if dataclasses.is_dataclass(member)), current)
        inner = [arg for member in members for arg in typing.get_args(member) if arg is not Ellipsis]
        current = fields.get(step, inner[-1] if inner else Any)
    return parts, owner


def _members(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for arg in typing.get_args(annotation) for member in _members(arg)]
    return [annotation]


def _tag(member: Any) -> Any:
    if not dataclasses.is_dataclass(member):
        return None
    literal = typing.get_type_hints(member).get("name")
    return typing.get_args(literal)[0] if typing.get_origin(literal) is typing.Literal else None
