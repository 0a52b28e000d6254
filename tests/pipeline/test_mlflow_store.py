"""The embedded store: made whole or not at all, found from a copy of the project, and moved with its folder."""

import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from segdistill.adapters.mlflow_store import Store, default_store, import_mlflow, main_copy
from segdistill.adapters.mlflow_tracking import MlflowTracker, Settings, sync
from segdistill.errors import UserError

pytest.importorskip("mlflow")
ROOT = Path(__file__).parents[2]


def _forked(work, *arguments) -> int | None:
    import_mlflow()  # with the modules, but without a connection to the store
    worker = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    worker.start()
    worker.join(120)
    return worker.exitcode


def _die_at(statement: int) -> None:
    """Kills this process before it sends so many statements to a database; there are about 1,700 to make the tables."""
    import sqlalchemy

    sent = 0

    @sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "before_cursor_execute")
    def count(*_: object) -> None:
        nonlocal sent
        sent += 1
        if sent == statement:
            os.kill(os.getpid(), signal.SIGKILL)


def _contact(root: Path, statement: int) -> None:
    _die_at(statement)
    default_store(root).client()


def test_a_first_contact_that_is_killed_at_any_moment_leaves_the_next_one_a_store(tmp_path: Path) -> None:
    for statement in (1, 30, 300, 1500):
        assert _forked(_contact, tmp_path, statement) == -signal.SIGKILL
        assert not (tmp_path / "mlflow.db").exists(), "no half of a store bears its name"
    assert default_store(tmp_path).client().search_experiments()[0].name == "Default"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def _mlflow_alone(root: Path, statement: int) -> None:
    from mlflow import MlflowClient

    _die_at(statement)
    MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db").search_experiments()


def test_tables_that_somebody_else_left_half_made_are_put_aside(
    tmp_path: Path, database: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.store.tracking import sqlalchemy_store

    class Made:
        """Stands for MLflow's making of the tables, which takes seconds."""

        def __init__(self, uri: str, place: str) -> None:
            Path(uri.removeprefix("sqlite:///")).write_bytes(database)
            self.engine = self

        def dispose(self) -> None: ...

    for statement in (30, 400):
        root = tmp_path / str(statement)
        root.mkdir()
        assert _forked(_mlflow_alone, root, statement) == -signal.SIGKILL
        with monkeypatch.context() as patched:
            patched.setattr(sqlalchemy_store, "SqlAlchemyStore", Made)
            from segdistill.adapters.mlflow_store import _make_tables

            _make_tables(root / "mlflow.db")
        assert default_store(root).client().search_experiments()[0].name == "Default"
        assert (root / "mlflow.db.unfinished").stat().st_size
        assert "its tables were never finished" in caplog.text
        caplog.clear()


def test_what_is_no_store_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"mlflow.db: not an SQLite database, .*move it away"):
        default_store(tmp_path)
    (tmp_path / "mlflow.db").unlink()
    os.mkfifo(tmp_path / "mlflow.db")
    with pytest.raises(UserError, match="a named pipe"):
        default_store(tmp_path)


def test_a_damaged_store_is_one_sentence(tmp_path: Path, database: bytes) -> None:
    (tmp_path / "mlflow.db").write_bytes(database[:4096] + b"\xff" * 8192)
    with pytest.raises(UserError, match=r"mlflow.db: .*damaged .*move it away"):
        default_store(tmp_path).client()


def test_a_relative_store_is_the_projects_in_a_copy_of_dvc_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / ".dvc/tmp/exps/tmpab12"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mlflow.db")
    assert default_store(Path()).database == tmp_path / "runs/mlflow.db"


def test_a_database_of_another_program_keeps_its_tables(tmp_path: Path) -> None:
    from segdistill.adapters.mlflow_store import _is_without_experiments

    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("CREATE TABLE accounts (name TEXT)")
    assert not _is_without_experiments(tmp_path / "mlflow.db")


# --- a folder that is moved


