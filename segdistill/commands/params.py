"""The manual of params.yaml: what ``segdistill params`` prints, and docs/params.md. The configs are its only source."""

import argparse
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rich.text import Text

from segdistill.commands.catalogue import Parameter, parameters
from segdistill.commands.methods import plain_console, plain_table, row
from segdistill.config import read_yaml
from segdistill.errors import UserError, nearest
from segdistill.identity import WITHOUT_EFFECT
from segdistill.plan import DistillConfig, ExperimentConfig
from segdistill.search import TuneConfig
from segdistill.stages import STAGES

NAMES = ("NAME", "STUDENT")  # parts of a place for which any name may stand
_RUN = "The experiments that are run; what is only defined under experiments waits."
_SEEDS = "Every experiment under run is trained once with each: initial weights, order of images, augmentation."
LISTS = {
    "run": Parameter("run", "list of 1 or more: name", "required", _RUN),
    "seeds": Parameter("seeds", "list of 1 or more: integer ≥ 0, ≤ 4294967295", "required", _SEEDS),
}
# What the plan reads is for the training of others.
TRAINING = {"train_teacher": "train_teacher", "distill": "distill", "experiments": "distill", "tune": "tune"}

INTRODUCTION = """\
<!-- Written by `segdistill params --markdown > docs/params.md` from the configs themselves: edit those. -->

# Parameters

Every key of `params.yaml`. In the terminal, `segdistill params` lists the sections, `segdistill params distill.train`
shows one, and `segdistill params distill.train.iterations` a key, with the value that `params.yaml` has.
`segdistill check` checks the file as a whole. A key without a default is required: `params.yaml` says what is run. A
change of a key makes `dvc repro` run the stages that it matters to, and what follows from them.

* **GPU.** Where networks run is no parameter: each command that trains or evaluates takes a GPU where torch can use
  one, else the CPU (`--device auto`; `cpu` and `cuda` insist). `precision` bf16 or fp16 and `channels_last` are for it.
* **Number of classes.** It is no parameter either: the data say it (`classes.json`, or a layout's own list).
* **`encoder_weights`** is `none` (random), `imagenet` (the encoder's own, downloaded once and cached), or the path of a
  `.safetensors` file with the encoder's own keys, by custom `weights/ENCODER.safetensors` in the clone, which git
  ignores. Where the file is missing, the message says where it is to be had.
* **Methods.** What stands under `experiments.NAME.methods` beside a method's `name`: [methods.md](methods.md), or
  `segdistill methods NAME`.
"""


@dataclass(frozen=True)
class Section:
    """One config, and everywhere it stands."""

    config: type
    places: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    @property
    def title(self) -> str:
        """The variant it is, where several may stand in one place."""
        names = typing.get_args(self.config.__pydantic_fields__["name"].annotation) if self._named else ()  # type: ignore[attr-defined]
        return f"{', '.join(self.places)}{f' (name: {names[0]})' if names else ''}"

    @property
    def _named(self) -> bool:
        return "name" in self.config.__pydantic_fields__  # type: ignore[attr-defined]

    @property
    def summary(self) -> str:
        """What the config's docstring says."""
        return " ".join((self.config.__doc__ or "").split())


def sections() -> list[Section]:
    """Every config of params.yaml, in the order of its first place."""
    from segdistill.execution import stage_module

    first = {stage.params[0]: stage_module(stage).Config for stage in STAGES if stage.params}
    places: dict[type, list[str]] = {}
    roots = {**first, "distill": DistillConfig, "experiments.NAME": ExperimentConfig, "tune": TuneConfig}
    for place, config in roots.items():
        for where, cls in _walk(place, config):
            places.setdefault(cls, []).append(where)
    return [Section(cls, tuple(dict.fromkeys(where)), _parameters(cls)) for cls, where in places.items()]


def _parameters(cls: type) -> tuple[Parameter, ...]:
    without_effect = WITHOUT_EFFECT if cls.__name__ == "TrainConfig" else ()
    return tuple(
        replace(one, meaning=f"{one.meaning} Changes no result.") if one.name in without_effect else one
        for one in parameters(cls)
    )


def _walk(place: str, config: type) -> Iterator[tuple[str, type]]:
    """A config and those inside it, each with its place."""
    yield place, config
    for name, field in config.__pydantic_fields__.items():  # type: ignore[attr-defined]
        for inner, named in _configs(field.annotation):
            yield from _walk(f"{place}.{name}{'.STUDENT' if named else ''}", inner)


