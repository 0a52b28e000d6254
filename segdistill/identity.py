"""What a trained network comes from, and what its indices stand for: each said once, and compared in one place."""

import ast
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segdistill.config import to_dict
from segdistill.errors import UserError
from segdistill.files import file_hash

# Of a training's settings: how it is run and watched. What they are changes neither data nor updates.
WITHOUT_EFFECT = ("workers", "cache_gib", "log_every", "checkpoint_every", "gradient_share_every")
PACKAGE = Path(__file__).parent
# The rooms whose code decides numbers, but for two tables: for a method speaks its own module, for a layout the data.
DECISIVE = ("data", "engine", "geometry", "images", "losses", "methods", "metrics", "models")
TABLES = ("segdistill.methods", "segdistill.data.layouts")


@dataclass(frozen=True)
class Identity:
    """The facts that decide what a training gives; a checkpoint is resumed by them, a report and a registry name them.

    Args:
        data: the content hash of the prepared data, its classes included.
        teacher: the SHA-256 of the teacher's weights; None where nothing is learnt from one.
        seed: of weights, order and augmentation.
        settings: all that changes data or updates, defaults spelled out; see :func:`effective`. Files of weights that
            they name count by their content.
        code: the hash of what was run; see :func:`code_of`.
    """

    data: str
    teacher: str | None
    seed: int
    settings: Mapping[str, Any]
    code: str

    @functools.cached_property  # once: files may change while the training that read them goes on
    def key(self) -> str:
        """A short name of all of it."""
        facts = [self.data, self.teacher, self.seed, _by_content(to_dict(self.settings)), self.code]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def facts(self) -> dict[str, str]:
        """As files and trackers keep it."""
        teacher = {"teacher_sha256": self.teacher} if self.teacher else {}
        return {"identity": self.key, "data_content": self.data, "code": self.code, **teacher}


def _by_content(settings: Any) -> Any:
    """Settings in which a file of weights is its hash."""
    if isinstance(settings, dict):
        return {key: _by_content(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_by_content(value) for value in settings]
    if isinstance(settings, str) and settings.endswith(".safetensors") and Path(settings).is_file():
        return file_hash(Path(settings))
    return settings


def facts_of(document: Mapping[str, Any]) -> dict[str, str]:
    """The :meth:`Identity.facts` in what describes a trained network."""
    return {
        key: str(document[key]) for key in ("identity", "data_content", "teacher_sha256", "code") if key in document
    }


def effective(train: Any) -> dict[str, Any]:
    """A TrainConfig without what changes neither data nor updates."""
    settings = {key: value for key, value in to_dict(train).items() if key not in WITHOUT_EFFECT}
    if settings["select"] == "last":
        del settings["validate_every"]  # it is then a matter of curves; of the best weights it decides
    return settings


def require_classes(where: Path, found: Sequence[str], expected: Sequence[str]) -> None:
    """Raises a UserError unless the indices of an artefact stand for the classes of the data set: names and order.

    Args:
        where: the artefact.
        found: its classes; none if it does not say.
        expected: those of the data set.
    """
    if list(found) != list(expected):
        raise UserError(
            f"{where}: made for other classes, or for these in another order: {', '.join(found) or 'it names none'}; "
            f"the data set has {', '.join(expected)}"
        )


def code_of(modules: Iterable[str]) -> str:
    """A short hash of the code of some of our modules, and of all that they lead to in the rooms that decide numbers.

    Comments, docstrings and layout are no part of it.
    """
    reached, waiting = set(TABLES), list(modules)
    for module in waiting:
        assert _file_of(module) is not None, module
    while waiting:
        module = waiting.pop()
        if module not in reached and _file_of(module) is not None:
            reached.add(module)
            waiting += [name for name in _imports(module) if name.partition(".")[2].partition(".")[0] in DECISIVE]
    digests = [f"{module} {_code(module)}" for module in sorted(reached - set(TABLES))]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def _file_of(module: str) -> Path | None:
    base = PACKAGE.joinpath(*module.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@functools.cache
def _tree(module: str) -> ast.Module:
    path = _file_of(module)
    assert path is not None
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def _code(module: str) -> str:
    """A hash of a module's statements, without those that are only a text."""
    tree = _Plain().visit(_tree(module))
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


class _Plain(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node


@functools.cache
def _imports(module: str) -> frozenset[str]:
    """Our modules that a module imports when it is run, the packages around them included."""
    names = set[str]()
    for name in _statements(_tree(module)):
        if name.partition(".")[0] == PACKAGE.name:
            names |= {name, *(name[: dot.start()] for dot in re.finditer(r"\.", name))}
    return frozenset(names)


def _statements(node: ast.AST) -> Iterator[str]:
    """The names of all modules, and what may be one, in the import statements below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from _statements(child)
