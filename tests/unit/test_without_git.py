"""What a user without git, or without a repository, is told to do."""

import shutil
import subprocess
from pathlib import Path

import pytest

from segdistill.adapters.git_files import read_revision
from segdistill.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_that_is_no_repository_is_told_how_to_become_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a git repository.*; name the one that has the data, or make .* git init"):
        read_revision(str(tmp_path), "HEAD", ["data.dvc"])


def test_without_the_program_git_it_is_said_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"git: not installed; .* apt-get install git"):
        read_revision(str(tmp_path), "HEAD", ["data.dvc"])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_says_what_to_do_without_a_repository(tmp_path: Path) -> None:
    for name in ("requirements.lock", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.ready").touch()
    done = subprocess.run(["make", "data"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "make: no git repository here, in which DVC keeps its record; install git, then: git init"
    )
