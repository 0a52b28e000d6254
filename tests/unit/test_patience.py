"""A service that is away is waited for, with a word, for so long and no longer."""

import logging
import threading

import pytest

from segdistill import patience
from segdistill.errors import Interrupted, UserError
from segdistill.patience import Patience


class Away(Exception):
    """The service does not answer."""


class Service:
    """Stays away for so many questions."""

    def __init__(self, times: float) -> None:
        self.times = times

    def ask(self) -> str:
        self.times -= 1
        if self.times >= 0:
            raise Away
        return "answer"


def outage(error: Exception) -> str | None:
    return "is away" if isinstance(error, Away) else None


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("segdistill"), "propagate", True)
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.001)
    caplog.set_level(logging.INFO, logger="segdistill")


def test_an_outage_is_waited_for_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    waiting = Patience("store", 60)
    assert [waiting.ask(Service(times).ask, outage) for times in (3, 0, 1)] == ["answer"] * 3
    away, back = "store: is away; trying for up to 60 seconds", "store: answers again"
    assert [record.message for record in caplog.records] == [away, back, away, back]


def test_a_service_that_stays_away_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"^store: is away; gave up after trying for 0\.01 seconds$"):
        Patience("store", 0.01).ask(Service(float("inf")).ask, outage)


def test_an_error_that_no_waiting_mends_goes_on_at_once() -> None:
    def act() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        Patience("store", 60).ask(act, outage)


def test_a_wish_to_stop_ends_the_waiting() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        Patience("store", 60, stop).ask(Service(float("inf")).ask, outage)
