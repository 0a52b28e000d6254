"""What a tuning searches, and the params file that it writes."""

import json
from pathlib import Path
from typing import Any

import pytest

from segdistill.config import flatten, parse, parse_yaml, read_yaml
from segdistill.errors import UserError
from segdistill.execution import check_params
from segdistill.plan import DistillConfig, ExperimentConfig, Job, cohort_plan
from segdistill.search import (
    Parameter,
    TuneConfig,
    parameters,
    trial_protocol,
    tuned_experiments,
    with_tuned_values,
    with_values,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def params() -> dict[str, Any]:
    return json.loads(json.dumps(read_yaml(ROOT / "params.yaml")))


def tune(params: dict[str, Any], **changes: Any) -> TuneConfig:
    config: TuneConfig = parse(TuneConfig, params["tune"] | changes, "tune")
    return config


def settings(params: dict[str, Any], name: str) -> ExperimentConfig:
    return cohort_plan(params["distill"], params["experiments"], [Job(name, 0)]).jobs[0].settings


def searched(params: dict[str, Any], name: str, **search: Any) -> dict[str, Parameter]:
    config = tune(params, search=params["tune"]["search"] | search)
    return {each.path: each for each in parameters(name, settings(params, name), config.search)}


def test_every_experiment_has_its_learning_rates_decays_and_warm_ups_searched(params: dict[str, Any]) -> None:
    for name, experiment in params["experiments"].items():
        paths = set(searched(params, name))
        for student in experiment["students"]:
            optimizer = f"students.{student}.optimizer"
            assert {f"{optimizer}.lr", f"{optimizer}.weight_decay", f"{optimizer}.schedule.warmup_fraction"} <= paths
        assert any(path.startswith("methods") for path in paths) == bool(experiment["methods"]), name


def test_the_present_settings_lie_in_every_range(params: dict[str, Any]) -> None:
    for name in params["experiments"]:
        found = searched(params, name, learning_rate=[2.0, 4.0], warmup=[0.5, 0.6])
        assert all(each.low <= each.present <= each.high for each in found.values())
        present = {path: each.present for path, each in found.items()}
        assert with_values(name, settings(params, name), present) == settings(params, name)


def test_what_is_null_or_zero_is_left_alone(params: dict[str, Any]) -> None:
    optimizer = params["experiments"]["none"]["students"]["cnn"]["optimizer"]
    optimizer["weight_decay"] = 0.0
    assert set(searched(params, "none", warmup=None)) == {"students.cnn.optimizer.lr"}


def test_each_term_of_a_method_can_be_searched_instead_of_all_at_once(params: dict[str, Any]) -> None:
    params["experiments"]["kd"]["methods"] = [{"name": "apd"}]
    assert "methods.0.weight" in searched(params, "kd")
    terms = {path for path in searched(params, "kd", terms=True) if path.endswith("_weight")}
    assert len(terms) > 1 and "methods.0.weight" not in searched(params, "kd", terms=True)


def test_a_value_that_another_setting_does_without_is_not_searched(params: dict[str, Any]) -> None:
    experiment = params["experiments"]["c2vkd_ce"]
    assert "methods.0.temperature" not in searched(params, "c2vkd_ce")
    experiment["methods"] = [{"name": "c2vkd", "pdd": "dkd"}]
    assert "methods.0.temperature" in searched(params, "c2vkd_ce")


def test_a_value_at_its_greatest_is_searched_all_the_same(params: dict[str, Any]) -> None:
    params["experiments"]["kd"]["methods"] = [{"name": "kd", "ramp": 1.0}]
    assert "methods.0.ramp" in searched(params, "kd")


def test_a_range_that_reaches_beyond_what_is_allowed_is_named(params: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^tune\.search\.learning_rate: reaches too far: .*lr: .*less than or equal"):
        searched(params, "none", learning_rate=[0.1, 1e5])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"experiments": ["nine"]}, "tune.experiments: 'nine' is not defined under experiments; did you mean 'none'?"),
        ({"experiments": ["kd", "kd"]}, "tune.experiments: repeats 'kd'; each may stand there once"),
        ({"trial": 3}, "tune.trial: unknown key; did you mean 'trials'?"),
        ({"search": {"weight": [2, 1]}}, "weight: the first bound must be below the second, not [2.0, 1.0]"),
    ],
)
def test_a_slip_in_the_section_is_one_sentence(params: dict[str, Any], changes: Any, sentence: str) -> None:
    if "search" in changes:
        changes["search"] = params["tune"]["search"] | changes["search"]
    params["tune"] |= changes
    with pytest.raises(UserError) as caught:
        check_params(params, networks="named")
    assert sentence in str(caught.value)


def test_the_section_may_be_absent(params: dict[str, Any]) -> None:
    del params["tune"]
    check_params(params, networks="named")


def test_a_trial_needs_a_budget_in_iterations(params: dict[str, Any]) -> None:
    params["distill"]["train"] |= {"iterations": None, "seconds": 60.0}
    distill: DistillConfig = parse(DistillConfig, params["distill"], "distill")
    with pytest.raises(UserError, match=r"tune\.iterations: null, but distill\.train has its budget in seconds"):
        trial_protocol(tune(params), distill)
    assert trial_protocol(tune(params, iterations=7), distill).train.iterations == 7


def test_experiments_are_those_that_run_unless_named(params: dict[str, Any]) -> None:
    assert tuned_experiments(tune(params), ["none", "kd"], params["experiments"]) == ["none", "kd"]
    assert tuned_experiments(tune(params, experiments=["kd"]), ["none"], params["experiments"]) == ["kd"]


@pytest.mark.parametrize(
    ("value", "log", "edge"),
    [(0.1, True, "lower"), (0.12, True, "lower"), (0.2, True, None), (9.0, True, "upper"), (5.0, False, None)],
)
def test_the_edge_of_a_range_is_its_last_twentieth(value: float, log: bool, edge: str | None) -> None:
    assert Parameter("methods.0.weight", "weight", 1.0, 0.1, 10.0, log).edge(value) == edge


def test_a_part_of_the_budget_cannot_be_less_than_none_of_it_or_more_than_all() -> None:
    ramp = Parameter("methods.0.ramp", "ramp", 0.0, 0.0, 1.0, log=False)
    assert (ramp.edge(0.0), ramp.edge(1.0)) == (None, None)
    assert Parameter("methods.0.ramp", "ramp", 0.1, 0.1, 0.5, log=False).edge(0.5) == "upper"


def test_experiments_that_share_a_student_are_tuned_apart_and_comments_stay(params: dict[str, Any]) -> None:
    text = (ROOT / "params.yaml").read_text()
    tuned = {
        "none": {"students.cnn.optimizer.lr": 0.123},
        "kd": {"students.cnn.optimizer.lr": 0.0123, "methods.0.ramp": 0.25, "methods.0.weight": 2e-05},
    }
    written = with_tuned_values(text, tuned)
    expected = flatten(params) | {
        "experiments.none.students.cnn.optimizer.lr": 0.123,
        "experiments.kd.students.cnn.optimizer.lr": 0.0123,
        "experiments.kd.methods.0.ramp": 0.25,
        "experiments.kd.methods.0.weight": 2e-05,
    }
    changed = parse_yaml(written, "written")
    assert flatten(changed) == expected
    check_params(changed, networks="named")
    comments = [line.partition("#")[2] for line in text.splitlines() if "#" in line]
    assert [line.partition("#")[2] for line in written.splitlines() if "#" in line] == comments
    assert with_tuned_values(text, {"none": {}}) == with_tuned_values(text, {})
