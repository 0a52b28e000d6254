"""The environment is read in one place, which documents it."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from segdistill import environment
from segdistill.errors import UserError

PACKAGE = Path(environment.__file__).parent
OURS = re.compile(r"(SEGDISTILL|MLFLOW)_\w+")


def strings(tree: ast.Module) -> Iterator[str]:
    """The texts in the code, without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and OURS.fullmatch(node.value):
            yield node.value


def reads_the_environment(tree: ast.Module) -> bool:
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return bool(names & {"environ", "environb", "getenv", "getenvb"})


def test_no_other_module_reads_a_variable_of_ours_or_of_mlflow() -> None:
    found = {}
    outside = [PACKAGE.parent / "pipelines/__main__.py", PACKAGE.parent / "pipelines/submission.py"]
    for path in [*PACKAGE.rglob("*.py"), *outside]:
        tree = ast.parse(path.read_text())
        if path != Path(environment.__file__) and reads_the_environment(tree) and (named := sorted(strings(tree))):
            found[path.name] = named
    assert not found, "read them in segdistill/environment.py"


def test_every_variable_that_is_read_is_in_the_table() -> None:
    tree = ast.parse(Path(environment.__file__).read_text())
    table = set(re.findall(r"^\| ``(\w+)``", environment.__doc__ or "", re.MULTILINE))
    assert set(strings(tree)) == table


def test_an_empty_variable_is_an_absent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEGDISTILL_WORK", "SEGDISTILL_PROCESSES", "SEGDISTILL_TRACKER", "SEGDISTILL_MLFLOW"):
        monkeypatch.setenv(name, "")
    assert environment.work_volume() is None and environment.injected_run() is None
    assert (environment.processes(default=3), environment.tracker()) == (3, "auto")


def test_a_tracker_that_there_is_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGDISTILL_TRACKER", "mlfow")
    with pytest.raises(UserError, match="SEGDISTILL_TRACKER: 'mlfow' is unknown; did you mean 'mlflow'"):
        environment.tracker()


@pytest.mark.parametrize("missing", ["MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"])
def test_a_plugin_that_injects_nothing_is_an_error(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "x")
    assert environment.injected_run() is None and environment.injected() == {}  # not asked for
    monkeypatch.setenv("SEGDISTILL_MLFLOW", "injected")
    assert environment.injected_run() == "x"
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=rf"{missing}: not set, but cluster.yaml says 'mlflow: injected'"):
        environment.injected_run()


def test_what_is_changed_for_a_while_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_A", "before")
    monkeypatch.delenv("MLFLOW_B", raising=False)
    with pytest.raises(ZeroDivisionError), environment.changed({"MLFLOW_A": "1", "MLFLOW_B": None}):
        os.environ["MLFLOW_B"] = "by somebody else"
        assert os.environ["MLFLOW_A"] == "1"
        1 / 0  # noqa: B018
    assert os.environ["MLFLOW_A"] == "before" and "MLFLOW_B" not in os.environ
