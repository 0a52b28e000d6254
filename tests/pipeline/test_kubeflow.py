"""The compiled pipeline against KFP's own schemas and our rules for a cluster, and one run of it on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compiled import Graphs
from tiny_params import tiny
from versioned import commit_data

from segdistill.config import read_yaml
from segdistill.errors import UserError
from segdistill.stages import STAGES

pytest.importorskip("kfp")
ROOT = Path(__file__).resolve().parents[2]
PARAMS = ROOT / "params.yaml"


def compile_pipeline(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", "compile", "--out", str(out), "--params", str(PARAMS)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    done = compile_pipeline(out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def documents(compiled: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    spec, platform = yaml.safe_load_all(compiled.read_text())
    return spec, platform


@pytest.fixture(scope="module")
def containers(documents: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The container of every task that has one."""
    executors = documents[0]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): one["container"] for name, one in executors.items() if "container" in one}


@pytest.fixture(scope="module")
def settings(documents: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What every task asks of Kubernetes."""
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): one for name, one in executors.items()}


def test_two_processes_compile_the_same_bytes(compiled: Path, tmp_path: Path) -> None:
    assert compile_pipeline(tmp_path / "again.yaml", PYTHONHASHSEED="7").returncode == 0
    assert (tmp_path / "again.yaml").read_bytes() == compiled.read_bytes()


def test_a_second_test_set_which_no_task_has_is_refused_when_the_pipeline_is_compiled(tmp_path: Path) -> None:
    from pipelines.__main__ import compile_to

    params = tiny(read_yaml(PARAMS))
    params["evaluate"]["out_of_domain"] = {"data": "elsewhere", "layout": "folder"}
    with pytest.raises(UserError, match=r"evaluate.out_of_domain: .* set it to null, or evaluate by dvc repro"):
        compile_to(tmp_path / "pipeline.yaml", params)
    assert not (tmp_path / "pipeline.yaml").exists()


def test_the_compiled_file_is_a_pipeline_to_kfp(
    compiled: Path, documents: tuple[dict[str, Any], dict[str, Any]], settings: dict[str, dict[str, Any]]
) -> None:
    from google.protobuf import json_format
    from kfp import components
    from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
    from kfp.pipeline_spec import pipeline_spec_pb2

    # An unknown field is an error in each of these.
    json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(documents[1], pipeline_spec_pb2.PlatformSpec())
    for task in settings.values():
        json_format.ParseDict(task, KubernetesExecutorConfig())
    inputs = components.load_component_from_file(str(compiled)).component_spec.inputs
    assert [name for name, item in inputs.items() if not item.optional] == ["repository", "revision"]


def test_the_loop_is_handed_all_that_its_tasks_read(documents: tuple[dict[str, Any], dict[str, Any]]) -> None:
    # kfp 2.17.0 compiles a resource setting that is a pipeline parameter, and forgets to hand it into a loop.
    graphs = Graphs(documents[0])
    assert graphs.inside("distill", graphs.loop)
    for name, task in graphs.tasks.items():
        around = graphs.content[graphs.graph_of[name]].get("inputDefinitions", {})
        for kind, key in (("parameters", "componentInputParameter"), ("artifacts", "componentInputArtifact")):
            read = {source[key] for source in task.get("inputs", {}).get(kind, {}).values() if key in source}
            assert read <= set(around.get(kind, {})), name


def test_every_image_names_its_version(containers: dict[str, dict[str, Any]]) -> None:
    assert set(containers) == {stage.name.replace("_", "-") for stage in STAGES if stage.image} | {"fetch", "finish"}
    for name, container in containers.items():
        tag = container["image"].rpartition("/")[2].partition(":")[2]
        assert tag and tag != "latest", f"{name}: {container['image']}"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SEGDISTILL_IMAGE_DATA", "registry.invalid:5000/data-python"),
        ("SEGDISTILL_IMAGE_TRAIN", "registry.invalid/train-python:latest"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(variable: str, value: str, tmp_path: Path) -> None:
    done = compile_pipeline(tmp_path / "pipeline.yaml", **{variable: value})
    assert done.returncode == 2
    assert done.stderr.startswith(f"pipelines compile: {variable}: '{value}'") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_task_installs_packages_when_it_starts(containers: dict[str, dict[str, Any]]) -> None:
    for name, container in containers.items():
        assert "pip install" not in " ".join([*container["command"], *container["args"]]), name


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("options", [["pipeline.yaml"], ["tuning.yaml", "--tune", "2"]], ids=lambda given: given[0])
def test_the_compiled_pipeline_is_the_one_under_version_control(options: list[str], tmp_path: Path) -> None:
    name, *more = options
    given = [f"--{one}={GOLDEN / one}.yaml" for one in ("params", "cluster")]
    again = [sys.executable, "-m", "pipelines", "compile", *given, "--out", str(tmp_path / name), *more]
    own = {name: value for name, value in os.environ.items() if not name.startswith("SEGDISTILL_IMAGE_")}
    subprocess.run(again, cwd=ROOT, env=own, check=True, capture_output=True)
    if (tmp_path / name).read_text() != (GOLDEN / name).read_text():
        folder = GOLDEN.relative_to(ROOT)
        pytest.fail(
            "the compiled pipeline has changed; if it was meant to, write it anew and read its diff:\n"
            f"python -m pipelines compile --params {folder}/params.yaml --cluster {folder}/cluster.yaml "
            f"--out {' '.join([str(folder / name), *more])}"
        )


# The pipeline that tunes


def test_the_passwords_of_the_trials_come_from_a_secret_and_only_those_who_share_them_have_it() -> None:
    text = (GOLDEN / "tuning.yaml").read_text()
    spec, platform = yaml.safe_load_all(text)
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    secrets = {name: {one["secretName"] for one in task.get("secretAsEnv", [])} for name, task in executors.items()}
    readers = {name for name, names in secrets.items() if "segdistill-tune" in names}
    assert readers == {"exec-tune", "exec-tune-report"}
    tasks = Graphs(spec).leaves
    assert {name for name, task in tasks.items() if not task["cachingOptions"].get("enableCache")} == {
        "tune", "tune-report", "finish"
    }, "KFP's cache knows nothing of the store"  # fmt: skip


@pytest.mark.parametrize(
    ("options", "tune", "cluster", "sentence"),
    [
        (["0"], {}, {}, "--tune: '0' is not a number of workers; expected 1 or more"),
        (["2"], {"storage": None}, {}, "tune.storage: 'null' is a SQLite file, which several machines cannot share"),
        (["2"], {"storage": "sqlite:////workspace/trials.db"}, {}, "tune.storage: 'sqlite:////workspace/trials.db' is"),
        (["2"], {"storage": "postgresql://me:hunter2@h/t"}, {}, "tune.storage: a password in it; give it as SEGDIST"),
        (["2"], {"experiments": ["nobody"]}, {}, "tune.experiments: 'nobody' is not defined under experiments"),
        (["2"], {}, {"count": 4}, "accelerators of a task: 4, but a worker of a tuning trains on one; set 1, and --tu"),
        (["2"], {}, {"nodes": 2}, "accelerator.nodes: above 1, but a worker of a tuning trains on one node"),
    ],
)
def test_a_tuning_that_could_not_be_shared_is_refused_before_anything_runs(
    options: list[str],
    tune: dict[str, Any],
    cluster: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pipelines.__main__ import main

    given = []
    for name, section, changes in (("params", "tune", tune), ("cluster", "accelerator", cluster)):
        content = read_yaml(GOLDEN / f"{name}.yaml")
        content[section] |= changes
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        given.append(f"--{name}={tmp_path / name}.yaml")
    assert main(["compile", *given, "--out", str(tmp_path / "out.yaml"), "--tune", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pipelines compile: {sentence}") and said.count("\n") == 1 and "hunter2" not in said
    assert not (tmp_path / "out.yaml").exists()


# The whole pipeline in processes of this machine


def run_pipeline(repository: Path, folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", "run", "--params", "params.yaml", "--repository", str(repository)]
    command += options
    surroundings = os.environ | {"PYTHONPATH": str(ROOT), "SEGDISTILL_TRACKER": "jsonl"} | environment
    return subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True)


def test_a_task_that_fails_fails_the_pipeline_and_nothing_but_the_end_runs_after_it(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS.read_text())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/classes.json").write_text("[]")
    repository = commit_data(tmp_path / "repository", tmp_path / "empty")
    done = run_pipeline(repository, tmp_path)
    assert done.returncode == 1
    assert "segdistill validate: " in done.stdout and "Traceback" not in done.stdout + done.stderr
    (run,) = (tmp_path / "artifacts/kfp").iterdir()
    assert {task.name for task in run.iterdir()} <= {"fetch", "validate", "finish"}


def test_without_a_version_of_the_data_nothing_runs(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS.read_text())
    done = run_pipeline(tmp_path, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"pipelines run: {tmp_path}: not a git repository that can be read")
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.slow
def test_the_whole_pipeline_runs_in_local_processes_and_registers_a_student(tiny_data: Path, tmp_path: Path) -> None:
    params = tiny(read_yaml(PARAMS))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    repository = commit_data(tmp_path / "repository", tiny_data)
    md5 = yaml.safe_load((repository / "data.dvc").read_text())["outs"][0]["md5"]
    done = run_pipeline(
        repository,
        tmp_path,
        MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path / 'mlflow.db'}",
        SEGDISTILL_PIPELINE_RUN="local-test",
        SEGDISTILL_GIT_COMMIT="4567",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = [line.strip() for line in done.stdout.splitlines()]
    places = dict(line.split(": ", 1) for line in lines if line.startswith(("report: /", "registration: /")))
    assert sorted(places) == ["registration", "report"], done.stdout[-4000:] + done.stderr[-2000:]
    results = json.loads((Path(places["report"]) / "results.json").read_text())
    assert [(row["experiment"], row["student"]) for row in results["rows"]] == [("none", "cnn"), ("kd", "cnn")]
    registered = json.loads((Path(places["registration"]) / "registration.json").read_text())
    assert (registered["version"], registered["alias"], registered["seed"]) == (1, "champion", 0)
    tracked = tmp_path / "artifacts/tracking/local-test"
    expected = {f"{stage.name}{'-s0' * stage.per_cohort}.jsonl" for stage in STAGES if stage.image}
    assert {path.name for path in tracked.iterdir()} == expected
    first = json.loads((tracked / "distill-s0.jsonl").read_text().splitlines()[0])["values"]
    assert (first["data_md5"], first["git_commit"], first["pipeline_run"]) == (md5, "4567", "local-test")


@pytest.mark.slow
def test_two_workers_of_a_pipeline_in_local_processes_share_the_trials_of_a_tuning(
    tiny_data: Path, tmp_path: Path
) -> None:
    params = json.loads(json.dumps(tiny(read_yaml(PARAMS))))
    params["tune"] |= {"trials": 3, "round": 1}
    (tmp_path / "params.yaml").write_text("# mine\n" + yaml.safe_dump(params))
    repository = commit_data(tmp_path / "repository", tiny_data)
    done = run_pipeline(repository, tmp_path, "--tune", "2", SEGDISTILL_PIPELINE_RUN="local-test")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "Warning: " not in done.stdout
    (line,) = [line for line in map(str.strip, done.stdout.splitlines()) if line.startswith("report: /")]
    report = Path(line.removeprefix("report: "))
    tuned = (report / "params.yaml").read_text()
    assert tuned.startswith("# mine") and set(yaml.safe_load(tuned)) == set(params)
    assert (report.parent / "page").read_text() == (report / "report.html").read_text()
    trials = json.loads((report / "trials.json").read_text())["experiments"]
    assert {name: len(one["each"]) for name, one in trials.items()} == {"none": 3, "kd": 3}
    # Each trial has one run, a child of the pipeline's, by one of the workers.
    tracked = tmp_path / "artifacts/tracking/local-test"
    by_worker = [tracked / f"tune-w{number}.jsonl" for number in range(2)]
    runs = [
        line["run"]
        for file in by_worker
        for line in map(json.loads, file.read_text().splitlines())
        if line["kind"] == "tags" and line.get("run")
    ]
    assert sorted(set(runs)) == sorted(runs) and len(runs) == 6
    assert {run.rsplit("-t", 1)[0] for run in runs} == {"none-s0", "kd-s0"}
