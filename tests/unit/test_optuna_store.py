"""Trials in their store: how many there are, who works on them, and what becomes of those whose process ends."""

import contextlib
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from segdistill.errors import UserError

optuna_store = pytest.importorskip("segdistill.adapters.optuna_store")
sqlalchemy_exc = pytest.importorskip("sqlalchemy.exc")
Range, Search, Session = optuna_store.Range, optuna_store.Search, optuna_store.Session

RANGES = {"lr": Range(0.01, 1.0, True), "ramp": Range(0.0, 1.0, False)}
PRESENT = {"lr": 0.1, "ramp": 0.0}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    with optuna_store.opened(None, tmp_path) as store:
        yield store


def search(store: Any, trials: int = 5, **changes: Any) -> Any:
    return Search(store, "kd", RANGES, PRESENT, **({"trials": trials, "seed": 0, "patience": None} | changes))


def test_the_first_trial_is_the_present_settings_and_the_others_lie_in_their_ranges(store: Any) -> None:
    first, *others = search(store).claim(5, Session())
    assert first.present and first.values == PRESENT and first.number == 0
    assert not any(trial.present for trial in others)
    assert all(0.01 <= trial.values["lr"] <= 1 and 0 <= trial.values["ramp"] <= 1 for trial in others)


def test_sessions_share_the_trials_without_doing_any_twice(store: Any) -> None:
    one, other = search(store), search(store)
    claims = [one.claim(2, Session()), other.claim(2, Session()), one.claim(2, Session()), other.claim(2, Session())]
    assert [len(trials) for trials in claims] == [2, 2, 1, 0]
    assert sorted(trial.number for trials in claims for trial in trials) == [0, 1, 2, 3, 4]
    assert len({trial.values["lr"] for trials in claims for trial in trials}) == 5


def test_who_asks_at_the_same_moment_as_another_leaves_no_trial_too_many(store: Any) -> None:
    one, other = search(store, trials=1), search(store, trials=1)
    other.study.enqueue_trial(PRESENT, user_attrs={"present": True})  # saw no trial yet, either
    assert len(one.claim(3, Session())) + len(other.claim(3, Session())) == 1
    assert [trial.present for trial in one.all()] == [True]


def test_a_trial_whose_process_has_ended_is_taken_up_with_its_values_and_counts_once(store: Any) -> None:
    lost = search(store)
    claimed = lost.claim(3, Session())
    lost.note(claimed[1].attempt, "miou-s0", {"cnn": 0.5})
    assert search(store).take_back() == [0, 1, 2]
    again = search(store).claim(9, Session())
    assert sorted(trial.number for trial in again)[:3] == [0, 1, 2] and len(again) == 5
    resumed = {trial.number: trial for trial in again}
    assert all(resumed[trial.number].values == trial.values for trial in claimed)
    assert resumed[1].notes["miou-s0"] == {"cnn": 0.5} and resumed[0].present
    assert len(search(store).all()) == 5


def test_a_trial_whose_process_lives_is_left_to_it(store: Any) -> None:
    alive = Session()
    with alive.held():
        search(store).claim(1, alive)
        assert search(store).take_back() == []
    assert search(store).take_back() == [0]


def test_a_trial_of_another_machine_is_left_to_it_while_its_heart_beats(store: Any) -> None:
    search(store).claim(1, Session(place="elsewhere"))
    assert search(store).take_back() == []
    from sqlalchemy import text

    with store.engine.begin() as connection:
        connection.execute(text("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00.000000'"))
    assert search(store).take_back() == [0]


def test_a_session_that_was_taken_for_dead_does_no_harm_to_who_has_its_trial_now(store: Any) -> None:
    slept, heir = search(store, trials=1), search(store, trials=1)
    (trial,) = slept.claim(1, Session())
    heir.take_back()
    (again,) = heir.claim(1, Session())
    slept.note(trial.attempt, "miou-s0", {"cnn": 0.1})
    slept.should_end(trial.attempt, 10, 0.1)
    slept.settle(trial.attempt, "finished", 0.1)
    slept.give_back(trial.attempt)
    assert [each.state for each in heir.all()] == ["running"]
    heir.settle(again.attempt, "finished", 0.2)
    assert [(each.number, each.score) for each in heir.all()] == [(0, 0.2)]


def test_a_diverged_trial_has_failed_and_is_not_tried_again(store: Any) -> None:
    one = search(store, trials=2)
    first, second = one.claim(2, Session())
    one.settle(first.attempt, "diverged")
    one.settle(second.attempt, "finished", 0.25)
    assert [(trial.state, trial.score) for trial in one.all()] == [("diverged", None), ("finished", 0.25)]
    assert one.take_back() == [] and one.claim(1, Session()) == []


