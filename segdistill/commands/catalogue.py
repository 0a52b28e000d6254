"""What the methods say of themselves: docstring, class attributes and config are a method's only description.

``segdistill methods`` and docs/methods.md show what is collected here (see ``methods.py``), so that neither can drift.
"""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from segdistill.config import to_dict
from segdistill.errors import UserError, nearest
from segdistill.methods import METHODS, load

ROOT = Path(__file__).parents[2]  # the folder that holds the package
WORDS = {"number": "number", "integer": "integer", "boolean": "true, false", "string": "text", "null": "null"}
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


@dataclass(frozen=True)
class Parameter:
    """One field of a method's config."""

    name: str
    allowed: str
    default: str  # as params.yaml would have it
    meaning: str


@dataclass(frozen=True)
class Entry:
    """One method of the table."""

    name: str
    source: str  # its file, from the root of the project
    kind: str  # "offline" or "online"
    paper: str
    needs: str
    evidence: str
    summary: str
    sections: dict[str, str]  # of the class's docstring: "Formula", "Weights", ..., dedented and otherwise verbatim
    parameters: tuple[Parameter, ...]

    @property
    def weights(self) -> dict[str, str]:
        """The default of ``weight``, the factor of all terms, and of each term's own weight, by the term's name."""
        return {
            parameter.name.removesuffix("_weight"): parameter.default
            for parameter in self.parameters
            if parameter.name == "weight" or parameter.name.endswith("_weight")
        }


def entries() -> list[Entry]:
    """Every method, in the order of the table."""
    return [entry(name) for name in METHODS]


def entry(name: str) -> Entry:
    """One method.

    Raises:
        UserError: there is none of that name.
    """
    if name not in METHODS:
        raise UserError(f"unknown method '{name}'{nearest(name, METHODS)}")
    method = load(name)
    summary, sections = _sections(inspect.getdoc(method) or "")
    return Entry(
        name=name,
        source=Path(inspect.getfile(method)).relative_to(ROOT).as_posix(),
        kind=method.kind,
        paper=method.paper,
        needs=method.needs,
        evidence=method.evidence,
        summary=summary,
        sections=sections,
        parameters=parameters(method.Config),
    )


def _sections(docstring: str) -> tuple[str, dict[str, str]]:
    """What stands before the first ``Heading:`` of a docstring, and the indented block under each heading."""
    blocks: dict[str, list[str]] = {"": []}
    heading = ""
    for line in docstring.splitlines():
        if match := re.fullmatch(r"([A-Z][\w -]*):", line):
            heading = match[1]
        elif line and not line[0].isspace():
            heading = ""
        if not match:
            blocks.setdefault(heading, []).append(line)
    texts = {heading: inspect.cleandoc("\n".join(["", *lines])) for heading, lines in blocks.items()}
    return texts.pop("").strip(), texts


def parameters(config: type) -> tuple[Parameter, ...]:
    """The fields of a config, inherited ones first. ``name`` is no choice."""
    fields = TypeAdapter(config).json_schema()["properties"]
    return tuple(
        Parameter(
            name,
            _allowed(field),
            _default(config, name, field),
            _meaning(config, name),
        )
        for name, field in fields.items()
        if name != "name"
    )


def _default(config: type, name: str, schema: Mapping[str, Any]) -> str:
    if "default" in schema:
        return _written(schema["default"])
    made = config.__pydantic_fields__[name].default_factory  # type: ignore[attr-defined]
    value = "required" if made is None else to_dict(made())
    return value.get("name", "{}") if isinstance(value, dict) else value


def _meaning(config: type, name: str) -> str:
    """What stands under a field, in the nearest class that says something: pydantic keeps no inherited description."""
    fields = (vars(cls).get("__pydantic_fields__", {}).get(name) for cls in config.__mro__)
    return " ".join(next((field.description for field in fields if field and field.description), "").split())


def _allowed(schema: Mapping[str, Any]) -> str:
    """A field's JSON schema in words: "number ≥ 0, < 1", "integer ≥ 1, or null", "list of 2: mlp, identity"."""
    if "$ref" in schema:
        return "section"
    if "oneOf" in schema:
        return f"section; its name: {', '.join(schema['discriminator']['mapping'])}"
    if "anyOf" in schema:
        return ", or ".join(map(_allowed, schema["anyOf"]))
    if "const" in schema:
        return _written(schema["const"])
    if schema.get("type", "object") == "object":
        return "mapping" if "type" in schema else "any value"
    if "enum" in schema:
        return ", ".join(map(_written, schema["enum"]))
    if schema["type"] == "array":
        items = schema.get("prefixItems", [schema.get("items")])
        count = len(items) if "prefixItems" in schema else f"{schema.get('minItems', 0)} or more"
        return f"list of {count}: {'; '.join(dict.fromkeys(map(_allowed, items)))}"
    limits = {sign: schema[key] for key, sign in BOUNDS.items() if key in schema}
    bounds = ", ".join(
        f"{sign} {_short(f'{limit:g}') if isinstance(limit, float) else limit}" for sign, limit in limits.items()
    )
    return f"{schema.get('format', WORDS[schema['type']])} {bounds}".strip()


def _written(value: Any) -> str:
    """A value as params.yaml would have it: ``1e-5``, ``true``, ``null``, ``[0.9, 0.99]``."""
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, str) and re.fullmatch(r"\w[\w.+-]*", value) and yaml.safe_load(value) == value:
        return value  # in YAML too; "off" and "1e3", for example, need quotes
    return _short(json.dumps(value)) if isinstance(value, float) else json.dumps(value)


def _short(number: str) -> str:
    """``1e-05`` as ``1e-5``, ``1e+09`` as ``1e9``."""
    return re.sub(r"e[+]?(-?)0?", r"e\1", number)
