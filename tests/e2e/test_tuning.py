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

ROOT = Path(__file__).resolve().parents[2]


def tune(project: Path, storage: str | None, password: str, log: Path) -> subprocess.Popen[bytes]:
    params = read_yaml(project / "params.yaml")
    params["tune"] |= {"trials": 4, "round": 1, "storage": storage}
    params["distill"]["train"] |= {"iterations": 24, "checkpoint_every": 2, "validate_every": 8}
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    surroundings = os.environ | {"SEGDISTILL_TUNE_PASSWORD": password, "OMP_NUM_THREADS": "1"}
    surroundings["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "segdistill", "tune", "--tracker", "none", "--device", "cpu"]
    with log.open("ab") as output:
        return subprocess.Popen(command, cwd=project, env=surroundings, stdout=output, stderr=output)


def trials(project: Path) -> dict[str, list[dict[str, Any]]]:
    experiments = json.loads((project / "reports/tuning/trials.json").read_text())["experiments"]
    return {name: experiment["each"] for name, experiment in experiments.items()}


def test_of_two_processes_that_share_trials_in_postgresql_one_is_killed_and_nothing_is_lost(
    database: Postgres, tiny_prepared: Path, tmp_path: Path
) -> None:
    pytest.importorskip("psycopg")
    alone = tmp_path / "alone"
    alone.mkdir()
    shared = Path(shutil.copytree(tuning_project(alone, read_yaml(ROOT / "params.yaml"), tiny_prepared), tmp_path / "shared"))
    log = tmp_path / "log"
    once = tune(alone, None, "", log)
    assert once.wait(600) == 0, log.read_text()
    storage = f"postgresql+psycopg://mlflow@127.0.0.1:{database.port}/postgres"
    both = [tune(shared, storage, database.password, log) for _ in range(2)]
    try:
        for number in range(2):  # each process has a trial under way, with a checkpoint
            wait_until(lambda: any(shared.glob(f"artifacts/tuning/*/s0/*-t{number}/*")), both[number], log, 300)
        both[0].kill()
        assert both[1].wait(600) == 0, log.read_text()
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert trials(shared) == trials(alone), "whoever worked on them, and whatever became of him"
    assert not list(shared.glob("artifacts/tuning/*.db")), "the trials are in the database"
    assert "Warning" not in log.read_text()
    wrong = tune(shared, storage, "wrong", tmp_path / "wrong")
    assert wrong.wait(120) == 2
    sentence = (tmp_path / "wrong").read_text()
    assert sentence.startswith("segdistill tune: tune.storage: the store cannot be opened: ")
    assert "password authentication failed" in sentence and sentence.count("\n") == 1
