"""Configuration: frozen dataclasses, checked once where they enter.

A stage's config has no defaults, since ``params.yaml`` says what we run; a method's config defaults to its paper's
values. An unknown or mistyped key is a :class:`UserError` with the dotted path and the nearest valid name. Nothing is
converted on the way: ``true`` is no number, and ``"8"`` is none either. Every number has a least and a greatest value.
"""

import functools
import json
import math
import re
import types
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
import yaml
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import to_jsonable_python

from segdistill.errors import UserError, brief, nearest
from segdistill.files import MIB, read_text

T = TypeVar("T")

NAME_RULE = "a letter, then up to 39 letters (a-z, A-Z), digits, '_' or '-'"
# Of files and folders that stand beside those of experiments and students.
TAKEN = ("teacher", "metrics", "checksums", "curves", "evaluation", "overlays", "pictures")
_YAML_LIMIT = MIB  # bytes of a file that a person writes
_YAML_NODES = 100_000  # values in it, every use of an anchor counted
_YAML_DEPTH = 50


def _is_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,39}", text):
        raise ValueError(f"'{brief(text)}' cannot be a name; a name is {NAME_RULE}")
    if text.lower() in TAKEN:
        raise ValueError(f"the name '{text}' is taken; these are: {', '.join(TAKEN)}")
    return text


# Of an experiment or a student. It becomes a folder, a file, a word of a shell, a part of a dotted key, a module's name
# and a run's name in MLflow, so that it has to be all of these.
Name = Annotated[str, AfterValidator(_is_name)]
# Of any random generator; all of ours take this many.
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LearningRate = Annotated[float, Field(ge=1e-12, le=100)]
Beta = Annotated[float, Field(ge=0, lt=1)]  # of an average that forgets, such as Adam's


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass whose values pydantic checks and whose unknown keys are errors."""
    settings = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    return pydantic_dataclass(cls, frozen=True, kw_only=True, config=settings)  # type: ignore[return-value]


class _Loader(yaml.SafeLoader):
    """Plain YAML: no dates, and numbers in decimal only, which DVC (YAML 1.2) and PyYAML (1.1) read alike."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            reason = str(error).partition(";")[0] or type(error).__name__
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from None

    def refuse_number(self, node: yaml.ScalarNode) -> Any:
        said = f"'{brief(node.value)}' is no number in plain decimal digits; if it is text, put it in quotes"
        raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*)",
    "tag:yaml.org,2002:float": r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
    # Octal, hexadecimal, base 60 (12:30), infinity: numbers to one reader of YAML, and not the same to another.
    "!number": r"[-+]?(0[0-9_]+(\.[0-9_]*)?([eE][-+]?[0-9]+)?|0[xXoObB]\w+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"
    r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag_of_number, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag_of_number, re.compile(f"(?:{_pattern})$"), list("-+.0123456789"))
