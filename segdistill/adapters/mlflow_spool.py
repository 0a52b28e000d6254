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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar

from segdistill import environment
from segdistill.adapters.mlflow_names import file_name, metric_name, shortened
from segdistill.adapters.mlflow_store import DatasetFacts, Store, check_name, default_store, ensure_parent, ensure_run
from segdistill.config import config, parse, to_dict
from segdistill.engine.tracker import JsonLinesTracker
from segdistill.errors import UserError
from segdistill.files import read_json, require_regular, write_file
from segdistill.secrets import masked_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)
T = TypeVar("T")

# MLflow's limits for one request are 1000 metrics and 100 of the others.
_METRICS, _OTHERS, _RECORDS = 900, 90, 2000
_PARAM_LIMIT, _TAG_LIMIT = 6000, 8000  # characters of a value
_KINDS = ("params", "metrics", "tags", "artifact", "close", "resume")
# An answer with such a status judges the item: malformed, too large, too long. No waiting or key will change it.
_REFUSALS = {400, 413, 414, 415, 422, 431}
_S3_REFUSALS = {"EntityTooLarge", "KeyTooLongError"}


Kind = Literal["run", "ended", "parent"]
"""Of which run: one that is open until it is closed; one whose training has ended, which is added to and stays ended
when it did; or the pipeline's own, which who runs the pipeline ends."""


