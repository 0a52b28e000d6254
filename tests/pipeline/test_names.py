"""A value in params.yaml reaches a shell through DVC, which runs what dvc.yaml says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

ROOT = Path(__file__).resolve().parents[2]


def commands(folder: Path, seed: int | str) -> list[str]:
    """What DVC would run for each cohort, with this for the only seed."""
    shutil.copy(ROOT / "dvc.yaml", folder)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"seeds": [seed]}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    with Repo.init(str(folder), no_scm=True) as repo:
        return [stage.cmd for stage in repo.index.stages if "@" in stage.name]


def test_dvc_runs_a_cohort_by_its_seed(tmp_path: Path) -> None:
    start = "python -m segdistill"
    assert commands(tmp_path, 7) == [f"{start} {stage} --seed 7" for stage in ("distill", "evaluate")]


@pytest.mark.parametrize("text", ["kd;touch X #", "$(touch X)", "`touch X`", "a' ; touch X; '", "\n touch X\n"])
def test_no_text_in_params_yaml_is_a_command_of_the_shell(tmp_path: Path, text: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in commands(tmp_path, text):
        # "segdistill" as it was when DVC's shell had read it.
        words = command.replace("python -m segdistill", "printf '%s|'", 1)
        done = subprocess.run(words, shell=True, cwd=tmp_path, env={"PATH": path}, capture_output=True, text=True)
        assert done.stdout.split("|")[1:-1] == ["--seed", text]
        assert not (tmp_path / "X").exists()
