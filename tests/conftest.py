"""Fixtures that several tests share: a tiny data set, made once per test process."""

import os
from pathlib import Path

import pytest

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
os.environ["SEGDISTILL_WARM"] = "0"  # a test's process is the test's own

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def _one_thread_each() -> None:
    """Two test processes on two cores."""
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic streets in the folder layout: 12 train, 4 val, 4 test scenes of 64x48."""
    from segdistill.data import synthetic

    out = tmp_path_factory.mktemp("tiny") / "data"
    synthetic.write(out, seed=1, size=(64, 48), samples={"train": 12, "val": 4, "test": 4}, workers=1)
    return out
