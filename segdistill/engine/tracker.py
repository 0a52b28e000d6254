"""Where numbers go: nowhere, or into a file; MLflow is in the adapters."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segdistill.secrets import masked


class Tracker:
    """What the library asks of an experiment tracker; this one keeps nothing.

    Names are the same in every run: see docs/architecture.md.
    """

    def params(self, values: Mapping[str, Any]) -> None:
        """Flat, dotted parameter names and their values."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Scalars such as ``train/loss/ce`` or ``val/miou``; ``step`` is the iteration."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Short facts for searching: data md5, commit, stage."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or a folder to keep with the run, below ``folder``."""

    def describe(self, text: str) -> None:
        """What people read first of the run, in Markdown."""

    def child(self, name: str, *, ended: bool = False) -> "Tracker":
        """A tracker for one of several students that train in one run.

        Args:
            name: the run's.
            ended: whether its training has ended, so that what is added neither opens it again nor moves its end.
        """
        return self

    def parent(self) -> "Tracker":
        """A tracker for the pipeline run itself, which goes on when this tracker is closed."""
        return self

    def close(self, status: str = "FINISHED") -> None:
        """Ends the run: FINISHED, FAILED or KILLED."""

    def finish_pipeline(self, status: str) -> None:
        """Ends the pipeline run that this one belongs to; a stage that runs later opens it again."""


class JsonLinesTracker(Tracker):
    """One JSON object a line, flushed as it is written, without secrets; artifacts are recorded by their path."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.prefix = path, prefix
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def _write(self, kind: str, values: Mapping[str, Any], step: int | None = None) -> None:
        record: dict[str, Any] = {"time": time.time(), "kind": kind, "values": dict(values)}
        if step is not None:
            record["step"] = step
        if self.prefix:
            record["run"] = self.prefix
        self._file.write(json.dumps(record, default=str) + "\n")

    def params(self, values: Mapping[str, Any]) -> None:
        self._write("params", masked(values))

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self._write("metrics", values, step)

    def tags(self, values: Mapping[str, str]) -> None:
        self._write("tags", masked(values))

    def artifact(self, path: Path, folder: str = "") -> None:
        self._write("artifact", {"path": path, "folder": folder})

    def describe(self, text: str) -> None:
        self.tags({"description": text})

    def child(self, name: str, *, ended: bool = False) -> "JsonLinesTracker":
        return JsonLinesTracker(self.path, prefix=f"{self.prefix}/{name}".strip("/"))

    def parent(self) -> "JsonLinesTracker":
        return JsonLinesTracker(self.path, prefix="pipeline")

    def close(self, status: str = "FINISHED") -> None:
        self._write("close", {"status": status})
        self._file.close()
