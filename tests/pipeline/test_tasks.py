"""Stages as tasks of Kubeflow Pipelines: marks, the version of the data, a shared volume, several processes."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_params import tiny

from segdistill import files
from segdistill.config import read_yaml, to_dict
from segdistill.errors import UserError
from segdistill.execution import sections
from segdistill.kubeflow import tasks
from segdistill.kubeflow.marks import COMPLETED, ELSEWHERE, write_mark
from segdistill.kubeflow.tasks import run_component
from segdistill.plan import Job, cohort_plan, teacher_plan
from segdistill.stages import BY_NAME

ROOT = Path(__file__).resolve().parents[2]
VERSION = {"data_md5": "0123.dir", "data_commit": "4567"}


@pytest.fixture(autouse=True)
def _as_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder and an environment of its own; run_component sets up logging for a process of its own."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SEGDISTILL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SEGDISTILL_TRACKER", "jsonl")
    monkeypatch.setenv("SEGDISTILL_PIPELINE_RUN", "run-7")
    logger = logging.getLogger("segdistill")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


def mark(folder: Path, stage: str = "fetch", cohort: str | None = None, **more: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_mark(folder, {"stage": stage, "cohort": cohort, **more})


def mistake(capsys: pytest.CaptureFixture[str], name: str, params: Any, paths: Mapping[str, Any]) -> str:
    """The one sentence with which a task ends."""
    with pytest.raises(SystemExit) as ended:
        run_component(name, json.dumps(params), paths=paths)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"segdistill {name}: ") and message.count("\n") == 1
    return message


def chosen(name: str, **changes: Any) -> str:
    params = read_yaml(ROOT / "params.yaml")
    params[name] |= changes
    return json.dumps(sections(BY_NAME[name], params))


# Marks


def test_sections_of_another_stage_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {name: str(tmp_path / name) for name in ("data", "report", "prepared")}
    message = mistake(capsys, "prepare", {"validate": {}}, paths)
    assert message == "segdistill prepare: params of prepare: expected the sections prepare, found validate\n"


def test_the_output_of_a_task_that_did_not_complete_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half").mkdir()
    message = mistake(capsys, "register", {"register": {}, "run": ["none"], "seeds": [0]}, {"students": ["half"]})
    assert "half: register needs it, but the task that makes it did not complete" in message


def prepare(data: Path, out: Path, **accelerators: str) -> None:
    mark(data, **VERSION)
    mark(out / "report", "validate", **VERSION)
    (out / "report/summary.json").write_text('{"success": true, "layout": "folder"}')
    paths = {"data": str(data), "report": str(out / "report"), "prepared": str(out / "prepared")}
    run_component("prepare", chosen("prepare", workers=1), paths=paths, **accelerators)


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def test_the_version_of_the_data_goes_from_mark_to_mark_and_into_the_run(data: Path, tmp_path: Path) -> None:
    prepare(data, tmp_path / "out")
    assert json.loads((tmp_path / "out/prepared" / COMPLETED).read_text()) == {
        "stage": "prepare", "cohort": None, **VERSION
    }  # fmt: skip
    tracked = Path("artifacts/tracking/run-7/prepare.jsonl").read_text().splitlines()
    assert json.loads(tracked[0])["values"]["data_md5"] == VERSION["data_md5"]


# A volume that all tasks see


def test_with_a_volume_the_shards_are_made_once_and_read_there(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEGDISTILL_SHARED", str(tmp_path / "volume"))
    for run in ("one", "two"):
        prepare(data, tmp_path / run)
        assert sorted(path.name for path in (tmp_path / run / "prepared").iterdir()) == [COMPLETED, ELSEWHERE]
    assert "is on the volume already" in capsys.readouterr().err
    (made,) = (tmp_path / "volume").iterdir()
    task = tasks.Task("train_teacher", "{}", {"prepared": str(tmp_path / "two/prepared")})
    assert tasks._places(task).paths["prepared"] == made / "prepared"
    assert (made / "prepared/dataset.json").is_file()
    made.rename(tmp_path / "gone")
    paths = {"prepared": str(tmp_path / "two/prepared"), "teacher": str(tmp_path / "teacher")}
    message = mistake(capsys, "train_teacher", {}, paths)
    assert "no longer on the volume; run the pipeline again with --no-cache" in message


def test_of_two_runs_that_share_their_shards_the_second_waits_and_finds_them_made(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEGDISTILL_SHARED", str(tmp_path / "volume"))
    prepare(data, tmp_path / "one")
    (made,) = (tmp_path / "volume").iterdir()
    unfinished = (made / "prepared").rename(made / "prepared.partial")
    with contextlib.ExitStack() as first:

        def finish(*told: object) -> None:
            unfinished.rename(made / "prepared")
            first.close()

        first.enter_context(files.lock(made / "prepared", "the first", file=made / ".prepared.lock"))
        monkeypatch.setattr(files.logger, "info", finish)
        prepare(data, tmp_path / "two")
    assert "is on the volume already" in capsys.readouterr().err
    assert (tmp_path / "two/prepared" / ELSEWHERE).is_file()


def test_of_two_runs_that_bring_the_same_data_to_a_volume_the_second_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segdistill.adapters import dvc_remote, dvc_version

    version = SimpleNamespace(md5=VERSION["data_md5"], commit=VERSION["data_commit"])
    order: list[str] = []

    def fetch(*given: object) -> SimpleNamespace:
        order.append("fetched")
        return version

    def waits(*told: object) -> None:
        order.append("waits")
        first.close()

    monkeypatch.setenv("SEGDISTILL_SHARED", str(tmp_path / "volume"))
    monkeypatch.setattr(dvc_version, "find", lambda *given: version)
    monkeypatch.setattr(dvc_remote, "fetch", fetch)
    monkeypatch.setattr(files.logger, "info", waits)
    where = tmp_path / "volume/data" / version.md5
    where.mkdir(parents=True)
    with contextlib.ExitStack() as first:
        first.enter_context(files.lock(where, "the first", file=where.with_name(f".{where.name}.lock")))
        tasks.run_fetch("repository", "v1", data=str(tmp_path / "data"))
    assert order == ["waits", "fetched"]


def test_other_parameters_make_other_shards(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGDISTILL_SHARED", str(tmp_path / "volume"))
    prepare(data, tmp_path / "one")
    monkeypatch.setenv("SEGDISTILL_GIT_COMMIT", "other code")
    prepare(data, tmp_path / "two")
    assert len(list((tmp_path / "volume").iterdir())) == 2


# Highlights


class Shown:
    """Stands for KFP's artifacts, whose class this package does not know."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.metrics: dict[str, float] = {}

    def log_metric(self, name: str, value: float) -> None:
        self.metrics[name] = value


