"""Which MLflow store is used, and how runs are found or made in it without a race.

One experiment per project, one parent run per pipeline execution, one child per run name under it. Whoever asks for a
run of the same name in the same pipeline execution, in whichever process, gets the same run: so the test scores stand
beside the training curves, and a job that was killed goes on in its run.

Nothing here imports mlflow, opens a connection or starts a thread when it is imported.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import re
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from segdistill import environment
from segdistill.errors import UserError
from segdistill.files import require_regular
from segdistill.patience import Patience
from segdistill.secrets import MaskingFilter, masked_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

EXPERIMENT = "segdistill"
ARTIFACTS = "mlartifacts"  # the folder beside an embedded store's database
# Where MLflow's tables record places of artifacts.
_PLACES = {
    "experiments": ["artifact_location"],
    "runs": ["artifact_uri"],
    "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}
PIPELINE_TAG = "segdistill.pipeline_run"
ROLE_TAG = "segdistill.role"  # "parent" or "run"
PARENT_TAG = "mlflow.parentRunId"

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # The tracker repeats by itself; a call that hangs for minutes would only make it late.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
_importing = threading.RLock()
_fork_guarded = False


@dataclass(frozen=True)
class DatasetFacts:
    """What MLflow shows of a data set: its version, where it comes from, and its counts."""

    name: str
    md5: str
    source: str  # a path or a URL
    counts: Mapping[str, int] = field(default_factory=dict)  # samples by split


@dataclass(frozen=True)
class Store:
    """A tracking store: an SQLite file with its artifacts beside it, or a server.

    Attributes:
        uri: as MLflow takes it.
        injected: where the parents of runs are made by KFP's server: the run that it made for a task.
    """

    uri: str
    injected: str | None = None

    @property
    def database(self) -> Path | None:
        """The SQLite file, or None for a server."""
        given, _, path = self.uri.partition("?")[0].partition("sqlite:///")
        return Path(path) if path and not given else None

    @property
    def address(self) -> str:
        """The URI without a user name and password."""
        return masked_text(self.uri)

    def lock_path(self, purpose: str = "") -> Path:
        """The file by which processes on this machine take turns."""
        if self.database is not None:
            return self.database.with_name(f"{self.database.name}{purpose}.lock")
        name = hashlib.sha256(self.address.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"segdistill-{os.getuid()}-{name}{purpose}.lock"

    @contextlib.contextmanager
    def lock(self, purpose: str = "") -> Iterator[None]:
        """One process on this machine at a time."""
        path = self.lock_path(purpose)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # Unlocked by hand: a forked data worker still holds a copy of the descriptor.
                fcntl.flock(file, fcntl.LOCK_UN)

    def client(self) -> "MlflowClient":
        """A client whose tables exist; the first contact of many processes with a fresh file happens one by one."""
        import_mlflow()
        from mlflow import MlflowClient

        if self.database is None:
            return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        with self.lock():
            try:
                _make_tables(self.database)
                _settle(self.database)
            except sqlite3.OperationalError:  # locked, or away: worth another try
                raise
            except sqlite3.DatabaseError as error:
                raise UserError(
                    f"{self.database}: damaged ({error}); put a copy of it in its place, or move it away for a new one"
                ) from None
            client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            client.search_experiments(max_results=1)
            client.search_registered_models(max_results=1)
        return client


def default_store(root: Path, uri: str | None = None) -> Store:
    """The store that ``MLFLOW_TRACKING_URI`` names, else ``<root>/mlflow.db``.

    Raises:
        UserError: mlflow is not installed, or the URI is of a kind that MLflow no longer keeps runs in.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise UserError("mlflow is not installed; install segdistill[pipeline], or track to JSON lines")
    injected = None if uri else environment.injected_run()
    uri = uri or environment.tracking_uri() or f"sqlite:///{main_copy(root).resolve() / 'mlflow.db'}"
    scheme = uri.split(":", 1)[0] if ":" in uri else uri
    if scheme in ("file", "") or "://" not in uri or uri.endswith(":memory:"):
        raise UserError(
            f"MLFLOW_TRACKING_URI: '{masked_text(uri)}' cannot keep runs; "
            "allowed: sqlite:///<file>, another database, http(s)://<server>"
        )
    store = Store(_without_password(uri), injected)
    database = store.database
    if database is not None:
        if not database.is_absolute():  # relative to the project, also in a copy of it
            database = main_copy(Path()).resolve() / database
            store = replace(store, uri=f"sqlite:///{database}")
        _require_sqlite(database)
    return store


