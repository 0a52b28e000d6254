"""What the methods say of themselves, read from their sources: nothing is imported, so the answer comes at once.

A method's docstring, its literal class attributes and the fields of its config are its only description.
``segdistill methods`` and docs/methods.md show what is read here (see ``manual.py``), so that neither can drift.
"""

import ast
import functools
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from segdistill.errors import UserError, nearest
from segdistill.methods import METHODS

ROOT = Path(__file__).parents[2]  # the folder that holds the package


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
    return [_read(name) for name in METHODS]


def entry(name: str) -> Entry:
    """One method.

    Raises:
        UserError: there is none of that name.
    """
    if name not in METHODS:
        raise UserError(f"unknown method '{name}'{nearest(name, METHODS)}")
    return _read(name)


@dataclass(frozen=True)
class _Class:
    """A class definition and the module that its names are to be looked up in."""

    node: ast.ClassDef
    module: str

    def lineage(self) -> Iterator["_Class"]:
        """The class, and after it those of ours that it inherits from."""
        yield self
        for base in self.node.bases:
            found = _find(base.id, self.module) if isinstance(base, ast.Name) else None
            if found and isinstance(found[0], ast.ClassDef):
                yield from _Class(found[0], found[1]).lineage()

    def attribute(self, name: str) -> tuple[ast.expr, str]:
        """What is assigned to a class attribute, and the module where."""
        for cls in self.lineage():
            for statement in cls.node.body:
                if name in _targets(statement) and (value := getattr(statement, "value", None)) is not None:
                    return value, cls.module
        raise LookupError(f"{self.module}: {self.node.name} has no attribute '{name}'")

    def literal(self, name: str) -> str:
        """A class attribute that is a string."""
        return str(ast.literal_eval(self.attribute(name)[0]))


def _read(name: str) -> Entry:
    module, _, class_name = METHODS[name].partition(":")
    method = _class(class_name, module)
    config, where = method.attribute("Config")
    summary, sections = _sections(ast.get_docstring(method.node) or "")
    return Entry(
        name=name,
        source=_path(module).relative_to(ROOT).as_posix(),
        kind=method.literal("kind"),
        paper=method.literal("paper"),
        needs=method.literal("needs"),
        evidence=method.literal("evidence"),
        summary=summary,
        sections=sections,
        parameters=tuple(_parameters(_class(ast.unparse(config), where)).values()),
    )


def _sections(docstring: str) -> tuple[str, dict[str, str]]:
    """What stands before the first ``Heading:`` of a docstring, and the indented block under each heading."""
    blocks: dict[str, list[str]] = {"": []}
    heading = ""
    for line in docstring.splitlines():
        if found := re.fullmatch(r"([A-Z][\w -]*):", line):
            heading = found[1]
        elif line and not line[0].isspace():
            heading = ""
        if not found:
            blocks.setdefault(heading, []).append(line)
    texts = {heading: inspect.cleandoc("\n".join(["", *lines])) for heading, lines in blocks.items()}
    return texts.pop("").strip(), texts


