"""What may stand in a YAML file, and what a number of a config may be."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segdistill.config import parse, parse_yaml, read_yaml
from segdistill.errors import UserError
from segdistill.execution import stage_module
from segdistill.methods import METHODS, load
from segdistill.plan import DistillConfig, ExperimentConfig
from segdistill.stages import STAGES


def test_numbers_in_decimal_are_numbers_however_they_are_written() -> None:
    text = "a: 1e-4\nb: [1.5, .5, -0, 1_000, +3, 1.e3, 2E5, 0]"
    assert parse_yaml(text, "x") == {"a": 1e-4, "b": [1.5, 0.5, 0, 1000, 3, 1000.0, 2e5, 0]}
    assert parse_yaml("a: 2024-01-01\nb: '010'\nc: true", "x") == {"a": "2024-01-01", "b": "010", "c": True}
    assert parse_yaml("a: &one {k: 1}\nb: {<<: *one, l: 2}", "x")["b"] == {"k": 1, "l": 2}


BOMB = "b0: &b0 [x]\n" + "".join(f"b{n}: &b{n} [*b{n - 1}, *b{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: 010", "x, line 2: not valid YAML: '010' is no number in plain decimal digits"),
        ("a: 0x1f", "'0x1f' is no number in plain decimal"),
        ("a: 12:30", "'12:30' is no number in plain decimal"),
        ("a: .inf", "'.inf' is no number in plain decimal"),
        ("a: " + "9" * 5000, "x, line 1: not valid YAML: Exceeds the limit (4300 digits)"),
        ("a: !!timestamp 2024-13-45", "x, line 1: not valid YAML: month must be in 1..12"),
        ("a: !!int x", "x, line 1: not valid YAML: invalid literal"),
        ("a: !!python/object:os.system x", "could not determine a constructor for the tag"),
        ("a: [" + "[" * 5000, "nested too deeply"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("a: &a [*a]", "an anchor that contains itself"),
        (BOMB, "more than 100000 values"),
        ("a:\n  b: 1\n  c: 2\n  b: 3", "x, line 4: not valid YAML: the key 'b' stands twice in one mapping"),
        ("a: \x00", "x, line 1: not valid YAML: the character '\\x00' may not stand there"),
        ("? [1]\n: 2", "found unhashable key"),
        ("a: 1\n---\nb: 2", "but found another document"),
        ("- 1", "x: expected a mapping of sections, found list"),
        ("", "x: expected a mapping of sections, found NoneType"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_with_its_line(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "x")
    assert sentence in str(caught.value) and str(caught.value).isprintable()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(alphabet="ab01:.-+_e [],{}#&*!<|>?%@'\"\\\n\t~=é\x85\ud800", max_size=40))
def test_any_text_is_a_mapping_or_refused_in_one_sentence(text: str) -> None:
    for written in (text, f"a: {text}", f"a: !!{text}"):
        try:
            assert isinstance(parse_yaml(written, "x"), dict)
        except UserError as error:
            assert str(error).isprintable()


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "large.yaml").write_bytes(b"a: 1\n" * 300_000)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4")
    for name, sentence in [
        ("pipe.yaml", "a named pipe; expected a regular file"),
        ("folder.yaml", "a folder; expected a regular file"),
        ("large.yaml", "at most 1 MiB"),
        ("latin.yaml", "not UTF-8"),
        ("fold.yaml", "no such file; did you mean 'folder.yaml'"),
    ]:
        with pytest.raises(UserError, match=sentence):
            read_yaml(tmp_path / name)


def test_a_value_is_not_taken_for_what_it_is_not() -> None:
    for cls, value in [
        (int, True),
        (int, "1"),
        (int, 1.0),
        (float, True),
        (float, "1"),
        (bool, 1),
        (str, 1),
        (list[int], "12"),
    ]:
        with pytest.raises(UserError):
            parse(cls, value, "key")
    assert parse(float, 1, "key") == 1.0
    assert parse(tuple[int, ...], [1, 2], "key") == (1, 2)
    assert parse(Path, "a/b", "key") == Path("a/b")


@pytest.mark.parametrize("value", [b"x", {1: 2}, {"a": {True: 1}}, "\ud800", float("inf"), 10**400, [object()]])
def test_what_json_cannot_say_is_refused_where_it_stands(value: Any) -> None:
    with pytest.raises(UserError, match=r"^key"):
        parse(Any, value, "key")


# Ranges


def roots() -> dict[str, Any]:
    """Every config that a person fills in."""
    from pipelines.cluster import Cluster

    stages = {stage.params[0]: stage_module(stage).Config for stage in STAGES if stage.params}
    return {
        **stages,
        "distill": DistillConfig,
        "experiments": ExperimentConfig,
        **{name: load(name).Config for name in METHODS},
        "cluster": Cluster,
    }


def unbounded(schema: Any, path: str) -> Iterator[str]:
    """The paths in a JSON schema at which a number has no least or no greatest value."""
    if isinstance(schema, list):
        for index, inner in enumerate(schema):
            yield from unbounded(inner, f"{path}.{index}")
    if not isinstance(schema, dict):
        return
    if schema.get("type") in ("integer", "number") and not {"enum", "const"} & set(schema):
        least, most = {"minimum", "exclusiveMinimum"} & set(schema), {"maximum", "exclusiveMaximum"} & set(schema)
        if not (least and most):
            yield path
    for key, inner in schema.items():
        if key not in ("default", "enum"):
            yield from unbounded(inner, f"{path}.{key}")


@pytest.mark.parametrize("name", sorted(roots()))
def test_every_number_of_every_config_has_a_least_and_a_greatest_value(name: str) -> None:
    schema = pydantic.TypeAdapter(roots()[name]).json_schema()
    assert json.dumps(schema).count('"type": "') > 1, "there is something to look at"
    assert list(unbounded(schema, name)) == []


def test_the_walk_over_configs_sees_a_number_without_a_bound() -> None:
    @dataclasses.dataclass
    class Inner:
        sides: tuple[float, float] | None

    @dataclasses.dataclass
    class Outer:
        inner: dict[str, list[Inner]]

    assert len(list(unbounded(pydantic.TypeAdapter(Outer).json_schema(), "x"))) == 2