@config
class Meta:
    """Which run a spool is of, and where that run is kept."""

    name: str
    pipeline_run: str
    # The store as it may be shown. An SQLite file also by its path from the spool, which holds when both are moved.
    uri: str
    database: str | None = None
    injected: str | None = None
    tags: dict[str, str]
    dataset: DatasetFacts | None = None
    kind: Kind = "run"
    run_id: str | None = None


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
        dataset: DatasetFacts | None, kind: Kind = "run",
    ) -> "Spool":  # fmt: skip
        """The spool of this run, to go on in it; a new one if another process has it."""
        below, safe = folder / file_name(pipeline_run), file_name(name)
        below.mkdir(parents=True, exist_ok=True)
        database = os.path.relpath(store.database, below) if store.database else None
        for number in itertools.count(1):
            spool = cls._take(below / (safe if number == 1 else f"{safe}~{number}"))
            if spool is None:
                continue
            if not spool.meta.exists():
                meta = Meta(name=name, pipeline_run=pipeline_run, uri=store.address, tags=dict(tags), kind=kind)
                spool.write_meta(replace(meta, database=database, injected=store.injected, dataset=dataset))
                return spool
            # A damaged one is left as it is, for `sync` to tell of.
            known = None
            with contextlib.suppress(UserError):
                known = spool.read_meta()
            if known and (known.name, known.pipeline_run, spool.uri()) == (name, pipeline_run, store.address):
                known = replace(known, tags={**known.tags, **tags}, database=database, uri=store.address, kind=kind)
                spool.write_meta(known)
                spool.lines._write("resume", {})  # another process goes on, perhaps from an earlier iteration
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

    def read_meta(self) -> Meta:
        """Which run this is of.

        Raises:
            UserError: the file is damaged.
        """
        data = read_json(self.meta)
        if isinstance(data, dict):
            data.pop("fresh", None)  # which earlier versions wrote
        try:
            meta = parse(Meta, data, "meta")
        except UserError as error:
            raise UserError(f"{self.meta}: damaged: {error}") from None
        check_name(f"{self.meta}: run name", meta.name)
        check_name(f"{self.meta}: pipeline run", meta.pipeline_run)
        return meta

    def write_meta(self, meta: Meta) -> None:
        """Complete or not at all."""
        write_json(self.meta, to_dict(meta))

    def uri(self) -> str:
        """The store's, where it is now: an SQLite file may have been moved together with this folder."""
        meta = self.read_meta()
        database = (self.base.parent / meta.database).resolve() if meta.database else None
        if database is None or (not database.is_file() and Path(meta.uri.removeprefix("sqlite:///")).is_file()):
            return meta.uri
        return f"sqlite:///{database}"

    def store(self, uri: str | None = None) -> Store:
        """The store of this run, reached at ``uri`` if that is given."""
        known, given = self.uri(), environment.tracking_uri()
        if uri is None and given and masked_text(given) == known:
            uri = given  # the same, with its password
        return replace(default_store(self.base.parent, uri or known), injected=self.read_meta().injected)

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
        """How many bytes of the records were sent; 0 where that cannot be true, since sending again is harmless."""
        if not self.position.exists():
            return 0
        with contextlib.suppress(UserError, AttributeError):
            offset = read_json(self.position).get("offset")
            if isinstance(offset, int) and self._begins_line(offset):
                return offset
        logger.warning("%s: damaged; all of %s is sent again", self.position, self.records)
        write_json(self.position, {"offset": 0})
        return 0

    def _begins_line(self, offset: int) -> bool:
        if offset <= 0 or not self.records.exists():
            return offset == 0
        with self.records.open("rb") as file:
            file.seek(offset - 1)
            return file.read(1) == b"\n"

    def refusals(self) -> int:
        """How many items the store refused for good."""
        return self.refused.read_bytes().count(b"\n") if self.refused.exists() else 0

    def unsent(self) -> int:
        return sum(1 for _ in self._read(self.offset()))

    def _read(self, offset: int) -> Iterator[tuple[dict[str, Any] | None, int]]:
        """Complete lines from ``offset`` on, each with the offset behind it; None for one that is no record."""
        if not self.records.exists():
            return
        require_regular(self.records)
        with self.records.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield self._record(line), offset

    def _record(self, line: bytes) -> dict[str, Any] | None:
        """What a line says, or None if it was torn, or nobody of us wrote it."""
        try:
            record = json.loads(line)
            kind, values, _ = record["kind"], record["values"], float(record["time"])
            if kind == "metrics":
                int(record.get("step", 0))
                right = all(isinstance(value, int | float) for value in values.values())
            elif kind == "artifact":
                kept = (self.base.parent / values["path"]).resolve()
                right = kept.is_relative_to(self.files.resolve()) and isinstance(values["folder"], str)
            elif kind == "close":
                right = values["status"] in ("FINISHED", "FAILED", "KILLED")
            else:
                right = kind in _KINDS and isinstance(values, dict)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return record if right else None

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
            else:
                logger.warning("%s: the line before byte %d is no record, and left out", self.records, behind)
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
        client, run_id = self._connect(group[0]["time"])
        if group[0]["kind"] == "artifact":
            path = self.spool.base.parent / group[0]["values"]["path"]
            if path.exists():  # else it was sent, and the process ended before it noted so
                self._send_artifact(client, run_id, path, group[0]["values"]["folder"])
            with contextlib.suppress(OSError):  # what was refused is kept there
                path.parent.rmdir()
        elif group[0]["kind"] == "close":
            status, moment = group[0]["values"]["status"], round(1000 * group[0]["time"])
            kind = self.spool.read_meta().kind
            if kind == "run" or (kind == "ended" and client.get_run(run_id).info.status == "RUNNING"):
                client.set_terminated(run_id, status, moment)
            self._run_id = None  # whoever goes on sets it to RUNNING again
        else:
            self._send_numbers(client, run_id, group)

    def _connect(self, since: float) -> tuple["MlflowClient", str]:
        """Finds or makes the run, which began by ``since``, and remembers its id before anything is sent to it."""
        if self._client is None:
            self._client = self.store.client()
        if self._run_id is None:
            meta = self.spool.read_meta()
            if meta.kind == "parent":
                with self.store.lock():
                    parent = ensure_parent(self._client, self.store, meta.pipeline_run, meta.tags)
                self._run_id = str(parent.info.run_id)
            else:
                self._run_id = ensure_run(
                    self._client, self.store, meta.pipeline_run, meta.name, meta.tags, meta.dataset,
                    reopen=meta.kind == "run", since=since,
                )  # fmt: skip
            self.spool.write_meta(replace(meta, run_id=self._run_id))
        return self._client, self._run_id

    def _send_artifact(self, client: "MlflowClient", run_id: str, path: Path, folder: str) -> None:
        """An artifact; of a folder that the store refuses for good, only the refused files are left out, and kept."""
        send = client.log_artifacts if path.is_dir() else client.log_artifact
        try:
            send(run_id, str(path), folder or None)
        except Exception as error:
            if not refused_for_good(error):
                raise
            if not path.is_dir():
                self._set_aside({"path": str(path), "folder": folder}, error)
                return
            for entry in sorted(path.iterdir()):
                place = f"{folder}/{entry.name}".lstrip("/") if entry.is_dir() else folder
                self._send_artifact(client, run_id, entry, place)
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _set_aside(self, item: Mapping[str, Any], error: Exception) -> None:
        reason = masked_text(str(error).partition("\n")[0])
        logger.warning("%s: MLflow refuses %s: %s", self.spool.base.name, dict(item), reason[:500])
        with self.spool.refused.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"item": item, "reason": reason}, default=str) + "\n")

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
                    params[name] = shortened(as_text(value), _PARAM_LIMIT)
                else:
                    tags[name] = shortened(as_text(value), _TAG_LIMIT)
        facts, labels = [Param(*item) for item in params.items()], [RunTag(*item) for item in tags.items()]
        self._deliver(lambda part: client.log_batch(run_id, metrics=part), metrics, _METRICS)
        self._deliver(lambda part: client.log_batch(run_id, params=part), facts, _OTHERS)
        self._deliver(lambda part: client.log_batch(run_id, tags=part), labels, _OTHERS)

    def _deliver(self, send: Callable[[Sequence[T]], None], items: Sequence[T], size: int) -> None:
        """In parts; a part that the store refuses for good is halved until only the refused items are left out."""
        for start in range(0, len(items), size):
            part = items[start : start + size]
            try:
                send(part)
            except Exception as error:
                if not refused_for_good(error):
                    raise
                if len(part) > 1:
                    self._deliver(send, part, (len(part) + 1) // 2)
                    continue
                self._set_aside(vars(part[0]), error)


def refused_for_good(error: BaseException) -> bool:
    """Whether the store has judged this very item, so that sending it again is no use."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE":
        return True
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):  # botocore's
        return answer.get("Error", {}).get("Code") in _S3_REFUSALS
    if getattr(answer, "status_code", None) in _REFUSALS:
        return True
    # A proxy's answer is no JSON, and MLflow keeps its status in the text alone.
    status = re.search(r"failed with error code (\d+) ", str(error)) if isinstance(error, MlflowException) else None
    if status and int(status[1]) in _REFUSALS:
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and refused_for_good(cause)


def as_text(value: Any) -> str:
    """Text stays; numbers, booleans, lists and null read as in JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Complete or not at all."""
    write_file(path, (json.dumps(data, default=str) + "\n").encode())
