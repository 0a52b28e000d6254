"""What DVC runs again when a parameter changes: the stages that depend on it, and no other."""

import contextlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from segdistill.config import flatten
from segdistill.stages import BY_NAME, STAGES, Job, jobs

ROOT = Path(__file__).resolve().parents[2]


def targets(stage_name: str, params: dict[str, Any]) -> list[str]:
    """DVC's names of a stage: one, or one a job."""
    if not BY_NAME[stage_name].per_job:
        return [stage_name]
    return [f"{stage_name}@{job.experiment}-{job.seed}" for job in jobs(params)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose outputs are small fakes that DVC believes to be up to date: hashing is all that is tested."""
    root = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "segdistill", root / "segdistill", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    Repo.init(str(root)).close()
    params = yaml.safe_load((root / "params.yaml").read_text())
    outputs = {path for stage in STAGES for path in stage.outputs.values()} | {"data"}
    for template in outputs:
        for job in jobs(params) if "{experiment}" in template else [Job("any", 0)]:
            folder = root / template.format(experiment=job.experiment, seed=job.seed)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "content").write_text(str(folder.relative_to(root)))
    (root / "reports" / "metrics.json").write_text("{}")
    with contextlib.chdir(root), Repo() as repo:
        repo.add(["data"])
        repo.commit(force=True)
    return root


def stale(project: Path) -> set[str]:
    """The stages whose own parameters or code changed (what follows from them runs because its inputs change)."""
    with contextlib.chdir(project), Repo() as repo:
        return {name for name in repo.status() if not name.endswith(".dvc")}


def leaf_keys() -> list[str]:
    """One key of every section, and the deepest ones, of which dvc.yaml names only the parents."""
    return [
        "validate.max_ignore_fraction",
        "prepare.shard_samples",
        "train_teacher.optimizer.lr",
        "train_teacher.train.iterations",
        "distill.train.iterations",
        "distill.teacher_tolerance",
        "experiments.kd.methods",
        "experiments.apd.methods",
        "experiments.dml.supervised",
        "evaluate.overlays",
        "compare.resamples",
        "register.min_gain",
    ]


def expected(key: str, params: dict[str, Any]) -> set[str]:
    names: set[str] = set()
    for stage in STAGES:
        for job in jobs(params) if stage.per_job else [None]:
            declared = [name.format(experiment=job.experiment if job else "") for name in stage.params]
            if any(key == name or key.startswith(f"{name}.") for name in declared):
                names.add(f"{stage.name}@{job.experiment}-{job.seed}" if job else stage.name)
    return names


def test_nothing_is_stale_at_first(project: Path) -> None:
    assert stale(project) == set()


@pytest.mark.parametrize("key", leaf_keys())
def test_a_changed_key_runs_exactly_the_stages_that_depend_on_it(project: Path, key: str) -> None:
    path = project / "params.yaml"
    before = path.read_text()
    params = yaml.safe_load(before)
    wanted = expected(key, params)
    assert wanted, f"no stage depends on {key}"
    section = params
    *parents, last = key.split(".")
    for part in parents:
        section = section[part]
    value = section.get(last, 1)
    section[last] = [*value, {"name": "kd"}] if isinstance(value, list) else value + 1
    # Anchors would be written as anchors: a shared value changes wherever it is shared, as it does for a user.
    path.write_text(yaml.safe_dump(params))
    try:
        assert stale(project) == wanted
    finally:
        path.write_text(before)


def test_every_key_of_the_parameters_belongs_to_a_stage(project: Path) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    for key in flatten(params):
        top = key.split(".")[0]
        if top == "experiments" and key.split(".")[1] not in params["run"]:
            continue
        assert top in ("run", "seeds") or expected(key, params), key


def test_changed_code_of_a_method_runs_the_training_of_students_only(project: Path) -> None:
    path = project / "segdistill" / "methods" / "kd.py"
    before = path.read_text()
    path.write_text(before + "# changed\n")
    try:
        params = yaml.safe_load((project / "params.yaml").read_text())
        assert stale(project) == set(targets("distill", params))
    finally:
        path.write_text(before)
