"""Fixtures of the pipeline's tests."""

import pytest


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's store is its own, whatever the one who runs it uses."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A store with its tables as the bytes of a file, which no test can write to; making the tables takes seconds."""
    pytest.importorskip("mlflow")
    from segdistill.adapters.mlflow_store import default_store

    root = tmp_path_factory.mktemp("store")
    default_store(root, f"sqlite:///{root / 'mlflow.db'}").client()  # mlflow leaves MLFLOW_TRACKING_URI behind
    return (root / "mlflow.db").read_bytes()