def test_a_trial_is_pruned_below_the_median_of_those_that_were_finished_after_a_third(store: Any) -> None:
    one = search(store, trials=9, patience=30)
    first, *others = one.claim(5, Session())
    for score, trial in enumerate(others[:3]):
        assert not one.should_end(trial.attempt, 40, score / 10), "nothing to compare it with"
        one.settle(trial.attempt, "finished", score / 10)
    assert not one.should_end(others[3].attempt, 20, 0.05), "too early"
    assert one.should_end(others[3].attempt, 40, 0.05)
    assert not one.should_end(first.attempt, 40, 0.0), "the present settings are what others are compared with"
    never = search(store, trials=9)
    assert not never.should_end(others[3].attempt, 50, 0.0)


def test_what_is_drawn_does_not_depend_on_who_asks(tmp_path: Path) -> None:
    def drawn(folder: Path, counts: list[int], seed: int = 0) -> list[Any]:
        with optuna_store.opened(None, folder) as store:
            for count in counts:
                search(store, seed=seed).claim(count, Session())
            return [trial.values for trial in search(store).all()]

    alone = drawn(tmp_path / "alone", [4])
    assert drawn(tmp_path / "shared", [1, 2, 1]) == alone != drawn(tmp_path / "other", [4], seed=1)


def test_more_trials_later_go_on_from_those_that_are_there(store: Any) -> None:
    one = search(store, trials=2)
    for trial in one.claim(2, Session()):
        one.settle(trial.attempt, "finished", 0.1)
    assert [trial.number for trial in search(store, trials=3).claim(5, Session())] == [2]


def test_optunas_warnings_of_its_heartbeats_are_nobodys_business(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with optuna_store.opened(None, tmp_path) as store:
            one = search(store)
            (trial,) = one.claim(1, Session())
            assert one.take_back() == [trial.number], "its session was never held"
    said = [str(warning.message) for warning in caught]
    assert not [text for text in said if "xperimental" in text or "eartbeat" in text], said


def test_importance_is_told_of_enough_trials_only(store: Any) -> None:
    one = search(store, trials=12)
    for trial in one.claim(9, Session()):
        one.settle(trial.attempt, "finished", trial.values["lr"])
    assert one.importances() is None
    for trial in one.claim(3, Session()):
        one.settle(trial.attempt, "finished", trial.values["lr"])
    importances = one.importances()
    assert set(importances) == {"lr", "ramp"} and importances["lr"] > importances["ramp"]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("postgresql://me:hunter2@db/trials", "tune.storage: a password in it; give it as SEGDISTILL_TUNE_PASSWORD"),
        ("no url", "tune.storage: 'no url' is not the URL of a database, such as postgresql://me@host/trials"),
        ("mysql+nodriver://db/trials", "tune.storage: the store cannot be opened"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_sentence_without_secrets(
    url: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGDISTILL_TUNE_PASSWORD", "hunter3")
    with pytest.raises(UserError) as caught, optuna_store.opened(url, tmp_path):
        pass
    assert str(caught.value).startswith(sentence) and "hunter" not in str(caught.value)


def test_tables_that_another_process_is_making_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, pauses = optuna_store.RDBStorage, list[float]()

    def half_made(*given: Any, **more: Any) -> Any:
        if len(pauses) < 2:
            raise sqlalchemy_exc.IntegrityError("CREATE TABLE studies", {}, Exception("it is there already"))
        return made(*given, **more)

    monkeypatch.setattr(optuna_store, "RDBStorage", half_made)
    monkeypatch.setattr(optuna_store.time, "sleep", pauses.append)
    with optuna_store.opened(None, tmp_path) as store:
        assert store.get_all_studies() == []
    assert len(pauses) == 2


def test_a_database_of_another_program_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "trials.db")) as mlflow:
        mlflow.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        mlflow.commit()
        refusal = pytest.raises(UserError, match="tables of another program, such as MLflow")
        with refusal, optuna_store.opened(None, tmp_path):
            pass
        assert mlflow.execute("SELECT name FROM sqlite_master").fetchall() == [("alembic_version",)]


def test_what_waiting_does_not_mend_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna_store.time, "sleep", lambda pause: pytest.fail("waited"))
    with pytest.raises(UserError), optuna_store.opened("postgresql+pg8000://me@127.0.0.1/trials", tmp_path):
        pass
