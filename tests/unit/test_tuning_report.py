"""What the page of a tuning says of its trials."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from segdistill.config import parse, read_yaml
from segdistill.report.tuning import Report, Result, as_json, markdown, page
from segdistill.search import Parameter, TuneConfig

ROOT = Path(__file__).resolve().parents[2]
RATE = Parameter("students.cnn.optimizer.lr", "learning_rate", 0.1, 0.01, 1.0, log=True)


def trial(number: int, score: float | None, rate: float, state: str = "finished") -> Any:
    why = {} if state == "finished" else {"why": "ce is not finite <by> iteration 20"}
    return SimpleNamespace(
        number=number, state=state, score=score, values={RATE.path: rate}, notes=why, present=not number
    )


def report(*trials: Any, importances: Any = None) -> Report:
    config: TuneConfig = parse(TuneConfig, read_yaml(ROOT / "params.yaml")["tune"], "tune")
    return Report("0123abcd", config, 180, [Result("kd", [RATE], trials, importances)])


def test_a_better_trial_is_taken_with_its_gain_and_the_edge_it_lies_on() -> None:
    said = report(trial(0, 0.25, 0.1), trial(1, 0.275, 0.98765), trial(2, 0.2, 0.05))
    assert said.results[0].tuned == {RATE.path: 0.988}
    assert said.results[0].gain == pytest.approx(0.025)
    assert said.findings[0].endswith("for 1 of 1 experiments: kd +2.5 points of validation mIoU.")
    (edge,) = said.edges
    assert edge.startswith("kd: the best cnn learning rate, 0.988, lies at the upper edge of its range 0.01 to 1")
    assert edge in page(said) and edge in markdown(said) and "20.0 / 25.0 / 27.5" in markdown(said)


def test_the_present_settings_stay_where_nothing_is_better() -> None:
    for trials in ([trial(0, 0.25, 0.1), trial(1, 0.25, 0.5)], [trial(0, None, 0.1, "diverged")]):
        said = report(*trials)
        assert said.results[0].tuned == {} and "the present settings stay" in " ".join(said.findings)
        assert "<svg" in page(said)


def test_what_diverged_says_so_and_does_not_spoil_the_page() -> None:
    said = report(trial(0, None, 0.1, "diverged"), trial(1, 0.2, 0.5))
    assert "kd diverged, and the tuned ones did not" in " ".join(said.findings)
    assert "trial 0: diverged: ce is not finite" in markdown(said)
    assert "not finite &lt;by&gt; iteration" in page(said)
    assert as_json(said)["experiments"]["kd"]["each"][0]["why"].startswith("ce is not finite")


def test_importance_is_told_or_why_it_is_not() -> None:
    trials = [trial(0, 0.25, 0.1), trial(1, 0.3, 0.2)]
    assert "too few trials" in markdown(report(*trials))
    assert "too few finished trials" in page(report(*trials))
    assert "| 100.0 % |" in markdown(report(*trials, importances={RATE.path: 1.0}))
