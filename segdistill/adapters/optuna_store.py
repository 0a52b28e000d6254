"""The trials of a search in Optuna's SQL store, shared by any number of processes.

A trial is claimed by one session, which is a process with what it started. Who finds a trial whose session has ended,
at once on the same machine and after :data:`GRACE_SECONDS` without a heartbeat from another one, hands it back; it then
waits, with its values, for the next who asks. So each trial has one number, that of its first claim, whatever became of
the processes that worked on it, and counts once.
"""

import contextlib
import datetime
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from segdistill import environment
from segdistill.errors import UserError, brief
from segdistill.files import lock
from segdistill.secrets import masked_text

if TYPE_CHECKING:
    from sqlalchemy import URL

optuna.logging.set_verbosity(optuna.logging.WARNING)

HEARTBEAT_SECONDS, GRACE_SECONDS = 30, 120
EXAMPLE = "postgresql://me@host/trials, without its password, which is that of SEGDISTILL_TUNE_PASSWORD"
# Random ones before the sampler learns from them, and finished ones before anything is pruned.
RANDOM_TRIALS, BEFORE_PRUNING = 4, 3
FEWEST_FOR_IMPORTANCE = 10  # finished trials, or twice as many as parameters


@dataclass(frozen=True)
class Trial:
    """One choice of values, and what became of it."""

    number: int
    state: Literal["finished", "pruned", "diverged", "running", "waiting"]
    values: Mapping[str, float]
    score: float | None  # of a finished one
    notes: Mapping[str, Any]
    present: bool = False  # whether it is the present settings
    attempt: int = field(default=0, compare=False)  # Optuna's number

    @property
    def settled(self) -> bool:
        """Whether nothing more will become of it."""
        return self.state in ("finished", "pruned", "diverged")


@dataclass(frozen=True)
class Range:
    """The values of one parameter, ends included."""

    low: float
    high: float
    log: bool


def _here() -> str:
    """This machine, or this container, which may have the machine's name: by the folder in which sessions are seen."""
    folder = Path(tempfile.gettempdir())
    return f"{socket.gethostname()} {folder} {folder.stat().st_dev} {folder.stat().st_ino} {os.getuid()}"


@dataclass(frozen=True)
class Session:
    """A process that works on trials: another one of the same machine can see whether it lives."""

    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    place: str = field(default_factory=_here)

    @property
    def _folder(self) -> Path:
        return Path(tempfile.gettempdir()) / f"segdistill-tune-{self.name}"  # locked, never made

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For as long as the session lasts."""
        with lock(self._folder, "segdistill tune"):
            yield

    def has_ended(self) -> bool:
        """Whether it is known to have: of another machine's, nobody here knows."""
        if self.place != Session().place:
            return False
        try:
            with lock(self._folder, "segdistill tune"):
                return True
        except UserError:
            return False


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps to itself that heartbeats are new to Optuna, and that they are meant for its own loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        yield


