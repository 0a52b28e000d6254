"""Fixtures of the pipeline's tests."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_server() -> Iterator[None]:
    """A test's store is its own, whatever the one who runs it uses, and whichever mlflow's functions set before it."""
    before = dict(os.environ)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A store with its tables as the bytes of a file, which no test can write to; making the tables takes seconds."""
    pytest.importorskip("mlflow")
    from segdistill.adapters.mlflow_store import default_store

    root = tmp_path_factory.mktemp("store")
    default_store(root, f"sqlite:///{root / 'mlflow.db'}").client()  # mlflow leaves MLFLOW_TRACKING_URI behind
    return (root / "mlflow.db").read_bytes()