_Loader.add_constructor("!number", _Loader.refuse_number)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file cannot be read, is not YAML, has a key twice, or is not a mapping.
    """
    try:
        text = read_text(path, limit=_YAML_LIMIT)
    except UserError as error:
        close = nearest(path.name, (file.name for file in path.parent.glob("*.yaml")))
        mistyped = str(error).endswith("no such file") and "did you mean" in close
        raise UserError(f"{error}{close if mistyped else ''}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, path: str) -> dict[str, Any]:
    """The mapping in a YAML text, which came from ``path``; see :func:`read_yaml`."""
    if unprintable := yaml.reader.Reader.NON_PRINTABLE.search(text):
        number = text.count("\n", 0, unprintable.start()) + 1
        raise UserError(f"{path}, line {number}: not valid YAML: the character {unprintable[0]!r} may not stand there")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is not None:
            _require_plain(node, {})
        data = None if node is None else loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path}{line}: not valid YAML: {reason}") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(data).__name__}")
    return data


def _require_plain(node: yaml.Node, sizes: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """The number of values in a node, anchors written out, and its depth.

    Raises:
        yaml.YAMLError: a key that stands twice, or more than can be meant.
    """

    def refuse(reason: str, at: yaml.Node = node) -> typing.NoReturn:
        raise yaml.constructor.ConstructorError(None, None, reason, at.start_mark)

    if id(node) in sizes:
        if not sizes[id(node)][0]:
            refuse("an anchor that contains itself")
        return sizes[id(node)]
    sizes[id(node)] = (0, 0)  # not known yet
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys: set[tuple[str, Hashable]] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in keys:
                refuse(f"the key '{brief(key.value)}' stands twice in one mapping", key)
            keys.add((key.tag, key.value if isinstance(key, yaml.ScalarNode) else id(key)))
            inner += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    parts = [_require_plain(one, sizes) for one in inner]
    size, depth = 1 + sum(count for count, _ in parts), 1 + max((deep for _, deep in parts), default=0)
    if size > _YAML_NODES or depth > _YAML_DEPTH:
        refuse(f"more than {_YAML_NODES} values, or nested more than {_YAML_DEPTH} deep")
    sizes[id(node)] = size, depth
    return size, depth


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
        text = json.dumps(_plain(data, where))
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    try:
        # As JSON: only there are lists tuples, and texts paths, while nothing else is taken for what it is not.
        return typing.cast(T, _adapter(typing.cast(Hashable, cls)).validate_json(text, strict=True))
    except pydantic.ValidationError as error:
        raise UserError(_sentence(error.errors(include_url=False), cls, where)) from None


@functools.lru_cache(maxsize=256)
def _adapter(cls: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(cls)


def _plain(data: Any, where: str) -> Any:
    """Data of which JSON can say the same: text for keys, no dates, no bytes, no infinity."""
    if isinstance(data, Mapping):
        for key in data:
            if not isinstance(key, str):
                raise UserError(f"{_dotted(where, str(key))}: the key {brief(key)} is no text; put it in quotes")
        return {_plain(key, where): _plain(value, _dotted(where, key)) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value, _dotted(where, str(index))) for index, value in enumerate(data)]
    if isinstance(data, Path):
        data = str(data)
    if isinstance(data, str):
        try:
            data.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: {brief(data)} has characters that no text has") from None
    elif isinstance(data, int) and abs(data) >= 2**63:
        raise UserError(f"{where}: an integer of more than 64 bits")
    elif isinstance(data, float) and not math.isfinite(data):
        raise UserError(f"{where}: {data} is no number that may stand here")
    elif data is not None and not isinstance(data, (bool, int, float)):
        raise UserError(f"{where}: a {type(data).__name__}; expected text, a number, a list or a mapping")
    return data


def to_dict(value: Any) -> Any:
    """Plain data (dict, list, str, number) of a config, the inverse of :func:`parse`."""
    return to_jsonable_python(value, serialize_as_any=True)  # all fields of what is there, not only its type's


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
    path = _dotted(where, *location)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{path}: unknown key{nearest(location[-1], _fields(owner))}"
    if error["type"] == "missing":
        return f"{path}: missing; it has no default"
    if error["type"] == "union_tag_invalid":
        tag, tags = error["ctx"]["tag"], [name.strip(" '") for name in error["ctx"]["expected_tags"].split(",")]
        return f"{path}.name: unknown name '{brief(tag)}'{nearest(tag, tags)}"
    if error["type"] == "union_tag_not_found":
        return f"{path}.name: missing; it says which kind this is"
    if error["type"] == "literal_error":
        allowed = error["ctx"]["expected"]
        return f"{path}: {_value(error['input'])} is not allowed; allowed: {allowed}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    given = "" if error["type"] == "value_error" else f", not {_value(error['input'])}"
    return f"{path}{': ' if path else ''}{message[0].lower()}{message[1:]}{given}"


def _value(value: Any) -> str:
    return f"'{brief(value)}'" if isinstance(value, str) else brief(value)


def _dotted(where: str, *keys: str) -> str:
    """A path for a message: where the data are from, whole, and each key on one line and of a readable length."""
    return ".".join([part for part in (where, *map(brief, keys)) if part])


def _walk(cls: Any, location: tuple[Any, ...]) -> tuple[list[str], Any]:
    """The dotted parts of a pydantic location, without the union tags in it, and the class that owns the last part."""
    parts: list[str] = []
    owner, current = cls, cls
    for step in location:
        if step == "[key]":  # what is wrong is the key itself
            continue
        members = _members(current)
        fields = {name: annotation for member in members for name, annotation in _fields(member).items()}
        tagged = (member for member in members if step in (_tag(member), getattr(member, "__name__", None)))
        if step not in fields and (member := next(tagged, None)):
            current = owner = member
            continue
        parts.append(str(step))
        owner = next((member for member in members if _fields(member)), current)
        inner = [arg for member in members for arg in typing.get_args(member) if arg is not Ellipsis]
        current = fields.get(step, inner[-1] if inner else Any)
    return parts, owner


def _members(annotation: Any) -> list[Any]:
    """The types of a union; of any other type itself."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for arg in typing.get_args(annotation) for member in _members(arg)]
    return [annotation]


def _fields(cls: Any) -> dict[str, Any]:
    """The annotations of a ``@config`` class; none of any other type."""
    return {name: field.annotation for name, field in getattr(cls, "__pydantic_fields__", {}).items()}


def _tag(cls: Any) -> Any:
    return next(iter(typing.get_args(_fields(cls).get("name"))), None)
