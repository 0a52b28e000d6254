"""The whole pipeline in real containers, between a real S3 store, PostgreSQL and MLflow; and what goes wrong there."""

import contextlib
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml
from s3_server import SECRET, Server, credentials
from services import ROOT, GitDaemon, MlflowServer, tasks

from segdistill.config import to_dict
from segdistill.plan import Job, cohort_plan

BUCKET = "datasets"
RUN, SEEDS = ["none", "kd"], [0, 1]
SIZE = (64, 48)
ITERATIONS = 80  # enough for a training to be caught in the middle, also by a test that is kept waiting
AWAY_SECONDS = 20

# In a process of its own, since DVC configures logging and more for its own ends.
DVC = """
import sys
from dvc.cli import main

for arguments in (
    ["init"], ["config", "core.analytics", "false"], ["remote", "add", "--default", "store", sys.argv[1]],
    ["remote", "modify", "store", "endpointurl", sys.argv[2]], ["add", "data"], ["push"],
):
    code = main([*arguments, "--quiet"])
    if code:
        sys.exit(code)
"""


def tiny(**train: Any) -> dict[str, Any]:
    """params.yaml with networks that are hardly trained, on two experiments with two seeds."""
    params: dict[str, Any] = json.loads(json.dumps(yaml.safe_load((ROOT / "params.yaml").read_text())))
    for section, iterations in (("train_teacher", 4), ("distill", ITERATIONS)):
        settings = {"batch_size": 4, "validate_every": iterations, "checkpoint_every": 5, "log_every": 1}
        params[section]["train"] |= {"iterations": iterations, **settings}
        params[section]["train"]["augmentation"]["crop_size"] = [SIZE[1], SIZE[0]]
    params["distill"]["train"] |= train
    params["evaluate"] |= {"overlays": 1, "latency_repeats": 1}
    params["compare"]["overlays"] = 1
    params["run"], params["seeds"] = RUN, SEEDS
    return params


@dataclass(frozen=True)
class Dataset:
    """The synthetic streets in git and S3."""

    folder: Path
    address: str

    @property
    def commit(self) -> str:
        return subprocess.check_output(["git", "-C", str(self.folder), "rev-parse", "HEAD"], text=True).strip()

    @property
    def md5(self) -> str:
        return str(yaml.safe_load((self.folder / "data.dvc").read_text())["outs"][0]["md5"])


@pytest.fixture(scope="session")
def dataset(folder: Path, store: Server, git_daemon: GitDaemon) -> Dataset:
    from segdistill import streets

    made = folder / "git" / "streets"
    made.mkdir(parents=True)
    streets.write(made / "data", seed=1, size=SIZE, samples={"train": 12, "val": 4, "test": 4}, workers=1)
    store.client().create_bucket(Bucket=BUCKET)

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(made), *arguments], check=True, capture_output=True)

    git("init", "--quiet", "--initial-branch", "main")
    pushed = subprocess.run(
        [sys.executable, "-c", DVC, f"s3://{BUCKET}/streets", store.endpoint],
        cwd=made, env=os.environ | credentials(), capture_output=True, text=True,
    )  # fmt: skip
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    git("add", ".")
    git("-c", "user.name=ci", "-c", "user.email=ci@example.invalid", "commit", "--quiet", "--message", "streets")
    git("tag", "v1")
    return Dataset(made, git_daemon.address("streets"))