def _log(root: Path, name: str, artifact: str) -> str:
    """A run with an artifact, in a process of its own, as a stage would."""
    code = (
        "import sys; from pathlib import Path; from segdistill.adapters.mlflow_store import default_store\n"
        "from segdistill.adapters.mlflow_tracking import MlflowTracker, Settings\n"
        "root, name, artifact = Path(sys.argv[1]), *sys.argv[2:]\n"
        "one = MlflowTracker(name, Settings(default_store(root), root / 'spool', 'p'))\n"
        "(root / artifact).write_text(artifact); one.metrics({'a': 1.0}); one.artifact(root / artifact); one.close()\n"
        "print(one.run_id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), name, artifact], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_a_moved_project_reads_and_writes_its_artifacts_where_it_is(tmp_path: Path, database: bytes) -> None:
    old, new = tmp_path / "old place", tmp_path / "elsewhere/new place"
    old.mkdir()
    (old / "mlflow.db").write_bytes(database)
    first = _log(old, "kd-s0", "one.txt")
    waiting = MlflowTracker("kd-s1", Settings(default_store(old), old / "spool", "p", flush_seconds=0))
    waiting._start = lambda: None  # type: ignore[method-assign]  # a run of which nothing was sent yet
    waiting.metrics({"b": 2.0}, 1)
    waiting._spool.release()  # type: ignore[union-attr]
    new.parent.mkdir()
    shutil.move(old, new)

    (_, sent) = sync(new / "spool")
    assert (sent.name, sent.left, sent.error) == ("kd-s1", 0, None)
    second = _log(new, "kd-s0", "two.txt")
    assert second == first, "the same run goes on"
    client = default_store(new).client()
    assert sorted(item.path for item in client.list_artifacts(first)) == ["one.txt", "two.txt"]
    assert Path(client.download_artifacts(first, "one.txt")).read_text() == "one.txt"
    (run,) = client.search_runs([client.get_run(first).info.experiment_id], "attributes.run_name = 'kd-s1'")
    assert run.data.metrics == {"b": 2.0}
    assert not old.exists(), "nothing is written where the folder was"


def test_a_copied_project_leaves_the_first_alone(tmp_path: Path, database: bytes) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (one / "mlflow.db").write_bytes(database)
    run = _log(one, "kd-s0", "one.txt")
    shutil.copytree(one, other)
    before = sorted(path for path in one.rglob("*") if "mlartifacts" in path.parts)
    assert _log(other, "kd-s0", "two.txt") == run
    assert sorted(path for path in one.rglob("*") if "mlartifacts" in path.parts) == before
    assert sorted(item.path for item in default_store(other).client().list_artifacts(run)) == ["one.txt", "two.txt"]


def test_a_place_that_somebody_chose_stays(tmp_path: Path, database: bytes) -> None:
    chosen = tmp_path / "volume/mlartifacts"
    chosen.mkdir(parents=True)
    (tmp_path / "project").mkdir()
    (tmp_path / "project/mlflow.db").write_bytes(database)
    store = Store(f"sqlite:///{tmp_path}/project/mlflow.db")
    made = store.client().create_experiment("segdistill", artifact_location=chosen.as_uri())
    assert store.client().get_experiment(made).artifact_location == chosen.as_uri()


# --- a copy that DVC makes of the project for a while


def test_a_copy_of_dvc_belongs_to_the_working_copy_around_it(tmp_path: Path) -> None:
    assert main_copy(tmp_path / "project/.dvc/tmp/exps/tmpab12") == tmp_path / "project"
    assert main_copy(tmp_path / "project/.dvc/tmp/exps/tmpab12/part") == tmp_path / "project"
    assert main_copy(tmp_path / "project") == tmp_path / "project"


STAGE = """
import sys
from pathlib import Path
from segdistill.adapters.mlflow_tracking import open_pipeline_run

run = open_pipeline_run("p", {"stage": "register"}, data=Path("data")).child("kd-s0")
run.metrics({"a": float(Path("params.yaml").read_text().split()[-1])})
run.artifact(Path("params.yaml"))
run.close()
Path("out.txt").write_text(str(run.run_id))
"""


def test_an_experiment_in_a_copy_of_dvc_is_kept_in_the_projects_store(tmp_path: Path, database: bytes) -> None:
    pytest.importorskip("dvc")
    project = tmp_path / "project"
    project.mkdir()
    (project / "stage.py").write_text(STAGE)
    (project / "params.yaml").write_text("a: 1\n")
    (project / ".gitignore").write_text("mlflow.db*\nmlartifacts\nartifacts\n")
    (project / "dvc.yaml").write_text(
        f"stages:\n  s:\n    cmd: {sys.executable} stage.py\n    params: [a]\n    outs: [out.txt]\n"
    )
    (project / "mlflow.db").write_bytes(database)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"}
    environment |= {
        f"GIT_{who}_{what}": "ci@example.invalid" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }

    def do(*command: str) -> str:
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    do("git", "init", "--quiet", "--initial-branch", "main")
    dvc = (sys.executable, "-m", "dvc")
    do(*dvc, "init", "--quiet")
    do("git", "add", ".")
    do("git", "commit", "--quiet", "--message", "one")
    do(*dvc, "exp", "run", "--temp", "-S", "a=7", "-n", "seven")
    do(*dvc, "exp", "apply", "seven")
    run = (project / "out.txt").read_text()
    client = default_store(project).client()
    assert client.get_run(run).data.metrics == {"a": 7.0}
    assert Path(client.download_artifacts(run, "params.yaml")).read_text().split() == ["a:", "7"]
    assert (project / "artifacts/tracking/p").is_dir()