def test_validation_shows_its_summary_as_text_and_as_a_page_that_asks_for_nothing(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("great_expectations")
    mark(data, **VERSION)
    page, summary = Shown(tmp_path / "page.html"), Shown(tmp_path / "summary.md")
    paths = {"data": str(data), "report": str(tmp_path / "report")}
    small = {"min_samples": {"train": 1, "val": 1, "test": 1}, "workers": 1}
    run_component("validate", chosen("validate", **small), paths=paths, shown={"page": page, "summary": summary})
    assert Path(summary.path).read_text().startswith("# Validation of")
    html = Path(page.path).read_text()
    assert "The data set is sound" in html and html.count("data:image/jpeg;base64,") == 6
    assert "http" not in html and "<script" not in html


# A cohort, and its next attempt


def distill(prepared: Path, teacher: Path, out: Path, *experiments: str) -> Path:
    params = tiny(read_yaml(ROOT / "params.yaml"))
    jobs = [Job(name, 0) for name in experiments]
    plan = json.dumps(to_dict(cohort_plan(params["distill"], params["experiments"], jobs)))
    paths = {"prepared": str(prepared), "teacher": str(teacher), "students": str(out / "students")}
    run_component("distill", plan=plan, cohort="s0-1", paths=paths)
    return out / "students"


@pytest.fixture
def teacher(tiny_prepared: Path, tmp_path: Path) -> Path:
    run_component("train_teacher", **teacher_task(tiny_prepared, tmp_path, batch_size=2))
    return tmp_path / "teacher"


def test_a_cohort_is_trained_by_its_plan_and_its_mark_names_it(
    tiny_prepared: Path, teacher: Path, tmp_path: Path
) -> None:
    students = distill(tiny_prepared, teacher, tmp_path / "out", "none", "kd")
    assert json.loads((students / COMPLETED).read_text()) == {"stage": "distill", "cohort": "s0-1", **VERSION}
    assert sorted(path.parent.name for path in students.glob("*/metrics.json")) == ["kd", "none"]
    assert Path("artifacts/tracking/run-7/distill-s0-1.jsonl").is_file()


def test_an_attempt_keeps_the_students_that_the_one_before_it_left_on_the_volume(
    tiny_prepared: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGDISTILL_WORK", str(tmp_path / "volume"))
    with monkeypatch.context() as lost:
        lost.setattr(tasks, "bring_back", lambda *given: pytest.exit("the pod is lost"))
        with pytest.raises(pytest.exit.Exception):
            distill(tiny_prepared, teacher, tmp_path / "first", "none")
    (left,) = (tmp_path / "volume/run-7/distill-s0-1").rglob("cnn.safetensors")
    number = left.stat().st_ino
    inodes: list[int] = []
    real = tasks.bring_back

    def bring_back(place: Path, target: Path) -> None:
        inodes.append((place / "none/cnn.safetensors").stat().st_ino)
        real(place, target)

    monkeypatch.setattr(tasks, "bring_back", bring_back)
    students = distill(tiny_prepared, teacher, tmp_path / "second", "none", "kd")
    assert inodes == [number], "it was not trained again"
    assert sorted(path.parent.name for path in students.glob("*/cnn.safetensors")) == ["kd", "none"]
    assert not list((tmp_path / "volume").rglob("*.safetensors"))


# Several processes


def teacher_task(prepared: Path, tmp_path: Path, **train: Any) -> dict[str, Any]:
    mark(prepared, "prepare", **VERSION)
    section = tiny(read_yaml(ROOT / "params.yaml"))["train_teacher"]
    section["train"] |= {"batch_size": 4, "checkpoint_every": 1, **train}
    paths = {"prepared": str(prepared), "teacher": str(tmp_path / "teacher")}
    return {"plan": json.dumps(to_dict(teacher_plan(section))), "paths": paths}


CALL = """
import json, sys
from segdistill.kubeflow.tasks import run_component
run_component(sys.argv[1], **json.loads(sys.argv[2]))
"""


def start(name: str, task: Mapping[str, Any], **environment: str) -> subprocess.Popen[str]:
    surroundings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", CALL, name, json.dumps(task)],
        env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_several_processes_train_and_one_of_them_speaks(tiny_prepared: Path, tmp_path: Path) -> None:
    running = start("train_teacher", teacher_task(tiny_prepared, tmp_path), SEGDISTILL_PROCESSES="2")
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, out + err
    assert json.loads((tmp_path / "teacher" / COMPLETED).read_text())["stage"] == "train_teacher"
    assert json.loads((tmp_path / "teacher/metrics.json").read_text())["iterations"] == 2
    assert len(list(Path("artifacts/tracking/run-7").iterdir())) == 1


@pytest.mark.slow
def test_a_mistake_in_one_of_several_processes_ends_the_task_without_a_traceback(
    tiny_prepared: Path, tmp_path: Path
) -> None:
    task = teacher_task(tiny_prepared, tmp_path, batch_size=3)  # for one process it is none
    running = start("train_teacher", task, SEGDISTILL_PROCESSES="2")
    out, err = running.communicate(timeout=300)
    assert running.returncode == 2, out + err
    assert "segdistill train_teacher: " in err and "times 2 processes" in err and "Traceback" not in out + err
    assert not (tmp_path / "teacher").exists()


@pytest.mark.slow
def test_a_signal_to_the_task_reaches_its_processes_which_save_and_ask_for_a_retry(
    tiny_prepared: Path, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    task = teacher_task(tiny_prepared, tmp_path, iterations=5000, validate_every=5000)
    running = start("train_teacher", task, SEGDISTILL_PROCESSES="2", SEGDISTILL_WORK=str(volume))
    deadline = time.monotonic() + 240
    while not list(volume.rglob("resume.safetensors")):
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 75, out + err
    assert "Traceback" not in out + err
    (checkpoint,) = volume.rglob("resume.safetensors")
    assert checkpoint.relative_to(volume).parts[0] == "run-7"


def test_a_number_of_processes_that_is_none_is_named(
    tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEGDISTILL_PROCESSES", "two")
    task = teacher_task(tiny_prepared, tmp_path)
    message = mistake(capsys, "train_teacher", {}, task["paths"])
    assert "SEGDISTILL_PROCESSES: 'two' is not a number of processes" in message
    for count, sentence in (("two", "accelerators: 'two' is not a number of them"), ("2", "accelerator: missing")):
        with pytest.raises(SystemExit):
            run_component("train_teacher", **task, accelerators=count)
        assert sentence in capsys.readouterr().err


# Accelerators


@pytest.mark.parametrize(("asked", "seen"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("on_node", [False, True], ids=["pod", "node of a TrainJob"])
def test_a_task_whose_accelerators_torch_does_not_see_ends_before_anything_runs(
    on_node: bool, asked: int, seen: int, tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import torch

    from segdistill.engine import device

    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that\nyou have one.")

    monkeypatch.setattr(device, "usable_gpus", lambda: seen)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(tasks, "run_together", lambda *given: pytest.fail("nothing is to run"))
    monkeypatch.setattr(tasks, "_execute", lambda *given: pytest.fail("nothing is to run"))
    task = teacher_task(tiny_prepared, tmp_path)
    with pytest.raises(SystemExit) as ended:
        if on_node:
            file = tmp_path / "task.json"
            file.write_text(
                json.dumps(
                    {
                        "name": "train_teacher",
                        "params": "{}",
                        **task,
                        "accelerator": "nvidia.com/gpu",
                        "accelerators": asked,
                    }
                )
            )
            tasks.main(str(file))
        else:
            run_component("train_teacher", **task, accelerator="nvidia.com/gpu", accelerators=str(asked))
    assert ended.value.code == 2
    reason = " (Found no NVIDIA driver on your system)" if not seen else ""
    assert capsys.readouterr().err == (
        f"segdistill train_teacher: accelerators: {asked} of nvidia.com/gpu were asked for, and torch sees {seen} that "
        f"it can use{reason}; torch {torch.__version__} is built for CUDA 13.0, "
        "which needs NVIDIA's driver R580 or newer\n"
    )


def test_a_task_with_accelerators_runs_on_them_and_one_without_where_it_can(
    tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segdistill.engine import device

    used: list[str] = []
    monkeypatch.setattr(device, "usable_gpus", lambda: 1)
    monkeypatch.setattr(tasks, "run_stage", lambda *given, device, **others: used.append(device))
    monkeypatch.setattr(tasks, "_complete", lambda *given: None)
    monkeypatch.setattr(tasks, "_show", lambda *given: None)
    monkeypatch.setattr(
        tasks, "stage_module", lambda stage: type("M", (), {"highlights": staticmethod(lambda paths: None)})
    )
    task = teacher_task(tiny_prepared, tmp_path)
    run_component("train_teacher", **task, accelerator="nvidia.com/gpu", accelerators="1")
    run_component("train_teacher", **task)
    assert used == ["cuda", "auto"]


# Several nodes


def nodes_template(tmp_path: Path) -> str:
    trainer = {"numNodes": 2, "resourcesPerNode": {"requests": {}, "limits": {}}, "env": []}
    return json.dumps({"volume": str(tmp_path / "volume"), "manifest": {"metadata": {}, "spec": {"trainer": trainer}}})


def variables(job: Any) -> dict[str, str]:
    return {one["name"]: one["value"] for one in job["spec"]["trainer"]["env"]}


def test_the_nodes_are_told_the_plan_and_the_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from segdistill.kubeflow import trainjob

    told: list[Any] = []

    def made(job: Any) -> None:
        told.append((job["metadata"]["name"], json.loads(Path(job["spec"]["trainer"]["args"][0]).read_text())))
        raise UserError("enough")

    monkeypatch.setattr(trainjob, "run", made)
    monkeypatch.setenv("SEGDISTILL_TRAINJOB", nodes_template(tmp_path))
    paths = {name: str(tmp_path / name) for name in ("prepared", "teacher", "students")}
    for name in ("prepared", "teacher"):
        mark(tmp_path / name, **VERSION)
    for plan in ("one", "other"):
        with pytest.raises(SystemExit):
            run_component("distill", plan=plan, cohort="s1-0", paths=paths)
    (name, task), (other, _) = told
    assert (task["plan"], task["cohort"], set(task["paths"])) == ("one", "s1-0", set(paths))
    assert name.startswith("segdistill-distill-s1-0-") and other != name, "another plan is another job"


def test_the_pods_of_a_job_are_told_which_run_kfp_made_in_mlflow(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segdistill.kubeflow import trainjob

    told: list[dict[str, str]] = []

    def made(job: Any) -> None:
        told.append(variables(job))
        raise UserError("enough")

    monkeypatch.setattr(trainjob, "run", made)
    monkeypatch.setenv("SEGDISTILL_TRAINJOB", nodes_template(tmp_path))
    given = {
        "SEGDISTILL_MLFLOW": "injected", "MLFLOW_RUN_ID": "a1", "MLFLOW_EXPERIMENT_ID": "7",
        "MLFLOW_TRACKING_URI": "https://mlflow", "MLFLOW_TRACKING_AUTH": "kubernetes",
    }  # fmt: skip
    for name, value in {**given, "MLFLOW_TRACKING_TOKEN": "hush"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        prepare(data, tmp_path / "out")
    assert told == [{**given, "SEGDISTILL_PIPELINE_RUN": "run-7"}]


def test_on_several_nodes_the_stage_runs_on_the_volume_and_its_outputs_come_back(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes is left out: the job's command runs here, as one of its processes would."""
    from segdistill.kubeflow import trainjob

    commands: list[list[str]] = []

    def run_here(job: Any) -> None:
        trainer = job["spec"]["trainer"]
        commands.append([*trainer["command"], *trainer["args"]])
        assert variables(job)["SEGDISTILL_PIPELINE_RUN"] == "run-7" and trainer["numProcPerNode"] == 4
        assert trainer["resourcesPerNode"] == {key: {"nvidia.com/gpu": "4"} for key in ("requests", "limits")}
        with monkeypatch.context() as inside:
            inside.delenv("SEGDISTILL_TRAINJOB")
            tasks.main(trainer["args"][0])

    monkeypatch.setattr(trainjob, "run", run_here)
    monkeypatch.setenv("SEGDISTILL_TRAINJOB", nodes_template(tmp_path))
    prepare(data, tmp_path / "out", accelerator="nvidia.com/gpu", accelerators="4")  # this stage is quick
    assert commands[0][:5] == ["python", "-m", "torch.distributed.run", "-m", "segdistill.kubeflow.tasks"]
    assert json.loads((tmp_path / "out/prepared" / COMPLETED).read_text())["stage"] == "prepare"
    assert (tmp_path / "out/prepared/dataset.json").is_file()
    # An attempt that is lost after the job's end leaves its outputs on the volume, and the next one takes them.
    (job,) = (tmp_path / "volume/outputs").iterdir()
    task = json.loads((job / "task.json").read_text())
    (tmp_path / "out/prepared").rename(task["paths"]["prepared"])
    prepare(data, tmp_path / "out")
    assert len(commands) == 1 and (tmp_path / "out/prepared/dataset.json").is_file()
