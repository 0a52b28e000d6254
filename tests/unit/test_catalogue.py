"""What ``segdistill methods`` and docs/methods.md say, against the classes and configs themselves."""

import dataclasses
import inspect
import io
import itertools
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from rich.console import Console

from segdistill.__main__ import main
from segdistill.commands import catalogue
from segdistill.commands import methods as manual
from segdistill.commands.catalogue import Entry, Parameter, entries, entry
from segdistill.config import parse, parse_yaml, to_dict
from segdistill.errors import UserError
from segdistill.methods import METHODS, build_offline, load, parse_method
from segdistill.methods.method import Evidence
from segdistill.models.outputs import ModelInfo

ROOT = Path(__file__).resolve().parents[2]
EVERY = pytest.mark.parametrize("name", METHODS)
WITHOUT_TORCH = """
import sys
from segdistill.__main__ import main
code = main(sys.argv[1:])
heavy = {'torch', 'timm', 'numpy', 'mlflow', 'kfp', 'pyarrow'} & set(sys.modules)
sys.exit(f'loaded {heavy}' if heavy else code)
"""


def printed(name: str | None = None, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    manual.show_method(name, console) if name else manual.show_table(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@EVERY
def test_an_entry_says_what_its_class_says(name: str) -> None:
    found, method = entry(name), load(name)
    assert (found.name, ROOT / found.source) == (name, Path(inspect.getfile(method)))
    assert (found.kind, found.paper, found.needs, found.evidence) == (
        method.kind,  # type: ignore[attr-defined]
        method.paper,
        method.needs,
        method.evidence,
    )
    assert found.summary and " ".join(found.summary.split()) in " ".join(str(method.__doc__).split())
    assert found.evidence in get_args(Evidence)


@EVERY
def test_no_entry_has_a_gap(name: str) -> None:
    found = entry(name)
    for field in dataclasses.fields(Entry):
        assert getattr(found, field.name), field.name
    assert {"Formula", "Reference"} <= set(found.sections)
    assert all(text for text in found.sections.values())
    if found.evidence in ("partly second-hand", "reconstruction"):
        assert "Inferred" in found.sections
    for parameter in found.parameters:
        for field in dataclasses.fields(Parameter):
            assert getattr(parameter, field.name), f"{parameter.name}: {field.name}"


@EVERY
def test_the_defaults_pasted_into_params_give_the_default_config(name: str) -> None:
    config = load(name).Config
    told = parse_yaml("\n".join(f"{one.name}: {one.default}" for one in entry(name).parameters), "defaults")
    assert set(told) | {"name"} == {field.name for field in dataclasses.fields(config)}
    defaults = to_dict(config())
    for field, value in told.items():
        assert to_dict(parse(config, {field: value}, name))[field] == defaults[field], field
    assert to_dict(parse(config, told, name)) == defaults


@EVERY
def test_the_default_weights_are_those_of_the_config(name: str) -> None:
    weights, defaults = entry(name).weights, to_dict(load(name).Config())
    assert float(weights.pop("weight")) == defaults["weight"]
    assert {f"{term}_weight" for term in weights} == {field for field in defaults if field.endswith("_weight")}
    assert all(yaml.safe_load(value) == defaults[f"{term}_weight"] for term, value in weights.items())


def test_the_sections_of_a_docstring_are_kept_to_the_letter() -> None:
    lines = entry("kd").sections["Weights"].splitlines()
    assert lines[0].startswith("Published weights belong")
    assert "    mmrazor, batchmean on [B, K, h, w]                          w * h * w  1 -> 8192 at 64 x 128" in lines


SOURCE = '''
from __future__ import annotations
from typing import Annotated, ClassVar, Literal
from pydantic import Field
from segdistill.methods.odd_base import Base, BaseConfig, Side as Flank

Share = Annotated[float, Field(gt=0, le=1)]
START = 3

class OddConfig(BaseConfig):
    name: Literal["odd"] = "odd"
    weight: Share = 0.5
    side: Flank = "off"
    """Which
    side."""
    shares: tuple[Share, Share] | None = None
    """Two."""
    taps: "Annotated[tuple[Flank, ...], Field(min_length=1)]" = ("on",)
    """Some."""
    start: int = START
    """A constant."""
    steps: int = 20_000
    """Many."""
    rate: float = 1e-5
    """Small."""
    seen: ClassVar[int] = 0

class Odd(Base):
    """An odd one.

    More of it.

    Formula:
        L = a

            b
    Weights:
        None.

    Further words.
    """
    Config = OddConfig
    paper = (
        "A "
        "paper"
    )
    evidence = "reconstruction"
'''
BASE = '''
from typing import ClassVar, Literal
Side = Literal["on", "off", "left"]

class BaseConfig:
    weight: float = 1.0
    """The factor."""
    ramp: float = 0.0
    """The ramp."""

class Base:
    kind: ClassVar[str] = "online"
    needs: ClassVar[str] = "oddities"
'''


def test_aliases_and_inheritance_are_followed_across_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "segdistill/methods"
    folder.mkdir(parents=True)
    (folder / "odd.py").write_text(SOURCE)
    (folder / "odd_base.py").write_text(BASE)
    monkeypatch.setattr(catalogue, "ROOT", tmp_path)
    monkeypatch.setitem(METHODS, "odd", "segdistill.methods.odd:Odd")
    assert entry("odd") == Entry(
        name="odd",
        source="segdistill/methods/odd.py",
        kind="online",
        paper="A paper",
        needs="oddities",
        evidence="reconstruction",
        summary="An odd one.\n\nMore of it.\n\nFurther words.",
        sections={"Formula": "L = a\n\n    b", "Weights": "None."},
        parameters=(
            Parameter("weight", "number > 0, ≤ 1", "0.5", "The factor."),
            Parameter("ramp", "number", "0.0", "The ramp."),
            Parameter("side", '"on", "off", left', '"off"', "Which side."),
            Parameter("shares", "list of 2: number > 0, ≤ 1, or null", "null", "Two."),
            Parameter("taps", 'list of 1 or more: "on", "off", left', '["on"]', "Some."),
            Parameter("start", "integer", "3", "A constant."),
            Parameter("steps", "integer", "20000", "Many."),
            Parameter("rate", "number", "1e-5", "Small."),
        ),
    )


def test_an_unknown_name_is_answered_with_its_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"unknown method 'apdd'; did you mean 'apd'\?"):
        entry("apdd")
    assert main(["methods", "zzz"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("segdistill methods: unknown method 'zzz'; allowed: kd, ") and said.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["apd"], ["--markdown"]])
def test_the_answer_needs_no_heavy_library_and_has_no_escape_codes_in_a_pipe(arguments: list[str]) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "methods", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Tian et al." in done.stdout and "\x1b" not in done.stdout


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_names_every_method_at_any_width(width: int) -> None:
    lines = printed(width=width).splitlines()
    assert max(map(len, lines)) <= width
    starts = [line.split()[:2] for line in lines if line.strip()]
    for found in entries():
        assert [found.name, found.kind] in starts


def test_the_table_is_read_at_a_glance_at_100_columns() -> None:
    rows = [line for line in printed().splitlines() if line.startswith(" kd ")]
    assert [row.split("  ")[0].strip() for row in rows] == ["kd"]
    assert "Hinton et al., 2015" in rows[0] and "1.0" in rows[0] and "public code" in rows[0]


@EVERY
def test_the_page_of_a_method_shows_its_formula_to_the_letter_and_every_parameter(name: str) -> None:
    found, page = entry(name), printed(name)
    for line in found.sections["Formula"].splitlines():
        assert not line or f"  {line}\n" in page
    flat = " ".join(page.split())
    for text in (found.paper, found.evidence, found.needs, found.source, "Inferred"):
        assert text in flat
    firsts = [line.split()[0] for line in page.splitlines() if line.strip()]
    for parameter in found.parameters:
        assert parameter.name in firsts


def test_the_document_is_what_the_sources_say() -> None:
    written = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert written == manual.markdown(), "run: python -m segdistill methods --markdown > docs/methods.md"


def test_the_document_has_a_row_and_a_section_for_every_method_and_unbroken_tables() -> None:
    lines = manual.markdown().splitlines()
    for name in METHODS:
        assert lines.count(f"## {name}") == 1
        assert sum(line.startswith(f"| [`{name}`](#{name}) | ") for line in lines) == 1
    for before, line in itertools.pairwise(lines):
        if before.startswith("|") and line.startswith("|"):
            assert before.replace(r"\|", "").count("|") == line.replace(r"\|", "").count("|"), line


def test_the_example_in_the_document_is_a_working_experiment() -> None:
    text = manual.markdown().split("```yaml\n")[1].split("```")[0].replace("*cnn", "null")
    for experiment in yaml.safe_load(text)["experiments"].values():
        configs = [parse_method(data, "methods")[1] for data in experiment["methods"]]
        info = ModelInfo(3, (4, 4, 4, 4), (4, 8, 16, 32), 4, 4, 4, "cnn")
        assert list(build_offline(configs, info, info)) == [data["name"] for data in experiment["methods"]]


def test_every_level_of_evidence_is_explained() -> None:
    assert tuple(manual.EVIDENCE) == get_args(Evidence)