def _configs(annotation: Any, named: bool = False) -> Iterator[tuple[type, bool]]:
    """The configs in a type; whether each stands below a name of somebody's choice."""
    if hasattr(annotation, "__pydantic_fields__"):
        yield annotation, named
        return
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    for part in inner[:1] if origin is Annotated else inner:
        yield from _configs(part, named or origin is dict)


def keys() -> dict[str, Parameter]:
    """Every key by its dotted path, in which NAME and STUDENT stand for any name."""
    known = dict(LISTS)
    for section in sections():
        for place in section.places:
            known |= {f"{place}.{parameter.name}": parameter for parameter in section.parameters}
    return known


def show(key: str | None, path: Path) -> None:
    """Prints all sections, one of them, or a key.

    Raises:
        UserError: no such key.
    """
    console = plain_console()
    if key is None:
        table = plain_table()
        for column in ("section", "what it says"):
            table.add_column(column)
        for name, parameter in LISTS.items():
            table.add_row(name, Text(parameter.meaning))
        for section in sections():
            table.add_row(Text(section.title), Text(section.summary))
        console.print(table)
        console.print("One of them, or a key in it: segdistill params KEY")
        return
    below = [section for section in sections() if any(_stands_for(place, key) for place in section.places)]
    for section in below:
        console.print(Text(f"{key}: {section.summary}"))
        table = plain_table()
        for column, width in {"parameter": None, "default": None, "allowed": 28, "meaning": None}.items():
            table.add_column(column, no_wrap=column == "parameter", max_width=width)
        for one in section.parameters:
            table.add_row(*map(Text, (one.name, one.default, one.allowed, one.meaning)))
        console.print(table)
    if below:
        return
    known = keys()
    places = [place for place in known if _stands_for(place, key)]
    for place in places or [place for place in known if place.endswith(f".{key}")]:
        parameter = known[place]
        console.print(Text(f"{key if places else place}: {parameter.meaning}"))
        console.print(Text(f"  allowed: {parameter.allowed}; default: {parameter.default}{_here(path, key)}"))
        console.print(Text(f"  matters to: {_readers([place])}"))
        places = places or [place]
    if not places:
        method = "; the parameters of a method: segdistill methods NAME" if ".methods." in key else ""
        raise UserError(f"{key}: no such parameter{method or nearest(key, [*known, *_last_parts(known)])}")


def _stands_for(place: str, key: str) -> bool:
    parts, given = place.split("."), key.split(".")
    pairs = zip(parts, given, strict=False)
    return len(parts) == len(given) and all(part == word or part in NAMES for part, word in pairs)


def _readers(places: typing.Iterable[str]) -> str:
    """What keys at some places matter to: stages, or a command."""
    readers: list[str] = []
    for root in (place.partition(".")[0] for place in places):
        trained = TRAINING.get(root, "distill") if root in (*TRAINING, *LISTS) else None
        readers += [trained] if trained else [stage.name for stage in STAGES if root in stage.params]
    return ", ".join(dict.fromkeys(readers))


def _last_parts(known: Mapping[str, Any]) -> list[str]:
    return [place.rpartition(".")[2] for place in known]


def _here(path: Path, key: str) -> str:
    """The value that a params file has, if there is one."""
    try:
        value: Any = read_yaml(path)
        for part in key.split("."):
            value = value[part]
    except (UserError, KeyError, TypeError):
        return ""
    return f"; {path}: {value}"


def markdown() -> str:
    """The whole of docs/params.md."""
    blocks = [INTRODUCTION.rstrip(), "## run, seeds", "The matrix. Matters to: distill.", _table(LISTS.values())]
    for section in sections():
        if section.parameters:
            readers = f"{section.summary} Matters to: {_readers(section.places)}."
            blocks += [f"## {section.title}", readers, _table(section.parameters)]
    return "\n\n".join(blocks) + "\n"


def _table(rows: typing.Iterable[Parameter]) -> str:
    lines = [row("key", "default", "allowed", "meaning"), "|---|---|---|---|"]
    lines += [row(f"`{one.name}`", f"`{one.default}`", one.allowed, one.meaning) for one in rows]
    return "\n".join(lines)


def command(arguments: argparse.Namespace) -> None:
    """Prints the sections, one, a key, or docs/params.md."""
    if arguments.markdown:
        print(markdown(), end="")
    else:
        show(arguments.key, arguments.params)
