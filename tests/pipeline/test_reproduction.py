"""What DVC runs again when a parameter changes: the stages that depend on it, and no other."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from segdistill.plan import cohorts
from segdistill.stages import OF_COMMANDS, STAGES

ROOT = Path(__file__).resolve().parents[2]


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
        for name in cohorts(params["run"], params["seeds"]):
            folder = root / template.format(cohort=name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "content").write_text(str(folder.relative_to(root)))
    (root / "reports" / "metrics.json").write_text("{}")
    (root / "teachers/one").mkdir(parents=True)
    for name in ("torchvision.json", "model.safetensors"):
        (root / "teachers/one" / name).write_text(name)
    (root / "elsewhere/one").mkdir(parents=True)
    (root / "elsewhere/one/image.png").write_text("image")
    write_plan(root)
    with contextlib.chdir(root), Repo() as repo:
        repo.add(["data"])
        repo.commit(force=True)
    return root


PLAN = """
from pathlib import Path
from segdistill.config import parse, read_yaml
from segdistill.stages import BY_NAME, plan
params = read_yaml(Path("params.yaml"))
own, *others = BY_NAME["plan"].params
plan.run(parse(plan.Config, params[own], own), plan=Path("artifacts/plan"), **{key: params[key] for key in others})
"""


def write_plan(root: Path) -> None:
    """Runs the stage ``plan``, with the code that is in the project."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", PLAN], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def stale(project: Path) -> set[str]:
    """The stages whose own parameters, code or inputs changed, by name (what follows from them runs after them)."""
    with contextlib.chdir(project), Repo() as repo:
        return {name for name in repo.status() if not name.endswith(".dvc")}


def stale_after_plan(project: Path) -> set[str]:
    """The same, but for ``plan`` itself, which is run first and takes seconds."""
    assert stale(project) >= {"plan"}
    write_plan(project)
    return stale(project) - {"plan"}


@pytest.fixture
def edit(project: Path) -> Iterator[Callable[[str, Callable[[str], str]], None]]:
    """Changes a file of the project for the time of a test; gives it back, and the plan of before."""
    before: dict[Path, str | None] = {}

    def change(name: str, how: Callable[[str], str]) -> None:
        path = project / name
        before[path] = path.read_text() if path.exists() else None
        path.write_text(how(before[path] or ""))

    shutil.copytree(project / "artifacts/plan", project / "plan.before")
    yield change
    for path, text in before.items():
        path.unlink() if text is None else path.write_text(text)
    shutil.rmtree(project / "artifacts/plan")
    (project / "plan.before").rename(project / "artifacts/plan")


def in_params(key: str) -> Callable[[str], str]:
    """A change of one value."""

    def change(text: str) -> str:
        params = yaml.safe_load(text)
        section = params
        *parents, last = key.split(".")
        for part in parents:
            section = section[part]
        value = section.get(last, 1)
        section[last] = [*value, {"name": "dist"}] if isinstance(value, list) else value + 1
        # Anchors would be written as anchors: a shared value changes wherever it is shared, as it does for a user.
        return yaml.safe_dump(params)

    return change


def test_nothing_is_stale_at_first(project: Path) -> None:
    assert stale(project) == set()


SEEDS = yaml.safe_load((ROOT / "params.yaml").read_text())["seeds"]
STUDENTS = {f"distill@{seed}" for seed in SEEDS}
EVALUATIONS = {f"evaluate@{seed}" for seed in SEEDS}


@pytest.mark.parametrize(
    ("key", "stages"),
    [
        ("validate.max_ignore_fraction", {"validate"}),
        ("prepare.shard_samples", {"prepare"}),
        ("evaluate.overlays", {"evaluate_teacher"} | EVALUATIONS),
        ("compare.confidence", {"compare"}),
        ("register.min_gain", {"register"}),
        ("distill.train.iterations", {"plan"}),
        ("train_teacher.optimizer.lr", {"plan"}),
        ("experiments.kd.methods", {"plan"}),
    ],
)
def test_a_changed_value_concerns_exactly_the_stages_that_read_it(
    project: Path, edit: Any, key: str, stages: set[str]
) -> None:
    edit("params.yaml", in_params(key))
    assert stale(project) == stages