def _require_sqlite(database: Path) -> None:
    """Raises a UserError for a file that MLflow will never open, before anything is trained.

    SQLite looks, and not we: whoever opens and closes a database's file by other means lets go of all the locks that
    this process has on it.
    """
    if not database.exists() or not require_regular(database):
        return
    try:
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA schema_version")
    except sqlite3.OperationalError as error:
        if "unable to open" in str(error):
            raise UserError(f"{database}: cannot be opened; make it readable and writable") from None
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{database}: not an SQLite database, or a damaged one ({error}); move it away, or name another store in "
            "MLFLOW_TRACKING_URI"
        ) from None


def main_copy(folder: Path) -> Path:
    """The working copy that a folder belongs to.

    DVC runs ``dvc exp run --temp`` and ``--queue`` in copies below ``.dvc/tmp/exps`` and deletes these. What an
    experiment leaves beside its outputs, above all what it registers, belongs where the project is.
    """
    whole = folder.resolve()
    for parent in whole.parents:
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2]
    return folder


def _without_password(uri: str) -> str:
    """The address of a server alone; its user and password go where MLflow looks for them besides.

    MLflow writes the address into its warnings and errors.
    """
    try:
        parts = urlsplit(uri)
    except ValueError:
        return uri
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri
    if not parts.username or not parts.password:
        raise UserError(
            f"MLFLOW_TRACKING_URI: '{masked_text(uri)}' was given with half of a user and password; allowed: both, or "
            "neither beside MLFLOW_TRACKING_TOKEN"
        )
    address = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    environment.set_tracking_server(uri, address, unquote(parts.username), unquote(parts.password))
    return address


def _make_tables(database: Path) -> None:
    """Gives a fresh file MLflow's tables: made under another name, since that takes seconds in which one may be killed.

    What such a kill left in ``database`` itself (of MLflow's own commands) has no experiment in it. MLflow would refuse
    it for ever, so it is put aside.
    """
    if not _is_without_experiments(database):
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    partial = database.with_name(f"{database.name}.partial")
    for left in (partial, partial.with_name(f"{partial.name}-journal")):
        left.unlink(missing_ok=True)
    made = SqlAlchemyStore(f"sqlite:///{partial}", (database.parent / "mlruns").as_uri())
    made.engine.dispose()
    journal = database.with_name(f"{database.name}-journal")
    for left in (database, journal):
        if left.exists() and left.stat().st_size:
            aside = left.with_name(f"{left.name}.unfinished")
            logger.warning("%s: its tables were never finished; kept as %s", left, aside)
            left.replace(aside)
    partial.replace(database)


def _is_without_experiments(database: Path) -> bool:
    """Whether there is nothing that MLflow has finished: no file, no tables, or not even its first experiment."""
    if not database.exists() or not database.stat().st_size:
        return True
    with contextlib.closing(sqlite3.connect(database, timeout=20)) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        # Alembic rebuilds a table under such a name, and only then drops the one before.
        of_mlflow = names & {"experiments", "runs", "_alembic_tmp_experiments", "_alembic_tmp_runs"}
        if names and not of_mlflow:
            return False  # somebody else's tables
        return not any(connection.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() for name in of_mlflow)


