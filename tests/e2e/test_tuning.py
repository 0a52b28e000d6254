"""``segdistill tune`` by processes that share their trials in PostgreSQL, of which one is killed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from services import Postgres, wait_until
from tiny_params import tuning_project

from segdistill.config import read_yaml
from segdistill.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def tune(project: Path, storage: str | None, password: str, log: Path) -> subprocess.Popen[bytes]:
    params = read_yaml(project / "params.yaml")
    params["tune"] |= {"round": 1, "pruning": False, "storage": storage}
    params["distill"]["train"] |= {"iterations": 12, "checkpoint_every": 2, "validate_every": 12}
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    surroundings = os.environ | {"SEGDISTILL_TUNE_PASSWORD": password, "OMP_NUM_THREADS": "1"}
    surroundings["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "segdistill", "tune", "--tracker", "none", "--device", "cpu"]
    with log.open("ab") as output:
        return subprocess.Popen(command, cwd=project, env=surroundings, stdout=output, stderr=output)


def trials(project: Path) -> dict[str, list[tuple[Any, ...]]]:
    experiments = json.loads((project / "reports/tuning/trials.json").read_text())["experiments"]
    return {
        name: [(trial["state"], trial["score"], trial["values"]) for trial in experiment["each"]]
        for name, experiment in experiments.items()
    }


@pytest.fixture
def storage(database: Postgres) -> str:
    """A database of its own beside MLflow's."""
    psycopg = pytest.importorskip("psycopg")
    server = {"host": "127.0.0.1", "port": database.port, "user": "mlflow", "password": database.password}
    with psycopg.connect(**server, dbname="postgres", autocommit=True) as connection:
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'trials'").fetchone():
            connection.execute("CREATE DATABASE trials")
    return f"postgresql+psycopg://mlflow@127.0.0.1:{database.port}/trials"


def test_of_two_processes_that_share_trials_in_postgresql_one_is_killed_and_nothing_is_lost(
    storage: str, database: Postgres, tiny_prepared: Path, tmp_path: Path
) -> None:
    (tmp_path / "alone").mkdir()
    alone = tuning_project(tmp_path / "alone", read_yaml(ROOT / "params.yaml"), tiny_prepared)
    shared, log = Path(shutil.copytree(alone, tmp_path / "shared")), tmp_path / "log"
    once = tune(alone, None, "", log)
    both = [tune(shared, storage, database.password, log) for _ in range(2)]
    try:
        for number in range(2):  # each process has a trial under way, with a checkpoint
            pattern = f"artifacts/tuning/*/s0/*-t{number}/*"
            wait_until(lambda pattern=pattern: any(shared.glob(pattern)), both[number], log, 300)  # type: ignore[misc]
        both[0].kill()
        assert (once.wait(600), both[1].wait(600)) == (0, 0), log.read_text()
    finally:
        for process in (once, *both):
            process.kill()
            process.wait()
    assert trials(shared) == trials(alone), "whoever worked on them, and whatever became of him"
    assert "it is taken up again" in log.read_text() and "Warning" not in log.read_text()
    assert not list(shared.glob("artifacts/tuning/*.db")), "the trials are in the database"


def test_a_wrong_password_is_one_sentence_without_it(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segdistill.adapters.optuna_store import opened

    monkeypatch.setenv("SEGDISTILL_TUNE_PASSWORD", "hunter2")
    with pytest.raises(UserError) as caught, opened(storage, tmp_path):
        pass
    sentence = str(caught.value)
    assert sentence.startswith("tune.storage: the store cannot be opened: ") and "authentication failed" in sentence
    assert "hunter2" not in sentence and "\n" not in sentence