def _parameters(config: _Class) -> dict[str, Parameter]:
    """The fields of a config by name, in a dataclass's order: inherited ones first. ``name`` is no choice."""
    parameters: dict[str, Parameter] = {}
    for cls in reversed(list(config.lineage())):
        for statement, following in zip(cls.node.body, [*cls.node.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            name = statement.target.id
            if name == "name" or "ClassVar" in ast.unparse(statement.annotation):
                continue
            inherited = parameters[name].meaning if name in parameters else ""
            parameters[name] = Parameter(
                name,
                _allowed(statement.annotation, cls.module),
                _written(statement.value, cls.module) if statement.value else "required",
                _documentation(following) or inherited,
            )
    return parameters


def _documentation(statement: ast.stmt | None) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return " ".join(str(statement.value.value).split())
    return ""


WORDS = {
    "float": "number",
    "int": "integer",
    "bool": "true, false",
    "str": "text",
    "Path": "path",
    "None": "null",
    "PositiveInt": "integer > 0",
    "NonNegativeInt": "integer ≥ 0",
    "PositiveFloat": "number > 0",
    "NonNegativeFloat": "number ≥ 0",
}
BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}


def _allowed(annotation: ast.expr, module: str) -> str:
    """A type in words: ``Annotated[float, Field(ge=0, lt=1)]`` as "number ≥ 0, < 1". Aliases are looked up."""
    match annotation:
        case ast.Constant(value=str(text)):
            return _allowed(ast.parse(text, mode="eval").body, module)
        case ast.Constant():
            return _written(annotation, module)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return f"{_allowed(left, module)}, or {_allowed(right, module)}"
        case ast.Subscript(value=ast.Name(id=kind), slice=inside):
            arguments = inside.elts if isinstance(inside, ast.Tuple) else [inside]
            return _generic(kind, arguments, module)
        case ast.Name(id=name) if name not in WORDS:
            definition, where = _find(name, module) or (None, module)
            if isinstance(definition, ast.Assign | ast.AnnAssign) and definition.value:
                return _allowed(definition.value, where)
    return WORDS.get(ast.unparse(annotation), ast.unparse(annotation))


def _generic(kind: str, arguments: list[ast.expr], module: str) -> str:
    if kind == "Literal":
        return ", ".join(_written(argument, module) for argument in arguments)
    if kind == "Annotated":
        fields = [argument for argument in arguments[1:] if isinstance(argument, ast.Call)]
        limits = {str(keyword.arg): _bound(keyword.value) for field in fields for keyword in field.keywords}
        words = _allowed(arguments[0], module)
        if "min_length" in limits:
            words = words.replace("list", f"list of {limits['min_length']} or more", 1)
        return " ".join(
            [words, ", ".join(sign.format(limits[key]) for key, sign in BOUNDS.items() if key in limits)]
        ).strip()
    inner = [_allowed(argument, module) for argument in arguments if ast.unparse(argument) != "..."]
    if kind == "tuple" and len(inner) == len(arguments):
        each = inner[0] if len(set(inner)) == 1 else "; ".join(inner)
        return f"list of {len(inner)}: {each}"
    if kind in ("tuple", "list"):
        return f"list: {inner[0]}"
    return f"{kind}: {'; '.join(inner)}"


def _bound(value: ast.expr) -> str:
    if isinstance(value, ast.Constant) and isinstance(value.value, float):
        return f"{value.value:g}".replace("e+0", "e")
    return ast.unparse(value)


def _written(value: ast.expr, module: str) -> str:
    """A value as params.yaml would have it: ``1e-5`` as in the source, ``true``, ``null``, ``[0.9, 0.99]``."""
    match value:
        case ast.Constant(value=bool(flag)):
            return "true" if flag else "false"
        case ast.Constant(value=None):
            return "null"
        case ast.Constant(value=str(text)):
            return text if _is_text(text) else json.dumps(text)
        case ast.Constant():
            return _number(value, module)
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return f"[{', '.join(_written(item, module) for item in items)}]"
        case ast.Name(id=name):
            definition, where = _find(name, module) or (None, module)
            if isinstance(definition, ast.Assign | ast.AnnAssign) and definition.value:
                return _written(definition.value, where)
    return ast.unparse(value)


def _is_text(text: str) -> bool:
    """Whether YAML reads these characters as themselves; ``off`` and ``1e3``, for example, need quotes."""
    return bool(re.fullmatch(r"\w[\w.+-]*", text)) and yaml.safe_load(text) == text


def _class(name: str, module: str) -> _Class:
    found = _find(name, module)
    if found is None or not isinstance(found[0], ast.ClassDef):
        raise LookupError(f"{module}: no class '{name}'")
    return _Class(found[0], found[1])


def _find(name: str, module: str) -> tuple[ast.stmt, str] | None:
    """The statement that defines a name seen in a module, and the module it stands in; None if it is not ours."""
    for statement in reversed(_tree(module).body):
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("segdistill"):
            for alias in statement.names:
                if name == (alias.asname or alias.name):
                    return _find(alias.name, str(statement.module))
        elif name in _targets(statement):
            return statement, module
    return None


def _targets(statement: ast.stmt) -> set[str]:
    """The names that a statement binds, as far as they matter here."""
    match statement:
        case ast.ClassDef(name=name):
            return {name}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
    return set()


def _path(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _source(module: str) -> bytes:
    return _path(module).read_bytes()


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_source(module))


@functools.cache
def _lines(module: str) -> list[bytes]:
    return _source(module).split(b"\n")


def _number(node: ast.Constant, module: str) -> str:
    """A number as the source has it (``ast.get_source_segment`` splits the whole file each time)."""
    return _lines(module)[node.lineno - 1][node.col_offset : node.end_col_offset].decode().replace("_", "")