def _settle(database: Path) -> None:
    """Lets the recorded places of artifacts follow a project folder that was moved or copied.

    MLflow records absolute ones, so it would go on to write where the folder was. Places that are not beside the
    database are somebody's choice and stay.
    """
    home = database.resolve().parent
    with contextlib.closing(sqlite3.connect(database, timeout=20)) as connection, connection:
        row = connection.execute("SELECT artifact_location FROM experiments WHERE name = ?", [EXPERIMENT]).fetchone()
        place = urlsplit(row[0] or "" if row else "")
        if place.scheme != "file" or not place.path.endswith(f"/{ARTIFACTS}"):
            return
        former = Path(unquote(place.path)).parent
        if former == home or ((former / ARTIFACTS).is_dir() and not (home / ARTIFACTS).is_dir()):
            return
        columns = [(table, column) for table, names in _PLACES.items() for column in names]
        for table, column in columns:
            for before, now in ((former.as_uri(), home.as_uri()), (str(former), str(home))):
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    [now, len(before) + 1, len(before) + 1, f"{before}/"],
                )
        logger.warning("%s: was in %s; its artifacts are looked for here now", database, former)


def import_mlflow() -> None:
    """Imports mlflow and what it loads late, quietly, and never in the midst of a fork.

    A child forked while another thread imports inherits that thread's half-taken import locks and may wait for ever;
    so forks of this process wait for the import, which is over in seconds and happens once.
    """
    global _fork_guarded
    environment.set_defaults(_ENVIRONMENT)
    with _importing:
        if not _fork_guarded:
            os.register_at_fork(
                before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release
            )
            _fork_guarded = True
        for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking", "mlflow.store"):
            logging.getLogger(name).setLevel(logging.WARNING)
        import mlflow.store.model_registry.sqlalchemy_store
        import mlflow.store.tracking.sqlalchemy_store
        import mlflow.tracking  # noqa: F401

        of_mlflow = logging.getLogger("mlflow")
        of_mlflow.setLevel(logging.WARNING)
        for handler in of_mlflow.handlers:
            if not any(isinstance(item, MaskingFilter) for item in handler.filters):
                handler.addFilter(MaskingFilter())


def experiment_id(client: "MlflowClient", store: Store) -> str:
    """The project's experiment, made if absent, restored if somebody deleted it; or that of KFP's server."""
    from mlflow.exceptions import MlflowException

    if store.injected is not None:
        return str(client.get_run(store.injected).info.experiment_id)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        place = (store.database.resolve().parent / ARTIFACTS).as_uri() if store.database else None
        kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on training runs, not on prompts
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=place, tags=kind))
        except MlflowException:
            experiment = client.get_experiment_by_name(EXPERIMENT)  # another machine was faster
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def ensure_parent(client: "MlflowClient", store: Store, pipeline_run: str, tags: Mapping[str, str]) -> "Run":
    """The parent run of a pipeline execution.

    On one machine a lock makes it unique. Processes on several machines may each make one against a server: each then
    looks again, all agree on the oldest, and whoever made another deletes his own. Where KFP's server made it, it is
    the run at the top of the task's own, which hangs below that of the loop that the task is in.
    """
    shared = {key: value for key, value in tags.items() if key in ("data_md5", "git_commit", "pipeline_run")}
    own = {PIPELINE_TAG: pipeline_run, ROLE_TAG: "parent", **_source(shared), **shared}
    if store.injected is not None:
        run = client.get_run(store.injected)
        while run.data.tags.get(PARENT_TAG):
            run = client.get_run(run.data.tags[PARENT_TAG])
        for key in own.keys() - run.data.tags.keys():
            client.set_tag(run.info.run_id, key, own[key])
        return run
    experiment = experiment_id(client, store)
    if parents := _search(client, experiment, pipeline_run, "parent"):
        return parents[0]
    created = client.create_run(experiment, run_name=pipeline_run, tags=own)
    oldest = _search(client, experiment, pipeline_run, "parent")[0]
    if oldest.info.run_id != created.info.run_id:
        client.delete_run(created.info.run_id)
    return oldest


