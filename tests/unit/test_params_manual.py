"""What ``segdistill params`` and docs/params.md say, against the configs themselves."""

from pathlib import Path

import pytest

from segdistill.__main__ import main
from segdistill.commands.params import keys, markdown, sections
from segdistill.config import flatten, read_yaml

ROOT = Path(__file__).resolve().parents[2]


def test_every_key_says_what_it_means() -> None:
    for section in sections():
        for parameter in section.parameters:
            where = f"{section.config.__module__}.{section.config.__qualname__}.{parameter.name}"
            assert parameter.meaning, f"{where}: write a docstring of one sentence under the field, with its unit"
            assert parameter.allowed and parameter.default, where


def test_every_key_of_params_yaml_and_the_presets_is_in_the_manual(capsys: pytest.CaptureFixture[str]) -> None:
    known = keys()
    for path in (ROOT / "params.yaml", *(ROOT / "presets").glob("*.yaml")):
        for key in flatten(read_yaml(path)):
            parts = key.split(".")
            if parts[0] == "experiments":
                parts[1] = "NAME"
                parts[3:4] = ["STUDENT"] if parts[2] == "students" else parts[3:4]
            if parts[-1] == "name" or "methods" in parts:
                continue  # which variant it is, and what docs/methods.md says
            place = ".".join(parts)
            whole = place in known or place.partition(".decoder.")[0] + ".decoder" in known
            assert whole, f"{path.name}: {key}"


def test_the_document_is_what_the_configs_say() -> None:
    written = (ROOT / "docs/params.md").read_text(encoding="utf-8")
    assert written == markdown(), "run: python -m segdistill params --markdown > docs/params.md"


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("distill.train.iterations", ["optimiser steps", "integer ≥ 1", "; params.yaml: ", "matters to: distill"]),
        ("experiments.kd.students.cnn.model.encoder", ["timm model", "params.yaml: mobilenetv3_small_050"]),
        ("evaluate.inference", ["window_stride", "number ≥ 0.1, ≤ 1", "input_scale"]),
        ("validate", ["max_ignore_fraction", "required", "number ≥ 0, ≤ 1"]),
        ("encoder_weights", ["train_teacher.model.encoder_weights", "imagenet", "default: none"]),
        ("seeds", ["trained once with each", "matters to: distill"]),
    ],
)
def test_a_key_or_a_section_is_shown_with_its_bounds_and_its_value(
    key: str, parts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["params", key]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in parts:
        assert part in said


def test_all_sections_are_listed_without_escape_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params"]) == 0
    said = capsys.readouterr().out
    for section in ("run", "seeds", *read_yaml(ROOT / "params.yaml")):
        assert section in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("distill.train.iteration", "no such parameter; did you mean 'distill.train.iterations'?"),
        ("iteratons", "no such parameter; did you mean 'iterations'?"),
        ("experiments.kd.methods.0.temperature", "the parameters of a method: segdistill methods NAME"),
    ],
)
def test_an_unknown_key_is_answered_with_its_neighbour(
    key: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["params", key]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
