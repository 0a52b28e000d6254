"""What ``segdistill methods`` and docs/methods.md say, against the classes and configs themselves."""

import dataclasses
import inspect
import io
import itertools
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
import yaml
from pydantic import Field
from rich.console import Console

from segdistill.__main__ import main
from segdistill.commands import methods as manual
from segdistill.commands.catalogue import Entry, Parameter, entries, entry
from segdistill.config import config, parse, parse_yaml, to_dict
from segdistill.errors import UserError
from segdistill.execution import check_params
from segdistill.methods import METHODS, build_offline, build_online, load, parse_method
from segdistill.methods.method import Evidence, MethodConfig, OfflineMethod
from segdistill.models.outputs import ModelInfo
from segdistill.plan import ExperimentConfig, parse_methods

ROOT = Path(__file__).resolve().parents[2]
EVERY = pytest.mark.parametrize("name", METHODS)


def printed(name: str | None = None, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    manual.show_method(name, console) if name else manual.show_table(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@EVERY
def test_an_entry_says_what_its_class_says(name: str) -> None:
    found, method = entry(name), load(name)
    assert (found.name, ROOT / found.source) == (name, Path(inspect.getfile(method)))
    assert (found.kind, found.paper, found.needs, found.evidence) == (
        method.kind,
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
    assert {"Example", "Formula", "Reference"} <= set(found.sections)
    assert all(text for text in found.sections.values())
    if found.evidence in ("partly second-hand", "reconstruction"):
        assert "Inferred" in found.sections
    for parameter in found.parameters:
        for field in dataclasses.fields(Parameter):
            assert getattr(parameter, field.name), f"{parameter.name}: {field.name}"


@EVERY
def test_the_defaults_pasted_into_params_give_the_default_config(name: str) -> None:
    cls = load(name).Config
    told = parse_yaml("\n".join(f"{one.name}: {one.default}" for one in entry(name).parameters), "defaults")
    assert set(told) | {"name"} == {field.name for field in dataclasses.fields(cls)}
    defaults = to_dict(cls())
    for field, value in told.items():
        assert to_dict(parse(cls, {field: value}, name))[field] == defaults[field], field
    assert to_dict(parse(cls, told, name)) == defaults


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


Share = Annotated[float, Field(gt=0, le=1)]
Side = Literal["on", "off", "left"]


@config
class OddConfig(MethodConfig):
    name: Literal["odd"] = "odd"
    weight: Share = 0.5
    """Factor of all."""
    side: Side = "off"
    """Which
    side."""
    shares: tuple[Share, Share] | None = None
    """Two."""
    taps: Annotated[tuple[Side, ...], Field(min_length=1)] = ("on",)
    """Some."""
    steps: int = 20_000
    """Many."""
    rate: float = 1e-5
    """Small."""
    path: Path | None = None
    """Where."""
    text: str
    """What."""


class Odd(OfflineMethod[OddConfig]):
    """An odd one.

    More of it.

    Formula:
        L = a

            b
    Weights:
        None.

    Further words.
    """

    paper = "A paper"
    needs = "oddities"
    evidence = "reconstruction"


def test_docstring_attributes_and_fields_become_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "odd", f"{__name__}:Odd")
    inherited = {parameter.name: parameter.meaning for parameter in entry("at").parameters}["ramp"]
    assert entry("odd") == Entry(
        name="odd",
        source="tests/unit/test_catalogue.py",
        kind="offline",
        paper="A paper",
        needs="oddities",
        evidence="reconstruction",
        summary="An odd one.\n\nMore of it.\n\nFurther words.",
        sections={"Formula": "L = a\n\n    b", "Weights": "None."},
        parameters=(
            Parameter("weight", "number > 0, ≤ 1", "0.5", "Factor of all."),
            Parameter("ramp", "number ≥ 0, ≤ 1", "0.0", inherited),
            Parameter("side", '"on", "off", left', '"off"', "Which side."),
            Parameter("shares", "list of 2: number > 0, ≤ 1, or null", "null", "Two."),
            Parameter("taps", 'list of 1 or more: "on", "off", left', '["on"]', "Some."),
            Parameter("steps", "integer", "20000", "Many."),
            Parameter("rate", "number", "1e-5", "Small."),
            Parameter("path", "path, or null", "null", "Where."),
            Parameter("text", "text", "required", "What."),
        ),
    )


def test_an_unknown_name_is_answered_with_its_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"unknown method 'apdd'; did you mean 'apd'\?"):
        entry("apdd")
    assert main(["methods", "zzz"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("segdistill methods: unknown method 'zzz'; allowed: kd, ") and said.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["apd"], ["--markdown"]])
def test_the_answer_has_no_escape_codes_in_a_pipe(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", *arguments]) == 0
    said = capsys.readouterr().out
    assert "Tian et al." in said and "\x1b" not in said


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
def test_the_page_of_a_method_shows_example_and_formula_to_the_letter_and_every_parameter(name: str) -> None:
    found, page = entry(name), printed(name)
    for line in (found.sections["Example"] + "\n" + found.sections["Formula"]).splitlines():
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


@pytest.fixture(scope="module")
def pasted() -> dict[str, Any]:
    """The project's params.yaml with every method's example at the end of its experiments."""
    examples = "\n".join(textwrap.indent(found.sections["Example"], "  ") for found in entries())
    before, entries_and_after = (ROOT / "params.yaml").read_text(encoding="utf-8").split("\nexperiments:\n")
    defined, after = re.split(r"^(?=\S)", entries_and_after, maxsplit=1, flags=re.MULTILINE)
    return parse_yaml(f"{before}\nexperiments:\n{defined}\n{examples}\n\n{after}", "params.yaml")


def test_the_examples_are_accepted_under_the_experiments_of_the_project(pasted: dict[str, Any]) -> None:
    check_params(pasted | {"run": list(pasted["experiments"])}, networks="named")


@EVERY
def test_the_example_of_a_method_builds_it_with_what_it_sets(name: str, pasted: dict[str, Any]) -> None:
    (experiment,) = parse_yaml(entry(name).sections["Example"].replace("*", ""), name)
    settings = parse(ExperimentConfig, pasted["experiments"][experiment], experiment)
    kind, parsed = parse_methods(experiment, settings)
    configs = [config for _, config in parsed]
    infos = {
        student: ModelInfo(3, (4, 6, 8, 10), (4, 8, 16, 32), 4, 4, 4, "vit" if student == "vit" else "cnn")
        for student in settings.students
    }
    teacher = ModelInfo(3, (6, 8, 10, 12), (4, 8, 16, 32), 6, 4, 4, "cnn")
    methods = build_offline(configs, *infos.values(), teacher) if kind == "offline" else build_online(configs, infos)
    assert isinstance(methods[name], load(name)) and methods[name].weights
    told = next(data for data in settings.methods if data["name"] == name)
    assert told.items() <= to_dict(methods[name].config).items()


def test_every_level_of_evidence_is_explained() -> None:
    assert tuple(manual.EVIDENCE) == get_args(Evidence)
