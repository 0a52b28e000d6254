"""Fixtures that several tests share: a tiny data set, made once per test process."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"  # of two test processes on two cores; before torch is loaded

# A shell that starts the tests in the background has Ctrl-C ignored, nohup has the hang-up: children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A test that gives torch more threads does not give them to the next."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A command run in a test sets up the library's logging; the next test must not notice."""
    logger = logging.getLogger("segdistill")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic streets in the folder layout: 12 train, 4 val, 4 test scenes of 64x48."""
    from segdistill import streets

    out = tmp_path_factory.mktemp("tiny") / "data"
    streets.write(out, seed=1, size=(64, 48), samples={"train": 12, "val": 4, "test": 4}, workers=1)
    return out


@pytest.fixture(scope="session")
def tiny_prepared(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set as shards."""
    from segdistill.config import parse
    from segdistill.engine.tracker import Tracker
    from segdistill.stages import prepare

    root = tmp_path_factory.mktemp("prepared")
    (root / "report").mkdir()
    (root / "report" / "summary.json").write_text('{"success": true, "layout": "folder"}')
    settings = {"layout": "folder", "shard_samples": 8, "max_side": None, "workers": 1}
    config = parse(prepare.Config, settings, "prepare")
    prepare.run(config, data=tiny_data, report=root / "report", prepared=root / "prepared", tracker=Tracker())
    return root / "prepared"