def address(storage: str | None, folder: Path) -> "URL":
    """Where the store is.

    Args:
        storage: the URL of a database without its password; None is a SQLite file in ``folder``.
        folder: of that file.

    Raises:
        UserError: the URL is none, or has a password in it.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(storage or f"sqlite:///{folder.resolve() / 'trials.db'}")
    except ArgumentError:
        raise UserError(
            f"tune.storage: '{brief(masked_text(str(storage)))}' is not the URL of a database, such as {EXAMPLE}"
        ) from None
    if url.password is not None:
        raise UserError("tune.storage: a password in it; give it as SEGDISTILL_TUNE_PASSWORD instead")
    return url


def require_server(storage: str | None) -> None:
    """Refuses a store that several machines cannot share.

    SQLite keeps its readers and writers apart by locks on its file, of which network file systems keep some, none, or
    those of one machine; its authors advise against it (sqlite.org/useovernet.html), and so does Optuna.

    Raises:
        UserError: it is a SQLite file.
    """
    if address(storage, Path()).get_backend_name() == "sqlite":
        raise UserError(
            f"tune.storage: '{storage or 'null'}' is a SQLite file, which several machines cannot share, on no volume; "
            f"give a database's URL, such as {EXAMPLE}"
        )


@contextlib.contextmanager
def opened(storage: str | None, folder: Path) -> Iterator[RDBStorage]:
    """The store; opened by each process for itself, since a connection does not survive a fork.

    Args:
        storage, folder: see :func:`address`.

    Raises:
        UserError: see :func:`address`; or the database does not answer, or no longer.
    """
    from sqlalchemy.exc import SQLAlchemyError

    url = address(storage, folder)
    if url.get_backend_name() == "sqlite":
        folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"connect_args": {"timeout": 60}}  # others write, too
    else:
        options = {"pool_pre_ping": True}  # hours may lie between two questions, in which servers hang up
        if password := environment.tune_password():
            url = url.set(password=password)
    try:
        store = _connected(url.render_as_string(hide_password=False), options)
    except (SQLAlchemyError, StorageInternalError, ImportError, RuntimeError) as error:
        raise UserError(f"tune.storage: the store cannot be opened: {_reason(error)}") from None
    try:
        yield store
    except (SQLAlchemyError, StorageInternalError) as error:
        raise UserError(f"tune.storage: the store no longer answers: {_reason(error)}") from None
    finally:
        store.remove_session()
        store.engine.dispose()


def _reason(error: Exception) -> str:
    """What a database, or its driver, says, in one line without secrets."""
    first = error.__cause__ or error  # Optuna says where, and the cause says what
    return masked_text(" ".join(str(first).split()))[:300]


def _connected(url: str, options: dict[str, Any]) -> RDBStorage:
    """The store, its tables made; several processes may make them at once, of which one succeeds.

    Raises:
        UserError: the database has the tables of another program.
    """
    from sqlalchemy import create_engine, inspect
    from sqlalchemy.exc import SQLAlchemyError

    for pause in (0.5, 1.0, 2.0, None):
        engine = create_engine(url, **options)
        try:
            tables = set(inspect(engine).get_table_names())  # what cannot be mended fails here, at once
        finally:
            engine.dispose()
        # MLflow and Optuna both keep their tables' version in one of this name; Optuna makes it last.
        if "alembic_version" in tables and "version_info" not in tables:
            raise UserError(
                "tune.storage: the database has the tables of another program, such as MLflow; the trials need one of "
                "their own (CREATE DATABASE trials)"
            )
        try:
            with _without_warnings():
                return RDBStorage(
                    url, options, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS,
                    heartbeat_stale_trial_callback=_take_back,
                )  # fmt: skip
        except (SQLAlchemyError, StorageInternalError):
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError


class Search:
    """The trials of one experiment.

    Args:
        store: see :func:`opened`.
        name: says all that decides what a trial gives; another search has another name.
        ranges: of the parameters, by name.
        present: their present values, the first trial.
        trials: how many there shall be.
        seed: of what is drawn.
        patience: the iteration before which nothing is pruned; None never prunes.
    """

    def __init__(
        self,
        store: RDBStorage,
        name: str,
        ranges: Mapping[str, Range],
        present: Mapping[str, float],
        *,
        trials: int,
        seed: int,
        patience: int | None,
    ) -> None:
        pruner = (
            optuna.pruners.NopPruner()
            if patience is None
            else optuna.pruners.MedianPruner(n_startup_trials=BEFORE_PRUNING, n_warmup_steps=patience)
        )
        self.store, self.trials = store, trials
        self.study = optuna.create_study(
            storage=store, study_name=name, sampler=_Sampler(seed), pruner=pruner, direction="maximize",
            load_if_exists=True,
        )  # fmt: skip
        self.ranges = {key: FloatDistribution(each.low, each.high, log=each.log) for key, each in ranges.items()}
        if not self._attempts():
            self.study.enqueue_trial(dict(present), user_attrs={"present": True})

    # -- who does what ------------------------------------------------------------------------------------------------

    def claim(self, count: int, session: Session) -> list[Trial]:
        """At most so many trials for this session alone."""
        claimed: list[Trial] = []
        while len(claimed) < count and self._open():
            with _without_warnings():
                attempt = self.study.ask(self.ranges)
            identifier = self._identifier(attempt.number)
            if not self._counts(attempt.number):
                self.store.set_trial_user_attr(identifier, "surplus", True)
                self.study.tell(attempt.number, state=TrialState.FAIL)
                continue
            self.store.record_heartbeat(identifier)
            number = attempt.user_attrs.get("number", attempt.number)
            notes = {"number": number, "session": session.name, "place": session.place}
            for key, value in notes.items():
                self.store.set_trial_user_attr(identifier, key, value)
            claimed.append(_trial(self.study.trials[attempt.number]))
        return claimed

    def take_back(self) -> list[int]:
        """Hands back the trials whose session has ended; their numbers."""
        before = {trial.number for trial in self.all() if trial.state == "running"}
        with _without_warnings():
            fail_stale_trials(self.study)
        # Between a claim and its first heartbeat there is but a moment; who was killed in it leaves neither.
        latest = datetime.datetime.now() - datetime.timedelta(seconds=GRACE_SECONDS)
        for attempt in self._attempts():
            notes = attempt.user_attrs
            if attempt.state != TrialState.RUNNING:
                continue
            unborn = "session" not in notes and attempt.datetime_start is not None and attempt.datetime_start < latest
            if unborn or ("session" in notes and Session(notes["session"], notes["place"]).has_ended()):
                self.give_back(attempt.number)
        return sorted(before - {trial.number for trial in self.all() if trial.state == "running"})

    def give_back(self, attempt: int) -> None:
        """Lets another session go on with a trial that is not settled."""
        try:
            done = not self.store.set_trial_state_values(self._identifier(attempt), TrialState.FAIL)
        except UpdateFinishedTrialError:
            done = True
        if not done:
            _take_back(self.study, self.study.trials[attempt])

    def _open(self) -> bool:
        attempts = self._attempts()
        waiting = any(attempt.state == TrialState.WAITING for attempt in attempts)
        return waiting or sum(map(_is_first, attempts)) < self.trials

    def _counts(self, number: int) -> bool:
        """Whether a trial is one of those that there shall be: the first ones, by the store's numbers."""
        attempts = {attempt.number: attempt for attempt in self._attempts()}
        attempt = attempts[number]
        if not _is_first(attempt):
            return True  # in place of one that counted
        before = [other for other in attempts.values() if other.number < number and _is_first(other)]
        twice = attempt.user_attrs.get("present") and any(other.user_attrs.get("present") for other in before)
        return len(before) < self.trials and not twice

    # -- what becomes of a trial --------------------------------------------------------------------------------------

    def note(self, attempt: int, key: str, value: Any) -> None:
        """Keeps something with a trial, if it is not another session's by now."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self.store.set_trial_user_attr(self._identifier(attempt), key, value)

    def notes(self, attempt: int) -> Mapping[str, Any]:
        """What was kept with a trial."""
        return self.study.trials[attempt].user_attrs

    def should_end(self, attempt: int, iteration: int, score: float) -> bool:
        """Takes a validation's score; whether it is below the median of those that were finished."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self.store.set_trial_intermediate_value(self._identifier(attempt), iteration, score)
        seen = self.study.trials[attempt]
        return not seen.user_attrs.get("present") and self.study.pruner.prune(self.study, seen)

    def settle(
        self, attempt: int, state: Literal["finished", "pruned", "diverged"], score: float | None = None
    ) -> None:
        """Ends a trial; one that another session has settled meanwhile stays as it is."""
        if state == "diverged":
            self.note(attempt, "diverged", True)
        states = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "diverged": TrialState.FAIL}
        values = [score] if state == "finished" and score is not None else None
        with contextlib.suppress(UpdateFinishedTrialError):
            self.store.set_trial_state_values(self._identifier(attempt), states[state], values)

    # -- what there is ------------------------------------------------------------------------------------------------

    def all(self) -> list[Trial]:
        """Every trial, by number; of one that was handed on, its last attempt."""
        latest: dict[int, Trial] = {}
        for attempt in self._attempts():
            trial = _trial(attempt)
            died = attempt.state == TrialState.FAIL and trial.state != "diverged"
            if not died and not attempt.user_attrs.get("surplus"):
                latest[trial.number] = trial
        return [latest[number] for number in sorted(latest)]

    def importances(self) -> Mapping[str, float] | None:
        """The share of each parameter in the scores' variance (fANOVA), the largest first; None: too few trials."""
        finished = [trial for trial in self.all() if trial.state == "finished"]
        if len(finished) < max(FEWEST_FOR_IMPORTANCE, 2 * len(self.ranges)) or len({t.score for t in finished}) < 2:
            return None
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return optuna.importance.get_param_importances(self.study, evaluator=evaluator)

    def _attempts(self) -> Sequence[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _identifier(self, attempt: int) -> int:
        return self.store.get_trial_id_from_study_id_trial_number(
            self.store.get_study_id_from_name(self.study.study_name), attempt
        )


class _Sampler(optuna.samplers.TPESampler):
    """What a trial draws depends on the seed and on the trials before it, and not on who asks, or how often."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        super().__init__(n_startup_trials=RANDOM_TRIALS, seed=seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        before = sum(_is_first(other) for other in study.get_trials(deepcopy=False) if other.number < trial.number)
        seed = zlib.crc32(f"{self._seed} {study.study_name} {before}".encode())
        super().__init__(n_startup_trials=RANDOM_TRIALS, seed=seed)
        super().before_trial(study, trial)


def _trial(attempt: FrozenTrial) -> Trial:
    notes = attempt.user_attrs
    states: dict[TrialState, Any] = {
        TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.RUNNING: "running",
        TrialState.WAITING: "waiting", TrialState.FAIL: "diverged" if notes.get("diverged") else "waiting",
    }  # fmt: skip
    return Trial(
        notes.get("number", attempt.number), states[attempt.state], attempt.params,
        attempt.value if attempt.state == TrialState.COMPLETE else None, notes, bool(notes.get("present")),
        attempt.number,
    )  # fmt: skip


def _is_first(attempt: FrozenTrial) -> bool:
    """Whether it is a trial's first attempt, and no trial too many."""
    return "failed_trial" not in attempt.system_attrs and not attempt.user_attrs.get("surplus")


def _take_back(study: optuna.Study, attempt: FrozenTrial) -> None:
    logging.getLogger(__name__).info(
        "%s: trial %s was not finished; it is taken up again", study.study_name, attempt.user_attrs.get("number")
    )
    with _without_warnings():
        RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(study, attempt)


@contextlib.contextmanager
def heartbeats(storage: str | None, folder: Path, attempts: Mapping[str, Iterable[int]]) -> Iterator[None]:
    """Says from time to time, in a thread with a connection of its own, that the session of these trials lives.

    Args:
        storage, folder: see :func:`opened`.
        attempts: by the name of their search.
    """
    from sqlalchemy.exc import SQLAlchemyError

    ended = threading.Event()
    with opened(storage, folder) as store:
        identifiers = [
            store.get_trial_id_from_study_id_trial_number(store.get_study_id_from_name(name), attempt)
            for name, several in attempts.items() for attempt in several
        ]  # fmt: skip

        def work() -> None:
            while not ended.wait(HEARTBEAT_SECONDS):
                # A server that is away for a moment is no reason to fall silent for good.
                with contextlib.suppress(SQLAlchemyError, StorageInternalError):
                    for identifier in identifiers:
                        store.record_heartbeat(identifier)
            store.remove_session()  # each thread has its own

        thread = threading.Thread(target=work, name="heartbeats", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
