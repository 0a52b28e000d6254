"""Runs in MLflow that survive the store's absence.

Every number is first a line in a local file, the spool; a background thread sends the lines in batches every few
seconds. Training only ever appends a line: it does not wait for the store and does not die of it. What could not be
sent before the end stays in the spool, and ``segdistill sync <spool folder>`` sends it later. Repeating is harmless: a
metric keeps its own time, and MLflow takes the same (name, step, time, value) once.

A spool folder holds, for each run: ``<name>.jsonl`` (the lines of :class:`JsonLinesTracker`), ``<name>.meta.json``
(which run, in which store), ``<name>.position.json`` (how much was sent), ``<name>.files/`` (artifacts not yet sent)
and, only if the store refused something for good, ``<name>.refused.jsonl``.
"""

import logging
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segdistill.adapters.mlflow_names import file_name
from segdistill.adapters.mlflow_spool import Kind, Sender, Spool
from segdistill.adapters.mlflow_store import (
    DatasetFacts,
    Store,
    check_name,
    default_store,
    finish_parent,
    main_copy,
    one_line,
)
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.secrets import masked, masked_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the runs of one process have in common."""

    store: Store
    spool: Path  # the folder for what is not sent yet
    pipeline_run: str  # names the pipeline execution, and with it the parent run
    tags: Mapping[str, str] = field(default_factory=dict)  # such as data_md5, git_commit, stage, experiment, seed
    dataset: DatasetFacts | None = None
    interval: float = 2.0  # seconds between two batches
    flush_seconds: float = 60.0  # how long close() waits for the store

    def __post_init__(self) -> None:
        check_name("pipeline run", self.pipeline_run)


def open_pipeline_run(
    pipeline_run: str,
    tags: Mapping[str, str],
    *,
    data: Path,
    root: Path = Path(),
    spool: Path = Path("artifacts/tracking"),
) -> "MlflowTracker":
    """The tracker that a stage makes its children of; as a run it exists only if something is logged to itself.

    Args:
        pipeline_run: names the pipeline execution.
        tags: of every run; ``data_md5`` also names the version of the MLflow dataset.
        data: the data set, whose ``.dvc`` file gives its counts.
        root: where ``mlflow.db`` lies unless ``MLFLOW_TRACKING_URI`` names a store.
        spool: the folder for what is not sent yet.
    """
    import yaml

    recorded = data.with_name(data.name + ".dvc")
    counts: dict[str, int] = {}
    if recorded.is_file():
        (entry,) = yaml.safe_load(recorded.read_text(encoding="utf-8"))["outs"]
        counts = {key: int(entry[name]) for key, name in (("files", "nfiles"), ("bytes", "size")) if name in entry}
    dataset = DatasetFacts(data.resolve().name, tags["data_md5"], str(data), counts) if "data_md5" in tags else None
    given = masked({**tags, "pipeline_run": pipeline_run})
    settings = Settings(default_store(root), main_copy(root) / spool, pipeline_run, given, dataset)
    return MlflowTracker(tags.get("stage", "pipeline"), settings)


class MlflowTracker(Tracker):
    """A run in MLflow behind a spool; see the module."""

    def __init__(self, name: str, settings: Settings, kind: Kind = "run") -> None:
        self.name, self.settings, self.kind = check_name("run name", name), settings, kind
        self._spool: Spool | None = None  # opened by the first record: a run without records does not exist
        self._thread: threading.Thread | None = None
        self._closing, self._given_up = threading.Event(), threading.Event()
        self._children: list[MlflowTracker] = []
        self._closed = False

    @property
    def run_id(self) -> str | None:
        """The run's id, once the store has given one."""
        return self._spool.read_meta().run_id if self._spool else None

    def params(self, values: Mapping[str, Any]) -> None:
        self._open().lines.params(values)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self._open().lines.metrics({key: float(value) for key, value in values.items()}, step)
        if self._thread is None:
            self._start()

    def tags(self, values: Mapping[str, str]) -> None:
        self._open().lines.tags(values)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keeps a copy until it is sent, since the original may be renamed or replaced meanwhile."""
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such artifact")
        spool = self._open()
        spool.lines.artifact(spool.keep(path), folder)
        self._start()

    def describe(self, text: str) -> None:
        self.tags({"mlflow.note.content": text})

    def child(self, name: str, *, ended: bool = False) -> "MlflowTracker":
        """Another run under the same parent; :meth:`close` ends it too if nobody did."""
        return self._beside(MlflowTracker(name, self.settings, "ended" if ended else "run"))

    def parent(self) -> "MlflowTracker":
        return self._beside(MlflowTracker(self.settings.pipeline_run, self.settings, "parent"))

    def _beside(self, tracker: "MlflowTracker") -> "MlflowTracker":
        self._children.append(tracker)
        return tracker

    def close(self, status: str = "FINISHED") -> None:
        """Ends the run and waits, within bounds, until the store has it all."""
        if self._closed:
            return
        self._closed = True
        for child in self._children:
            child.close(status)
        if self._spool is None:
            return
        self._start()
        assert self._thread is not None
        self._spool.lines.close(status)
        self._closing.set()
        self._thread.join(self.settings.flush_seconds)
        self._given_up.set()
        spool, store = self._spool, self.settings.store.address
        if left := spool.unsent():
            later = f"since {store} does not answer; send them later: segdistill sync {self.settings.spool}"
            logger.warning("%s: %d records wait in %s %s", self.name, left, spool.records, later)
        if refused := spool.refusals():
            why = spool.refused
            logger.warning("%s: %s refused %d items for good; what and why: %s", self.name, store, refused, why)
        spool.release()

    def finish_pipeline(self, status: str) -> None:
        """Ends the parent run; a failure before anything was logged leaves no trace."""
        spools = self.settings.spool / file_name(self.settings.pipeline_run)
        if status == "FINISHED" or next(spools.glob("*.meta.json"), None):
            finish_parent(self.settings.store, self.settings.pipeline_run, status)

    def _open(self) -> Spool:
        if self._closed:
            raise RuntimeError(f"the run {self.name} is closed")
        if self._spool is None:
            of = self.settings
            self._spool = Spool.create(
                of.spool, of.pipeline_run, self.name, of.store, of.tags, of.dataset, kind=self.kind
            )
            # Else the thread waits for the first number, when the caller has finished his own imports.
            if "mlflow" in sys.modules:
                self._start()
        return self._spool

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"mlflow-{self.name}", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        """Sends until closed; while the store is away, asks it again after 1, 2, 4 .. 30 seconds."""
        assert self._spool is not None
        sender, pause, store = Sender(self._spool, self.settings.store), 0.0, self.settings.store.address
        while True:
            ending = self._closing.wait(pause or self.settings.interval)
            try:
                sender.send()
                if pause > 0:
                    logger.info("%s: %s answers again", self.name, store)
                pause = 0.0
                if ending:
                    return
            except Exception as error:
                if pause == 0.0:
                    wait = f"does not answer, its records wait in {self._spool.records}"
                    logger.warning("%s: %s %s: %s", self.name, store, wait, one_line(error))
                pause = min(max(2 * pause, 1.0), 30.0)
                if ending and self._given_up.wait(min(pause, 5.0)):
                    return


@dataclass(frozen=True)
class Synced:
    """What became of one spool."""

    name: str
    sent: int
    left: int
    error: str | None = None
    refused: str | None = None  # what the store will never take, and where that is told


def sync(folder: Path, uri: str | None = None) -> list[Synced]:
    """Sends what the spools below ``folder`` still hold; a spool whose process still runs is left to it.

    Args:
        uri: the store, if it is reached by another address now than when the run began.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the spool folder that the warning named")
    results: list[Synced] = []
    for meta in sorted(folder.rglob("*.meta.json")):
        try:
            results.append(_sync_one(meta, uri))
        except (UserError, OSError) as error:  # of this one alone
            results.append(Synced(meta.name.removesuffix(".meta.json"), 0, 0, masked_text(str(error))))
    return results


def _sync_one(meta: Path, uri: str | None) -> Synced:
    spool = Spool.reopen(meta)
    if spool is None:
        return Synced(meta.name.removesuffix(".meta.json"), 0, 0, "its process still runs")
    try:
        name, before, error = spool.read_meta().name, spool.unsent(), None
        if before:
            store = spool.store(uri)
            try:
                Sender(spool, store).send()
            except Exception as failure:
                error = f"{store.address}: {one_line(failure)}"
        left, refused = spool.unsent(), spool.refusals()
        return Synced(name, before - left, left, error, f"{refused} ({spool.refused})" if refused else None)
    finally:
        spool.release()