def ensure_run(
    client: "MlflowClient",
    store: Store,
    pipeline_run: str,
    name: str,
    tags: Mapping[str, str],
    dataset: DatasetFacts | None = None,
    *,
    reopen: bool = True,
    since: float | None = None,
) -> str:
    """The id of the run ``name`` in a pipeline execution: the one that is there, set to RUNNING again, or a new one.

    Tags that the run has already stay as they are. Without ``reopen`` a run that is there keeps its status and its end.
    A new one began at ``since``, in seconds of the epoch, or now.
    """
    with store.lock():
        parent = ensure_parent(client, store, pipeline_run, tags)
        runs = _search(client, parent.info.experiment_id, pipeline_run, "run", name)
        if runs:
            run = runs[-1]
            if reopen and run.info.status != "RUNNING":
                client.update_run(run.info.run_id, status="RUNNING")
            for key, value in tags.items():
                if key not in run.data.tags:
                    client.set_tag(run.info.run_id, key, value)
        else:
            own = {PIPELINE_TAG: pipeline_run, ROLE_TAG: "run", PARENT_TAG: parent.info.run_id}
            run = client.create_run(
                parent.info.experiment_id, None if since is None else round(1000 * since), run_name=name,
                tags={**tags, **_source(tags), **own},
            )  # fmt: skip
    if dataset is not None:
        for one in (run, parent):
            if not any(item.dataset.digest == dataset.md5[:36] for item in one.inputs.dataset_inputs):
                client.log_inputs(one.info.run_id, [_dataset_input(dataset)])
    return str(run.info.run_id)


def finish_parent(store: Store, pipeline_run: str, status: str | None, *, seconds: float = 60.0) -> bool:
    """Ends the parent run with FINISHED, FAILED or KILLED; says whether the store took it.

    None is for who does not know: the status that the stages left, of which the pipeline's last one alone writes
    FINISHED; a run that none of them ended has FAILED.

    After a failure, children that still run belong to processes that were killed: they become KILLED.
    """

    def finish() -> None:
        client = store.client()
        with store.lock():
            parent = ensure_parent(client, store, pipeline_run, {})
        final = status or (parent.info.status if parent.info.status in ("FINISHED", "KILLED") else "FAILED")
        if final != "FINISHED":
            for run in _search(client, parent.info.experiment_id, pipeline_run, "run"):
                if run.info.status == "RUNNING":
                    client.set_terminated(run.info.run_id, "KILLED")
        client.set_terminated(parent.info.run_id, final)

    def outage(error: Exception) -> str | None:
        return None if isinstance(error, UserError) else one_line(error)

    try:
        Patience(store.address, seconds).ask(finish, outage)
    except UserError as error:
        logger.warning("pipeline run %s did not get its status %s: %s", pipeline_run, status or "", error)
        return False
    return True


def one_line(error: Exception) -> str:
    """An error of a store for a message."""
    return masked_text(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")


def check_name(what: str, value: str) -> str:
    """``value``, if it can stand in an MLflow search."""
    if not re.fullmatch(r"[\w.\-:@+ /]{1,250}", value):
        raise UserError(f"{what}: {value!r} is not allowed; allowed: letters, digits and . _ - : @ + / and blanks")
    return value


def _search(
    client: "MlflowClient", experiment: str, pipeline_run: str, role: str, name: str | None = None
) -> list["Run"]:
    """Oldest first; equal times in the order of their ids, so that all who look agree."""
    condition = f"tags.`{PIPELINE_TAG}` = '{pipeline_run}' and tags.`{ROLE_TAG}` = '{role}'"
    if name is not None:
        condition += f" and attributes.run_name = '{name}'"
    runs = client.search_runs([experiment], condition, order_by=["attributes.start_time ASC"])
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def _source(tags: Mapping[str, str]) -> dict[str, str]:
    """Command and commit once more under the names that MLflow's own pages show."""
    source = {"mlflow.source.name": f"segdistill {tags.get('stage', '')}".strip(), "mlflow.source.type": "LOCAL"}
    return source | ({"mlflow.source.git.commit": tags["git_commit"]} if tags.get("git_commit") else {})


def _dataset_input(dataset: DatasetFacts) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind = "s3" if dataset.source.startswith("s3:") else "http" if dataset.source.startswith("http") else "local"
    source = {"url" if kind == "http" else "uri": masked_text(dataset.source)}
    counts = json.dumps(dict(dataset.counts))
    entity = Dataset(dataset.name, dataset.md5[:36], source_type=kind, source=json.dumps(source), profile=counts)
    return DatasetInput(entity, tags=[InputTag("mlflow.data.context", "training")])
