"""A git repository with its data under DVC, whose objects are in DVC's own cache."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def commit_data(repository: Path, data: Path) -> Path:
    """Makes the repository, with a copy of ``data`` in it."""
    repository.mkdir(parents=True)
    shutil.copytree(data, repository / "data")
    author = {f"GIT_{who}_{what}": "ci" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for command in (
        ["git", "init", "--quiet", "--initial-branch", "main"],
        [sys.executable, "-m", "dvc", "init", "--quiet"],
        [sys.executable, "-m", "dvc", "add", "--quiet", "data"],
        ["git", "add", "--all"],
        ["git", "commit", "--quiet", "--message", "data"],
    ):
        subprocess.run(command, cwd=repository, env=os.environ | author, check=True, capture_output=True)
    return repository