@dataclass
class Running:
    """A pipeline under way, whose output is read line by line."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def until(self, ready: Callable[[], Any], seconds: float = 300) -> Any:
        """What ``ready`` returns once that is true, while the pipeline runs."""
        deadline = time.monotonic() + seconds
        while not (found := ready()):
            assert self.process.poll() is None, self.output[-5000:]
            assert time.monotonic() < deadline, self.output[-5000:]
            time.sleep(0.1)
        return found

    def ended(self, seconds: float = 1200) -> int:
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code


@dataclass(frozen=True)
class Cluster:
    """All that a pipeline needs here."""

    client: docker.DockerClient
    mlflow: MlflowServer
    store: Server
    dataset: Dataset
    root: Path  # of every pipeline's outputs, since a container sees nothing else

    def environment(self, name: str, **more: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "MLFLOW_"))}
        return {
            **kept, **credentials(), "AWS_ENDPOINT_URL_S3": self.store.endpoint,
            "MLFLOW_TRACKING_URI": self.mlflow.uri, "SEGDISTILL_PIPELINE_RUN": name,
            "OMP_NUM_THREADS": "1", **more,
        }  # fmt: skip

    @contextlib.contextmanager
    def start(self, name: str, *command: str, **more: str) -> Iterator[Running]:
        """A pipeline that is a run of its own in MLflow; its containers end with it."""
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=self.environment(name, **more) | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        running = Running(process)
        try:
            yield running
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(120)
            (self.root.parent / f"{name}.log").write_text(running.output)

    def pipeline(self, name: str, params: dict[str, Any], **more: str) -> contextlib.AbstractContextManager[Running]:
        file = self.root.parent / f"{name}.yaml"
        file.write_text(yaml.safe_dump(params))
        options = ["--repository", self.dataset.address, "--revision", "v1", "--params", str(file)]
        options += ["--runner", "docker", "--root", str(self.root)]
        return self.start(name, "-m", "pipelines", "run", *options, **more)

    def task(
        self,
        name: str,
        component: str,
        parameters: dict[str, Any],
        artifacts: dict[str, tuple[Path, str]] | None = None,
        work: Path | None = None,
        retries: int = 0,
        memory: str | None = None,
    ) -> contextlib.AbstractContextManager[Running]:
        """A pipeline of one task, whose inputs are artifacts of an earlier pipeline: path and kind by name."""
        settings = {
            "component": component, "parameters": parameters, "retries": retries, "root": str(self.root),
            "artifacts": {key: (str(path), kind) for key, (path, kind) in (artifacts or {}).items()},
            "work": str(work) if work else None, "memory": memory,
        }  # fmt: skip
        return self.start(name, str(Path(__file__).with_name("one_task.py")), json.dumps(settings))

    def containers(self, task: str) -> list[Any]:
        return tasks(self.client, task)

    def known(self) -> set[Path]:
        """The folders of the pipelines so far."""
        return set(self.root.glob("*"))


@pytest.fixture(scope="session")
def cluster(
    folder: Path, client: docker.DockerClient, mlflow_server: MlflowServer, store: Server, dataset: Dataset
) -> Cluster:
    (folder / "runs").mkdir()
    return Cluster(client, mlflow_server, store, dataset, folder / "runs" / "root")


@dataclass(frozen=True)
class Done:
    """A pipeline that ran to its end."""

    output: str
    folder: Path
    params: dict[str, Any]

    def made(self, stage: str, output: str, cohort: str | None = None) -> Path:
        """An output's folder, by what its mark says."""
        for mark in self.folder.rglob(".completed"):
            facts = json.loads(mark.read_text())
            if (facts["stage"], facts["cohort"], mark.parent.name) == (stage, cohort, output):
                return mark.parent
        raise AssertionError(f"{stage} {output} {cohort}: not in {self.folder}")

    def inputs_of_distill(self) -> dict[str, tuple[Path, str]]:
        prepared, teacher = self.made("prepare", "prepared"), self.made("train_teacher", "teacher")
        return {"prepared": (prepared, "Dataset"), "teacher": (teacher, "Model")}


def parameters_of_distill(params: dict[str, Any], *experiments: str) -> dict[str, Any]:
    """The cohort of the first seed, or these experiments of it."""
    jobs = [Job(experiment, SEEDS[0]) for experiment in experiments or RUN]
    plan = cohort_plan(params["distill"], params["experiments"], jobs)
    return {"plan": json.dumps(to_dict(plan)), "cohort": "s0"}


@pytest.fixture(scope="session")
def done(cluster: Cluster) -> Done:
    """The pipeline from fetch to register, undisturbed."""
    params, before = tiny(), cluster.known()
    with cluster.pipeline("undisturbed", params) as running:
        code = running.ended()
    assert code == 0, running.output[-8000:]
    (made,) = cluster.known() - before
    return Done(running.output, made, params)


