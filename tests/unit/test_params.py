# ruff: noqa: E501
"""params.yaml and the presets: every shipped configuration loads, and every slip in one is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from segdistill.config import read_yaml
from segdistill.errors import UserError
from segdistill.execution import check_params
from segdistill.stages import Job, jobs
from segdistill.stages.distill import ExperimentConfig, parse_methods

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_loads_with_its_methods(path: Path) -> None:
    from segdistill.config import parse

    params = read_yaml(path)
    check_params(params)
    for name, experiment in params["experiments"].items():
        parse_methods(name, parse(ExperimentConfig, experiment, name))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_has_the_undistilled_student_of_each_experiment(path: Path) -> None:
    params = read_yaml(path)
    alone = [
        entry["students"]
        for name, entry in params["experiments"].items()
        if not entry["methods"] and name in params["run"]
    ]
    for name in params["run"]:
        for student, settings in params["experiments"][name]["students"].items():
            assert {student: settings} in alone, f"{name}: nobody trained its '{student}' without distillation"


def changed(path: str, value: Any, *, rename: str = "") -> dict[str, Any]:
    """params.yaml with one key set, or renamed."""
    params = json.loads(json.dumps(read_yaml(ROOT / "params.yaml")))  # anchors become copies
    *parents, last = path.split(".")
    section: Any = params
    for part in parents:
        section = section[part]
    if rename:
        section[rename] = section.pop(last)
    else:
        section[last] = value
    return params


@pytest.mark.parametrize(
    ("path", "rename", "sentence"),
    [
        ("distill", "destill", "destill: unknown section; did you mean 'distill'?"),
        ("train_teacher.optimizer.lr", "lrr", "train_teacher.optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("train_teacher.train.batch_size", "batchsize", "train_teacher.train.batchsize: unknown key; did you mean 'batch_size'?"),
        ("experiments.kd.students.cnn.model.encoder", "encodr", "experiments.kd.students.cnn.model.encodr: unknown key; did you mean 'encoder'?"),
        ("distill.train.augmentation.flip", "flips", "distill.train.augmentation.flips: unknown key; did you mean 'flip'?"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_named_with_its_neighbour(path: str, rename: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check_params(changed(path, None, rename=rename))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        ("distill.train.iterations", "many", "distill.train.iterations: input should be a valid integer"),
        ("distill.train.seconds", 5.0, "give the budget either as iterations or as seconds"),
        ("distill.train.precision", "fp8", "distill.train.precision: 'fp8' is not allowed; allowed: 'fp32', 'bf16' or 'fp16'"),
        ("train_teacher.optimizer.name", "adma", "train_teacher.optimizer.name: unknown name 'adma'; did you mean 'adam'?"),
        ("seeds", [0, 0], "seeds: [0, 0] repeats a value"),
        ("seeds", [], "seeds: empty; name at least one"),
        ("run", ["none", "kdd"], "run: 'kdd' is not defined under experiments; did you mean 'kd'?"),
        ("evaluate.overlays", -1, "evaluate.overlays: input should be greater than or equal to 0"),
        ("train_teacher.model.output_stride", 12, "train_teacher.model.output_stride: 12 is not allowed; allowed: 8, 16 or 32"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_allowed(path: str, value: Any, part: str) -> None:
    with pytest.raises(UserError) as caught:
        check_params(changed(path, value))
    assert part in str(caught.value)


def test_a_missing_section_is_named() -> None:
    params = read_yaml(ROOT / "params.yaml")
    del params["compare"]
    with pytest.raises(UserError, match="compare: missing"):
        check_params(params)


def test_an_unknown_method_and_a_wrong_mix_are_refused() -> None:
    from segdistill.config import parse

    def experiment(name: str, methods: list[dict[str, Any]]) -> ExperimentConfig:
        entry = read_yaml(ROOT / "params.yaml")["experiments"][name] | {"methods": methods}
        return parse(ExperimentConfig, entry, name)

    for name, methods, sentence in [
        ("kd", [{"name": "kdd"}], "experiments.kd.methods.0.name: unknown method 'kdd'; did you mean 'kd'?"),
        ("kd", [{"name": "kd", "temprature": 2}], "experiments.kd.methods.0.temprature: unknown key; did you mean 'temperature'?"),
        ("kd", [{"name": "dml"}], "online methods need two students or more, not 1"),
        ("dml", [{"name": "kd"}], "offline methods teach one student, not 2"),
        ("dml", [{"name": "kd"}, {"name": "dml"}], "offline and online methods do not go together"),
        ("dml", [], "2 students and no method between them"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as caught:
            parse_methods(name, experiment(name, methods))
        assert sentence in str(caught.value)


def test_the_matrix_is_every_experiment_with_every_seed() -> None:
    params = {"run": ["a", "b"], "seeds": [3, 1], "experiments": {"a": {}, "b": {}, "unused": {}}}
    assert jobs(params) == [Job("a", 3), Job("a", 1), Job("b", 3), Job("b", 1)]
