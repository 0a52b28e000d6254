"""The spool of one MLflow run: what was logged, how much of it was sent, and the sending."""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from segdistill.adapters.mlflow_store import DatasetFacts, Store, ensure_run
from segdistill.engine.tracker import JsonLinesTracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)
T = TypeVar("T")

# MLflow's limits for one request are 1000 metrics and 100 of the others.
_METRICS, _OTHERS, _RECORDS = 900, 90, 2000


class Spool:
    """The files of one run. A lock says that a process writes or sends them."""

    def __init__(self, base: Path, lock: TextIO) -> None:
        self.base, self._lock = base, lock
        self.records = base.with_name(base.name + ".jsonl")
        self.meta = base.with_name(base.name + ".meta.json")
        self.position = base.with_name(base.name + ".position.json")
        self.refused = base.with_name(base.name + ".refused.jsonl")
        self.files = base.with_name(base.name + ".files")
        self._lines: JsonLinesTracker | None = None

    @classmethod
    def create(
        cls, folder: Path, pipeline_run: str, name: str, store: Store, tags: Mapping[str, str],
        dataset: DatasetFacts | None, *, resume: bool,
    ) -> "Spool":  # fmt: skip
        """The spool of this run, to go on in it; a new one if another process has it or ``resume`` is off."""
        below = folder / re.sub(r"[^\w.\-]", "_", pipeline_run)
        below.mkdir(parents=True, exist_ok=True)
        safe = re.sub(r"[^\w.\-]", "_", name)
        for number in itertools.count(1):
            spool = cls._take(below / (safe if number == 1 else f"{safe}~{number}"))
            if spool is None:
                continue
            if not spool.meta.exists():
                write_json(
                    spool.meta,
                    {
                        "name": name, "pipeline_run": pipeline_run, "uri": store.shown, "injected": store.injected,
                        "tags": dict(tags),
                        "dataset": asdict(dataset) if dataset else None, "fresh": not resume, "run_id": None,
                    },
                )  # fmt: skip
                return spool
            meta = read_json(spool.meta)
            if resume and (meta["name"], meta["pipeline_run"], meta["uri"]) == (name, pipeline_run, store.shown):
                write_json(spool.meta, {**meta, "tags": {**meta["tags"], **tags}})
                spool.write_resume()
                return spool
            spool.release()
        raise AssertionError("unreachable")

    @classmethod
    def reopen(cls, meta: Path) -> "Spool | None":
        """The spool with this meta file, or None while a process has it."""
        return cls._take(meta.with_name(meta.name.removesuffix(".meta.json")))

    @classmethod
    def _take(cls, base: Path) -> "Spool | None":
        file = base.with_name(base.name + ".lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return cls(base, file)

    @property
    def name(self) -> str:
        return str(read_json(self.meta)["name"])

    @property
    def lines(self) -> JsonLinesTracker:
        """The writer; a line that a killed process left half-written is ended first."""
        if self._lines is None:
            if self.records.exists() and self.records.stat().st_size:
                with self.records.open("rb+") as file:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
            self._lines = JsonLinesTracker(self.records)
        return self._lines

    def write_resume(self) -> None:
        """Marks that another process goes on from here, perhaps from an earlier iteration."""
        self.lines._write("resume", {})

    def keep(self, path: Path) -> Path:
        """Copies an artifact into the spool."""
        self.files.mkdir(exist_ok=True)
        for number in itertools.count():
            with contextlib.suppress(FileExistsError):
                (self.files / str(number)).mkdir()
                break
        copy = self.files / str(number) / path.name
        if path.is_dir():
            shutil.copytree(path, copy)
        else:
            shutil.copy2(path, copy)
        return copy.relative_to(self.base.parent)

    def release(self) -> None:
        """Lets go of the files. By hand, since forked data workers hold a copy of the descriptor."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._lock.close()

    def offset(self) -> int:
        return int(read_json(self.position).get("offset", 0)) if self.position.exists() else 0

    def unsent(self) -> int:
        return sum(1 for _ in self._read(self.offset()))

    def _read(self, offset: int) -> Iterator[tuple[dict[str, Any] | None, int]]:
        """Complete lines from ``offset`` on, each with the offset behind it; None for one that is torn."""
        if not self.records.exists():
            return
        with self.records.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    yield json.loads(line), offset
                except ValueError:
                    logger.warning("%s: a torn line before byte %d is left out", self.records, offset)
                    yield None, offset

    def logged_before_resume(self, end: int) -> set[tuple[str, int, float]]:
        """Every (name, step, value) that stands before the last resume mark in the first ``end`` bytes."""
        before: set[tuple[str, int, float]] = set()
        since: list[tuple[str, int, float]] = []
        for record, behind in self._read(0):
            if behind > end:
                break
            if record is None:
                continue
            if record["kind"] == "metrics":
                step = int(record.get("step", 0))
                since.extend((metric_name(key), step, value) for key, value in record["values"].items())
            elif record["kind"] == "resume":
                before.update(since)
                since = []
        return before

    def groups(self) -> Iterator[tuple[list[dict[str, Any]], int]]:
        """What is unsent, in order: numbers together, other records alone; each with the offset behind it."""
        group: list[dict[str, Any]] = []
        offset = self.offset()
        for record, behind in self._read(offset):
            alone = record is not None and record["kind"] in ("artifact", "close", "resume")
            if group and (alone or len(group) >= _RECORDS):
                yield group, offset
                group = []
            if record is not None:
                group.append(record)
            offset = behind
            if alone:
                yield group, offset
                group = []
        if group or offset != self.offset():
            yield group, offset


class Sender:
    """Sends a spool's records and moves its position on; whatever fails is left for the next call."""

    def __init__(self, spool: Spool, store: Store) -> None:
        self.spool, self.store = spool, store
        self._client: MlflowClient | None = None
        self._run_id: str | None = None
        self._before: set[tuple[str, int, float]] | None = None  # what earlier processes logged

    def send(self) -> None:
        """Sends all that is there.

        Raises:
            Exception: what MLflow or the network raised; the position tells how far it came.
        """
        if self._before is None:
            self._before = self.spool.logged_before_resume(self.spool.offset())
        for group, offset in self.spool.groups():
            if group and group[0]["kind"] == "resume":
                self._before = self.spool.logged_before_resume(offset)
            elif group:
                self._send(group)
            write_json(self.spool.position, {"offset": offset})

    def _send(self, group: list[dict[str, Any]]) -> None:
        client, run_id = self._connect()
        if group[0]["kind"] == "artifact":
            self._send_artifact(client, run_id, group[0]["values"])
        elif group[0]["kind"] == "close":
            status, moment = group[0]["values"]["status"], round(1000 * group[0]["time"])
            client.set_terminated(run_id, status, moment)
            self._run_id = None  # whoever goes on sets it to RUNNING again
        else:
            self._send_numbers(client, run_id, group)

    def _connect(self) -> tuple["MlflowClient", str]:
        """Finds or makes the run, and remembers its id before anything is sent to it."""
        if self._client is None:
            self._client = self.store.client()
        if self._run_id is None:
            meta = read_json(self.spool.meta)
            if meta["run_id"] and meta["fresh"]:
                self._client.update_run(meta["run_id"], status="RUNNING")
                self._run_id = meta["run_id"]
            else:
                dataset = DatasetFacts(**meta["dataset"]) if meta["dataset"] else None
                self._run_id = ensure_run(
                    self._client, self.store, meta["pipeline_run"], meta["name"], meta["tags"], dataset,
                    fresh=meta["fresh"],
                )  # fmt: skip
            write_json(self.spool.meta, {**meta, "run_id": self._run_id})
        return self._client, self._run_id

    def _send_artifact(self, client: "MlflowClient", run_id: str, values: Mapping[str, Any]) -> None:
        path = self.spool.base.parent / values["path"]
        folder = values["folder"] or None
        if path.is_dir():
            client.log_artifacts(run_id, str(path), folder)
        elif path.exists():  # else it was sent, and the process ended before it noted so
            client.log_artifact(run_id, str(path), folder)
        shutil.rmtree(path.parent, ignore_errors=True)

    def _send_numbers(self, client: "MlflowClient", run_id: str, group: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics: list[Metric] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        before = self._before or set()
        for record in group:
            for key, value in record["values"].items():
                name = metric_name(key)
                if record["kind"] == "metrics":
                    moment, step = round(1000 * record["time"]), int(record.get("step", 0))
                    # A run that goes on from an earlier iteration repeats itself exactly; once is enough.
                    if (name, step, value) not in before:
                        metrics.append(Metric(name, float(value), moment, step))
                elif record["kind"] == "params":
                    params[name] = as_text(value)[:6000]
                else:
                    tags[name] = as_text(value)[:8000]
        facts, labels = [Param(*item) for item in params.items()], [RunTag(*item) for item in tags.items()]
        self._deliver(lambda part: client.log_batch(run_id, metrics=part), metrics, _METRICS)
        self._deliver(lambda part: client.log_batch(run_id, params=part), facts, _OTHERS)
        self._deliver(lambda part: client.log_batch(run_id, tags=part), labels, _OTHERS)

    def _deliver(self, send: Callable[[Sequence[T]], None], items: Sequence[T], size: int) -> None:
        """In parts; a part that the store refuses for good is halved until only the refused items are left out."""
        from mlflow.exceptions import MlflowException

        for start in range(0, len(items), size):
            part = items[start : start + size]
            try:
                send(part)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                if len(part) > 1:
                    self._deliver(send, part, (len(part) + 1) // 2)
                    continue
                logger.warning("%s: MLflow refuses %s: %s", self.spool.name, part[0], str(error).splitlines()[0])
                with self.spool.refused.open("a") as file:
                    file.write(json.dumps({"item": vars(part[0]), "reason": str(error)}, default=str) + "\n")


def metric_name(name: str) -> str:
    """A name that MLflow takes: other characters than its own become ``_``."""
    return re.sub(r"[^/\w.\- :]", "_", name)[:250]


def as_text(value: Any) -> str:
    """Text stays; numbers, booleans, lists and null read as in JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, default=str) + "\n", encoding="utf-8")
    partial.replace(path)
