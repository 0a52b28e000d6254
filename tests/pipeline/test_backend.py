"""The compiled pipeline by the rules of the released servers (backend.py), from fetch to register."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from backend import Executor, PodLost, Run, Server, TaskFailed, run_source
from compiled import Graphs
from tiny_params import tiny
from versioned import commit_data

from segdistill.config import read_yaml
from segdistill.errors import UserError

pytest.importorskip("kfp")
PARAMS = Path(__file__).resolve().parents[2] / "params.yaml"
GOLDEN_PARAMS = Path(__file__).parent / "golden/params.yaml"
GOLDEN, TUNING = (GOLDEN_PARAMS.with_name(name).read_text() for name in ("pipeline.yaml", "tuning.yaml"))
COHORTS = ["none-s0", "kd-s0", "none-s1", "kd-s1"]  # of one job each
VERSION = {"repository": "https://git.invalid/streets.git", "revision": "4567"}


def stub(task: str, container: Any, executor_input: dict[str, Any]) -> None:
    """Makes no output but an empty one: only which artifact goes where is of interest."""


def failing(task: str, cohort: str = "", error: type[Exception] = TaskFailed, times: int = 10**9) -> Executor:
    """A stub of which one task fails so many times, in a loop only the one of this cohort."""
    left = iter(range(times))

    def execute(name: str, container: Any, executor_input: dict[str, Any]) -> None:
        given = executor_input["inputs"]["parameterValues"]
        here = name == task and (not cohort or given["cohort"] == cohort)
        if here and next(left, None) is not None:
            raise error(f"{task} ended")

    return execute


def told(run: Run) -> str:
    """The state that the exit handler was told."""
    (finish,) = run.of("finish")
    return str(finish.parameters["status"]["state"])


# The graph as it is


def test_the_students_of_every_cohort_reach_compare_and_register(tmp_path: Path) -> None:
    run = Server(tmp_path, stub).start(GOLDEN, VERSION)
    assert run.state == "SUCCEEDED", run.failed
    assert [one.parameters["cohort"] for one in run.of("distill")] == COHORTS
    made = {name: [one.output_artifacts[name] for one in run.of(task)] for task, name in (
        ("distill", "students"), ("evaluate", "evaluations")
    )}  # fmt: skip
    (compare,), (register,) = run.of("compare"), run.of("register")
    assert compare.artifacts["students"] == register.artifacts["students"] == made["students"]
    assert compare.artifacts["evaluations"] == made["evaluations"]
    for distill, evaluate in zip(run.of("distill"), run.of("evaluate"), strict=True):
        assert evaluate.artifacts["students"] == [distill.output_artifacts["students"]]


def test_each_worker_of_a_tuning_is_in_the_loop_and_the_report_waits_for_all(tmp_path: Path) -> None:
    run = Server(tmp_path, stub).start(TUNING, VERSION)
    assert run.state == "SUCCEEDED", run.failed
    assert [one.parameters["cohort"] for one in run.of("tune")] == ["w0", "w1"]
    (report,) = run.of("tune-report")
    assert report.artifacts["trials"] == [one.output_artifacts["trials"] for one in run.of("tune")]
    assert report.parameters["plan"] == GOLDEN_PARAMS.read_text(), "comments included"
    lost = Server(tmp_path, failing("tune", "w1")).start(TUNING, VERSION)
    assert lost.state == "FAILED" and not lost.of("tune-report") and told(lost) == "FAILED"


@pytest.mark.parametrize("package", ["GOLDEN", "TUNING"])
def test_no_graph_within_the_graph_is_handed_a_list_of_artifacts(package: str) -> None:
    def lists(package: str) -> set[str]:
        spec = next(iter(yaml.safe_load_all(package)))
        return {
            f"{name}: {key}"
            for name, component in spec["components"].items()
            if "dag" in component
            for key, one in component.get("inputDefinitions", {}).get("artifacts", {}).items()
            if one.get("isArtifactList")
        }

    assert not lists(globals()[package])
    assert lists(compiled(of_the_old_shape))


def test_no_graph_within_the_graph_is_handed_an_artifact_under_two_names() -> None:
    graphs = Graphs(next(iter(yaml.safe_load_all(GOLDEN))))
    for name in graphs.content.keys() - {"root"}:
        given = graphs.tasks[name].get("inputs", {}).get("artifacts", {})
        origins = [graphs.origin(name, source, "Artifact") for source in given.values()]
        assert len(set(origins)) == len(origins), name


def test_values_arrive_as_the_types_that_a_task_declares_or_not_at_all(tmp_path: Path) -> None:
    run = Server(tmp_path, stub).start(GOLDEN, VERSION | {"accelerator_count": 4})
    assert {one.parameters["accelerators"] for one in run.of("distill")} == {"4"}
    cohorts = [{"cohort": "7", "plan": "{}"}, {"cohort": 7, "plan": "{}"}]
    run = Server(tmp_path, stub).start(GOLDEN, VERSION | {"cohorts": cohorts})
    assert [one.parameters["cohort"] for one in run.of("distill")] == ["7", "7"], "text, whatever it was"


def test_one_changed_experiment_runs_only_the_cohorts_that_have_it_again(tmp_path: Path) -> None:
    params = read_yaml(GOLDEN_PARAMS)
    server = Server(tmp_path, stub)

    def states(**changes: Any) -> dict[str, str]:
        from pipelines.__main__ import arguments

        given = arguments({**params, **changes}, size=1)
        run = server.start(GOLDEN, VERSION | given | {"accelerator_count": "1"})
        assert run.state == "SUCCEEDED", run.failed
        return {one.parameters["cohort"]: one.state for one in run.of("distill")} | {
            name: run.of(name)[0].state for name in ("prepare", "train-teacher", "compare")
        }

    assert set(states().values()) == {"COMPLETE"}
    others = dict.fromkeys(("prepare", "train-teacher", "none-s0", "none-s1"), "CACHED")
    kd = params["experiments"]["kd"] | {"methods": [{"name": "kd", "weight": 0.5}]}
    again = dict.fromkeys(("kd-s0", "kd-s1", "compare"), "COMPLETE")
    assert states(experiments=params["experiments"] | {"kd": kd}) == others | again
    new = params["experiments"] | {"first": params["experiments"]["none"]}
    added = dict.fromkeys(("first-s0", "first-s1", "compare"), "COMPLETE")
    assert states(experiments=new, run=["first", *params["run"]]) == added | others | dict.fromkeys(
        ("kd-s0", "kd-s1"), "CACHED"
    )


@pytest.mark.parametrize("version", ["2.14.0", "2.16.1", "2.17.0"])
def test_what_a_server_tells_the_end_of_a_run_that_is_fine(version: str, tmp_path: Path) -> None:
    server = Server(tmp_path, stub, version)
    first, again = server.start(GOLDEN, VERSION), server.start(GOLDEN, VERSION)
    assert first.state == again.state == "SUCCEEDED"
    assert {one.state for one in again.of("distill") + again.of("evaluate")} == {"CACHED"}
    assert [told(first), told(again)] == (["COMPLETE", "RUNNING"] if version == "2.17.0" else ["RUNNING", "RUNNING"])


def test_what_a_server_tells_the_end_of_a_run_that_is_not_fine(tmp_path: Path) -> None:
    for execute, state in (
        (failing("validate"), "FAILED"),
        (failing("distill", "kd-s0"), "FAILED"),
        (failing("distill", "kd-s0", PodLost), "RUNNING"),
        (failing("register", error=PodLost), "RUNNING"),
    ):
        run = Server(tmp_path, execute).start(GOLDEN, VERSION)
        assert (run.state, told(run)) == ("FAILED", state)
        assert bool(run.of("register")) == ("register" in run.failed)


@pytest.mark.parametrize(
    ("version", "task", "state"),
    [
        ("2.17.0", "prepare", "COMPLETE"),
        ("2.17.0", "distill", "COMPLETE"),
        ("2.16.1", "distill", "RUNNING"),
        ("2.16.1", "prepare", "FAILED"),  # a mistake of that server which nothing in a task can see through
    ],
)
def test_what_a_server_tells_the_end_of_a_run_in_which_one_attempt_failed(
    version: str, task: str, state: str, tmp_path: Path
) -> None:
    run = Server(tmp_path, failing(task, times=1), version).start(GOLDEN, VERSION)
    assert (run.state, told(run)) == ("SUCCEEDED", state)


def test_arguments_beyond_what_a_process_takes_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(TaskFailed, match="--runtime_config: argument list too long"):
        Server(tmp_path, stub).start(GOLDEN, VERSION | {"compare_params": 128 * 1024 * "x"})


def test_as_many_jobs_as_may_be_submitted_can_be_handed_over(tmp_path: Path) -> None:
    from pipelines.__main__ import arguments
    from pipelines.limits import check_matrix

    params = read_yaml(GOLDEN_PARAMS)

    def given(seeds: int) -> dict[str, Any]:
        return arguments({**params, "run": ["kd"], "seeds": list(range(seeds))}, size=1)

    with pytest.raises(UserError, match="100 jobs are more than") as refused:
        check_matrix(given(100))
    number = int(re.findall("in cohorts as these ([0-9]+) would fit", str(refused.value))[0])
    check_matrix(given(number))
    run = Server(tmp_path, stub).start(GOLDEN, VERSION | given(number))
    assert run.state == "SUCCEEDED", run.failed
    assert len(run.of("compare")[0].artifacts["students"]) == number
    cohorts = [{**cohort, "plan": "{}"} for cohort in given(300)["cohorts"]]
    beyond = Server(tmp_path, stub).start(GOLDEN, VERSION | {"cohorts": cohorts})
    assert "argument list too long" in beyond.failed["compare"]


# The shape that it had before, for which the rules of the servers are no less true


def compiled(make: Callable[[], Any]) -> str:
    from kfp import compiler

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(make(), str(file))
        return file.read_text()


def of_the_old_shape() -> Any:
    """The loop in a pipeline of its own, and what reads its list behind a condition."""
    from kfp import dsl

    @dsl.component(base_image="python")
    def train(job: str, model: dsl.Output[dsl.Model]) -> None: ...

    @dsl.component(base_image="python")
    def judge(models: dsl.Input[list[dsl.Model]]) -> bool:  # type: ignore[empty-body]
        ...

    @dsl.component(base_image="python")
    def enrol(models: dsl.Input[list[dsl.Model]]) -> None: ...

    @dsl.component(base_image="python")
    def finish(status: dsl.PipelineTaskFinalStatus) -> None: ...

    @dsl.pipeline(name="matrix")
    def matrix(jobs: list[str]) -> list[dsl.Model]:
        with dsl.ParallelFor(jobs) as job:
            trained = train(job=job)
        return dsl.Collected(trained.outputs["model"])

    @dsl.pipeline(name="old")
    def old(jobs: list[str] = ["a", "b"]) -> None:  # noqa: B006  kfp reads it when it compiles
        with dsl.ExitHandler(finish()):
            trained = matrix(jobs=jobs)
            judged = judge(models=trained.output)
            with dsl.If(judged.output == True):  # noqa: E712  a condition of KFP's
                enrol(models=trained.output)

    return old


@pytest.mark.parametrize("passed", [True, False])
def test_in_the_old_shape_one_student_reached_register_and_a_gate_never_ended(passed: bool, tmp_path: Path) -> None:
    def execute(task: str, container: Any, executor_input: dict[str, Any]) -> None:
        if task == "judge":
            file = Path(executor_input["outputs"]["outputFile"])
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps({"parameterValues": {"Output": passed}}))

    run = Server(tmp_path, execute).start(compiled(of_the_old_shape), {})
    assert run.state == "SUCCEEDED" and len(run.of("train")) == 2
    (judge,) = run.of("judge")
    assert len(judge.artifacts["models"]) == 2
    assert [len(one.artifacts["models"]) for one in run.of("enrol")] == ([1] if passed else [])
    assert told(run) == ("COMPLETE" if passed else "RUNNING")


# The real tasks


@pytest.mark.slow
def test_the_compiled_pipeline_runs_from_fetch_to_register_and_registers_nothing_below_the_gate(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    from pipelines.__main__ import arguments, compile_to

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEGDISTILL_TRACKER", "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    params = {**tiny(read_yaml(PARAMS)), "seeds": [0, 1]}
    compile_to(tmp_path / "pipeline.yaml", params)
    package = (tmp_path / "pipeline.yaml").read_text()
    repository = commit_data(tmp_path / "repository", tiny_data)
    server = Server(tmp_path / "artifacts-of-kfp", run_source)

    def run(name: str, **changes: Any) -> Run:
        monkeypatch.setenv("SEGDISTILL_PIPELINE_RUN", name)
        given = arguments({**params, "compare": {**params["compare"], **changes}})
        del given["cohorts"]  # the compiled ones
        given |= {"repository": str(repository), "revision": "HEAD", "accelerator_count": "0"}  # no GPU is needed
        return server.start(package, given, name)

    def registration(one: Run) -> dict[str, Any]:
        (register,) = one.of("register")
        folder = Path(register.output_artifacts["registration"]["uri"])
        summary = Path(register.output_artifacts["summary"]["uri"]).read_text()
        return {**json.loads((folder / "registration.json").read_text()), "summary": summary}

    above, below = run("above", min_test_miou=0), run("below", min_test_miou=100)
    assert (above.state, below.state) == ("SUCCEEDED", "SUCCEEDED"), (above.failed, below.failed)
    assert (told(above), told(below)) == ("COMPLETE", "RUNNING")
    (compare,) = above.of("compare")
    results = json.loads((Path(compare.output_artifacts["report"]["uri"]) / "results.json").read_text())
    assert [(row["experiment"], [one["seed"] for one in row["seeds"]]) for row in results["rows"]] == [
        ("none", [0, 1]), ("kd", [0, 1])
    ]  # fmt: skip
    found = registration(above)
    assert (found["version"], found["alias"]) == (1, "champion") and found["summary"].startswith("Registered: ")
    found = registration(below)
    assert (found["version"], found["reason"]) == (None, "no student passed the gate (compare.min_test_miou)")
    assert found["summary"] == "Not registered: no student passed the gate (compare.min_test_miou)"
    client = mlflow.MlflowClient()
    assert len(client.search_model_versions("name = 'segdistill-student'")) == 1
    experiment = client.get_experiment_by_name("segdistill").experiment_id
    runs = client.search_runs([experiment], "tags.`segdistill.role` = 'parent'")
    assert {one.info.run_name: one.info.status for one in runs} == {"above": "FINISHED", "below": "FINISHED"}


@pytest.mark.parametrize(
    ("state", "left", "status"),
    [
        ("COMPLETE", "RUNNING", "FINISHED"),
        ("CACHED", "RUNNING", "FINISHED"),
        ("SUCCEEDED", "RUNNING", "FINISHED"),  # KFP's local runner
        ("FAILED", "FINISHED", "FAILED"),
        ("CANCELED", "RUNNING", "KILLED"),
        ("RUNNING", "FINISHED", "FINISHED"),
        ("RUNNING", "KILLED", "KILLED"),
        ("RUNNING", "FAILED", "FAILED"),
        ("RUNNING", "RUNNING", "FAILED"),  # the pod of a stage was lost
        ("RUNNING", "FAILED FINISHED", "FINISHED"),  # an attempt failed, and the next one went well
        ("UNKNOWN", "FINISHED", "FINISHED"),
    ],
)
def test_the_run_in_mlflow_ends_as_the_server_says_or_if_it_does_not_as_the_last_stage_left_it(
    state: str, left: str, status: str, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segdistill.adapters.mlflow_store import ensure_parent, finish_parent
    from segdistill.kubeflow.tasks import run_finish

    name = f"{state}-{left}"
    monkeypatch.setenv("SEGDISTILL_PIPELINE_RUN", name)
    for status_of_a_stage in left.replace("RUNNING", "").split():
        finish_parent(store, name, status_of_a_stage)
    run_finish(state)
    assert ensure_parent(store.client(), store, name, {}).info.status == status


@pytest.fixture
def store(database: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from segdistill.adapters.mlflow_store import default_store

    monkeypatch.setenv("SEGDISTILL_TRACKER", "mlflow")
    (tmp_path / "mlflow.db").write_bytes(database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return default_store(tmp_path)