@pytest.mark.parametrize(
    ("key", "stages"),
    [
        ("train_teacher.optimizer.lr", {"train_teacher"}),
        ("distill.train.iterations", STUDENTS),
        ("experiments.kd.methods", STUDENTS),  # of which the stage trains one each; test_cohort.py
    ],
)
def test_a_changed_setting_of_a_training_concerns_those_whose_plan_it_changes(
    project: Path, edit: Any, key: str, stages: set[str]
) -> None:
    edit("params.yaml", in_params(key))
    assert stale_after_plan(project) == stages


def test_a_changed_file_of_an_imported_teacher_has_it_taken_anew(project: Path, edit: Any) -> None:
    def imported(text: str) -> str:
        params = yaml.safe_load(text)
        params["train_teacher"]["import_from"] = "teachers/one"
        return yaml.safe_dump(params)

    edit("params.yaml", imported)
    assert stale_after_plan(project) == {"train_teacher"}
    edit("dvc.lock", lambda text: text)  # which is given back
    with contextlib.chdir(project), Repo() as repo:
        repo.commit(force=True)
    assert stale(project) == set()
    edit("teachers/notes.md", appended("of no teacher"))
    assert stale_after_plan(project) == set()
    edit("teachers/one/model.safetensors", appended("changed"))
    assert stale_after_plan(project) == {"train_teacher"}


def test_a_changed_file_of_a_second_test_set_has_all_evaluated_again_and_nothing_trained(
    project: Path, edit: Any
) -> None:
    edit("elsewhere/one/image.png", appended("changed"))
    assert {name.partition("@")[0] for name in stale(project)} == {"evaluate_teacher", "evaluate"}


def test_an_experiment_that_is_not_run_concerns_no_training(project: Path, edit: Any) -> None:
    def another(text: str) -> str:
        params = yaml.safe_load(text)
        params["experiments"]["unused"] = params["experiments"]["kd"]
        return yaml.safe_dump(params)

    edit("params.yaml", another)
    assert stale_after_plan(project) == set()


def test_every_section_of_the_parameters_belongs_to_a_stage(project: Path) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    assert set(params) == {*OF_COMMANDS} | {key for stage in STAGES for key in stage.params}


def appended(text: str) -> Callable[[str], str]:
    return lambda before: before + text


def test_a_comment_in_the_streets_concerns_nothing(project: Path, edit: Any) -> None:
    edit("segdistill/streets/__init__.py", appended("# a comment\n"))
    assert stale(project) == set()


def test_a_new_method_trains_nothing(project: Path, edit: Any) -> None:
    edit("segdistill/methods/kd2.py", lambda _: (project / "segdistill/methods/kd.py").read_text())
    entry = '    "kd2": "segdistill.methods.kd2:PixelWise",\n'
    edit("segdistill/methods/__init__.py", lambda text: text.replace('    "apd"', f'{entry}    "apd"', 1))
    assert stale_after_plan(project) == set()


@pytest.mark.parametrize("file", ["engine/cohort.py", "methods/kd.py", "losses/__init__.py"])
def test_a_comment_in_the_code_of_a_training_trains_nothing(project: Path, edit: Any, file: str) -> None:
    edit(f"segdistill/{file}", appended("# a comment\n"))
    assert stale_after_plan(project) <= {"evaluate_teacher", "compare", "register"} | EVALUATIONS


def test_changed_code_of_a_method_concerns_the_students_and_not_the_teacher(project: Path, edit: Any) -> None:
    edit("segdistill/methods/kd.py", appended("CHANGED = True\n"))
    assert stale_after_plan(project) == STUDENTS
    planned = json.loads((project / "artifacts/plan/s0.json").read_text())["jobs"]
    before = json.loads((project / "plan.before/s0.json").read_text())["jobs"]
    changed = {job["experiment"] for job, former in zip(planned, before, strict=True) if job != former}
    assert changed == {"kd"}


def test_changed_code_of_the_loop_concerns_every_training(project: Path, edit: Any) -> None:
    edit("segdistill/engine/cohort.py", appended("CHANGED = True\n"))
    stages = {"train_teacher", "evaluate_teacher", "compare", "register"}
    assert stale_after_plan(project) == stages | STUDENTS | EVALUATIONS