@pytest.fixture
def mlflow(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library as a user of the server has it: no key for S3."""
    import mlflow

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", cluster.mlflow.uri)
    mlflow.set_tracking_uri(cluster.mlflow.uri)
    return mlflow


def runs_of(mlflow: Any, name: str) -> list[Any]:
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("segdistill")
    return list(client.search_runs([experiment.experiment_id], f"tags.`segdistill.pipeline_run` = '{name}'"))


def test_the_pipeline_runs_from_fetch_to_register_with_its_runs_in_mlflow(
    done: Done, cluster: Cluster, mlflow: Any
) -> None:
    runs = runs_of(mlflow, "undisturbed")
    (parent,) = [run for run in runs if run.data.tags["segdistill.role"] == "parent"]
    assert parent.info.status == "FINISHED"
    children = {run.info.run_name: run for run in runs if run.data.tags["segdistill.role"] == "run"}
    jobs = [f"{experiment}-s{seed}" for experiment in RUN for seed in SEEDS]
    assert {*jobs, "teacher"} <= set(children)
    for name in (*jobs, "teacher"):
        run = children[name]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["data_md5"] == cluster.dataset.md5
        assert 0 <= run.data.metrics["val/miou"] <= 1
        assert 0 <= run.data.metrics["test/miou"] <= 1
    for name in jobs:
        history = mlflow.MlflowClient().get_metric_history(children[name].info.run_id, "train/loss/total")
        assert [point.step for point in history] == list(range(1, ITERATIONS + 1))
    assert not tasks(cluster.client, all=True)
    assert SECRET not in done.output


def test_the_images_say_which_commit_they_are_of_and_the_runs_too(
    done: Done, images: dict[str, str], client: docker.DockerClient, mlflow: Any
) -> None:
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    for image in images.values():
        labels = client.images.get(image).attrs["Config"]["Labels"]
        assert labels["org.opencontainers.image.revision"] == commit
        assert not image.endswith(":latest")
    (teacher,) = [run for run in runs_of(mlflow, "undisturbed") if run.info.run_name == "teacher"]
    assert teacher.data.tags["git_commit"] == commit


def test_the_champion_is_loaded_by_its_alias_and_predicts(done: Done, mlflow: Any) -> None:
    import torch

    registered = json.loads((done.made("register", "registration") / "registration.json").read_text())
    name = done.params["register"]["model_name"]
    version = mlflow.MlflowClient().get_model_version_by_alias(name, "champion")
    assert (registered["alias"], registered["version"]) == ("champion", int(version.version))
    model = mlflow.pytorch.load_model(f"models:/{name}@champion", device="cpu")
    logits = model(torch.rand(2, 3, SIZE[1], SIZE[0]))
    assert logits.shape[0] == 2
    assert logits.shape[2:] == (SIZE[1], SIZE[0])
    assert torch.isfinite(logits).all()


def test_a_training_container_that_is_killed_goes_on_and_ends_as_if_never_killed(done: Done, cluster: Cluster) -> None:
    work, before = cluster.root.parent / "work", cluster.known()
    given = cluster.task(
        "killed", "distill", parameters_of_distill(done.params), done.inputs_of_distill(), work=work, retries=1
    )
    with given as running:
        # The first checkpoint is written; training goes on for some more iterations.
        running.until(lambda: list(work.rglob("resume.safetensors")))
        (container,) = cluster.containers("distill")
        container.kill("SIGKILL")
        assert running.ended() == 0, running.output[-5000:]
    assert "FAILED: ended by SIGKILL (exit code 137)" in running.output
    assert "resumed at iteration" in running.output, running.output[-5000:]
    (made,) = cluster.known() - before
    undisturbed = done.made("distill", "students", "s0")
    students = {path.parent.name: path.read_bytes() for path in made.rglob("cnn.safetensors")}
    assert students == {name: (undisturbed / name / "cnn.safetensors").read_bytes() for name in RUN}
    assert not list(work.rglob("*.safetensors"))


def test_a_stage_that_needs_more_memory_than_it_may_have_says_so(done: Done, cluster: Cluster) -> None:
    before = cluster.known()
    given = parameters_of_distill(done.params), done.inputs_of_distill()
    with cluster.task("memory", "distill", *given, memory="200m") as running:
        assert running.ended() == 1, running.output[-5000:]
    assert "distill | FAILED: out of memory, its limit is 200m" in running.output
    (made,) = cluster.known() - before
    assert not list(made.rglob(".completed"))


def test_an_s3_that_is_away_for_20_seconds_is_waited_for_by_fetch(cluster: Cluster) -> None:
    parameters = {"repository": cluster.dataset.address, "revision": "v1"}
    with cluster.task("fetch-away", "fetch", parameters) as running:
        running.until(lambda: cluster.containers("fetch"))
        cluster.store.stop()
        try:
            running.until(lambda: "S3 cannot be reached" in running.output)
            time.sleep(AWAY_SECONDS)
            assert running.process.poll() is None, running.output
        finally:
            cluster.store.start()
        assert running.ended() == 0, running.output[-5000:]
    assert "answers again" in running.output


def test_an_s3_that_is_away_for_20_seconds_delays_the_upload_of_artifacts(
    done: Done, cluster: Cluster, mlflow: Any
) -> None:
    parameters = {"params": json.dumps({"evaluate": done.params["evaluate"]}), "cohort": "s0"}
    inputs = {
        "prepared": (done.made("prepare", "prepared"), "Dataset"),
        "students": (done.made("distill", "students", "s0"), "Model"),
    }
    with cluster.task("upload-away", "evaluate", parameters, inputs) as running:
        running.until(lambda: cluster.containers("evaluate"))
        cluster.store.stop()
        try:
            running.until(lambda: "does not answer, its records wait" in running.output)
            time.sleep(AWAY_SECONDS)
        finally:
            cluster.store.start()
        assert running.ended() == 0, running.output[-5000:]
    assert "send them later" not in running.output
    (run,) = [run for run in runs_of(mlflow, "upload-away") if run.info.run_name == "kd-s0"]
    pictures = mlflow.MlflowClient().list_artifacts(run.info.run_id, "pictures")
    assert pictures
    assert all(picture.is_dir or picture.file_size for picture in pictures)


def test_an_mlflow_server_that_is_away_for_30_seconds_in_mid_training_loses_nothing(
    done: Done, cluster: Cluster, mlflow: Any
) -> None:
    params, before = tiny(iterations=None, seconds=90), cluster.known()
    inputs = done.inputs_of_distill()
    with cluster.task("mlflow-away", "distill", parameters_of_distill(params, "none"), inputs) as running:
        client = mlflow.MlflowClient()

        def logged() -> list[Any]:
            runs = [run for run in runs_of(mlflow, "mlflow-away") if run.info.run_name == "none-s0"]
            return list(client.get_metric_history(runs[0].info.run_id, "train/loss/total")) if runs else []

        running.until(logged)
        cluster.mlflow.stop()
        try:
            time.sleep(30)
        finally:
            cluster.mlflow.start()
        assert running.ended() == 0, running.output[-5000:]
    assert "does not answer, its records wait" in running.output
    (made,) = cluster.known() - before
    (curve,) = made.rglob("curves/cnn.csv")
    with curve.open() as file:
        expected = [
            (int(row["step"]), float(row["train/loss/total"]))
            for row in csv.DictReader(file)
            if row["train/loss/total"]
        ]
    assert len(expected) > 5
    assert [(point.step, point.value) for point in logged()] == expected


def test_a_wrong_s3_key_is_one_sentence_and_a_failed_run(cluster: Cluster) -> None:
    with cluster.pipeline("wrong-key", tiny(), AWS_SECRET_ACCESS_KEY="wrong") as running:
        assert running.ended() == 1, running.output[-5000:]
    said = [line for line in running.lines if "does not accept the S3 credentials (SignatureDoesNotMatch)" in line]
    assert len(said) == 1, running.output
    assert "Traceback" not in running.output
    assert "FAILED: exit code 2" in running.output


def test_a_corrupted_object_is_named_with_both_hashes(cluster: Cluster) -> None:
    before = cluster.known()
    file = next((cluster.dataset.folder / "data").rglob("*.png"))
    content = file.read_bytes()
    md5 = hashlib.md5(content).hexdigest()
    key = f"streets/files/md5/{md5[:2]}/{md5[2:]}"
    parameters = {"repository": cluster.dataset.address, "revision": "v1"}
    s3 = cluster.store.client()
    s3.put_object(Bucket=BUCKET, Key=key, Body=b"rotten")
    try:
        with cluster.task("corrupted", "fetch", parameters) as running:
            assert running.ended() == 1, running.output[-5000:]
    finally:
        s3.put_object(Bucket=BUCKET, Key=key, Body=content)
    assert f"is corrupted: expected md5 {md5}" in running.output
    assert hashlib.md5(b"rotten").hexdigest() in running.output
    (made,) = cluster.known() - before
    assert not list(made.rglob(".completed"))
