"""The import rules hold where they are broken on purpose, in a copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = "from segdistill.adapters import mlflow_tracking"


def lint(copy: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "segdistill", folder / "segdistill", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_rules_hold_as_the_code_is(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("indent", ["", "def late() -> None:\n    "], ids=["at the top", "in a function"])
def test_an_adapter_imported_by_the_machine_learning_half_is_refused(copy: Path, indent: str) -> None:
    rooms = ("config", "files", "data.loader", "engine.cohort", "losses.masks", "methods.kd", "metrics.confusion",
             "models.teacher")  # fmt: skip
    files = [copy / f"segdistill/{room.replace('.', '/')}.py" for room in rooms]
    before = [file.read_text() for file in files]
    try:
        for file, text in zip(files, before, strict=True):
            file.write_text(f"{text}\n\n{indent}{PLANTED}\n")
        done = lint(copy)
    finally:
        for file, text in zip(files, before, strict=True):
            file.write_text(text)
    assert done.returncode == 1, done.stderr
    for room in rooms:
        assert f"segdistill.{room} -> segdistill.adapters" in done.stdout, done.stdout
