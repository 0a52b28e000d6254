"""Runs in a real SQLite store: what arrives, what survives the store's absence, and what must never be sent."""

import json
import logging
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from segdistill.adapters.mlflow_names import metric_name
from segdistill.adapters.mlflow_spool import Spool
from segdistill.adapters.mlflow_store import DatasetFacts, Store, default_store, finish_parent, import_mlflow
from segdistill.adapters.mlflow_tracking import MlflowTracker, Settings, open_pipeline_run, sync
from segdistill.errors import UserError

pytest.importorskip("mlflow")
MD5 = "0123456789abcdef0123456789abcdef"
PIPELINE = "run-1"


@pytest.fixture
def root(tmp_path: Path, database: bytes) -> Path:
    (tmp_path / "mlflow.db").write_bytes(database)
    return tmp_path


def tracker(root: Path, name: str = "kd-s0", uri: str | None = None, **options) -> MlflowTracker:
    given = {"store": default_store(root, uri), "spool": root / "spool", "pipeline_run": PIPELINE}
    return MlflowTracker(name, Settings(**{**given, **options}))


def runs(root: Path) -> dict[str, list]:
    """All runs by name."""
    client = default_store(root).client()
    found: dict[str, list] = {}
    experiment = client.get_experiment_by_name("segdistill")
    for run in client.search_runs([experiment.experiment_id] if experiment else []):
        found.setdefault(run.info.run_name, []).append(run)
    return found


def history(root: Path, run, key: str) -> list[tuple[int, float]]:
    points = default_store(root).client().get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def artifacts(root: Path, run, folder: str) -> list[str]:
    return sorted(item.path for item in default_store(root).client().list_artifacts(run.info.run_id, folder))


def test_all_that_is_logged_arrives_below_one_parent_with_the_dataset(root: Path) -> None:
    base = tracker(
        root, "distill", tags={"data_md5": MD5, "git_commit": "abc"},
        dataset=DatasetFacts("data", MD5, "data", {"train": 7}),
    )  # fmt: skip
    (root / "pictures").mkdir()
    (root / "pictures" / "a.png").write_bytes(b"a")
    (root / "matrix.csv").write_text("1,2")
    for name in ("dml.cnn-s0", "dml.vit-s0"):
        child = base.child(name)
        child.params({"distill.lr": 0.1, "distill.layers": [1, 2], "distill.flag": True, "distill.none": None})
        child.tags({"student": name})
        for step in range(1200):  # more than MLflow takes in one request
            child.metrics({"train/loss/total": 1 / (step + 1)}, step)
        child.metrics({"val/iou/road (wide)": 0.5})
        child.artifact(root / "pictures", "overlays")
        child.artifact(root / "matrix.csv")
    base.close()

    found = runs(root)
    assert sorted(found) == ["dml.cnn-s0", "dml.vit-s0", PIPELINE]
    (parent,), (run,) = found[PIPELINE], found["dml.vit-s0"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (run.data.tags["data_md5"], run.data.tags["student"]) == (MD5, "dml.vit-s0")
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    assert run.data.params == {
        "distill.lr": "0.1", "distill.layers": "[1, 2]", "distill.flag": "true", "distill.none": "null"
    }  # fmt: skip
    assert history(root, run, "train/loss/total") == [(step, 1 / (step + 1)) for step in range(1200)]
    assert run.data.metrics[metric_name("val/iou/road (wide)")] == 0.5
    assert artifacts(root, run, "overlays") == ["overlays/a.png"]
    assert "matrix.csv" in artifacts(root, run, "")
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.digest, json.loads(dataset.profile)) == (MD5, {"train": 7})
    assert parent.inputs.dataset_inputs[0].dataset.digest == MD5, "the list of runs shows the parent first"
    assert parent.data.tags["mlflow.source.name"] == "segdistill"
    assert not list((root / "spool").rglob("*.files/*")), "copies of sent artifacts are removed"


def test_a_run_without_records_does_not_exist(root: Path) -> None:
    tracker(root).close()
    assert runs(root) == {}
    assert not (root / "spool").exists()


def test_a_later_process_goes_on_in_the_run_of_the_same_name(root: Path) -> None:
    first = tracker(root, tags={"stage": "distill"})
    first.metrics({"val/miou": 0.4}, 10)
    first.close()
    # Another machine: the same pipeline run and name, but another spool.
    second = tracker(root, tags={"stage": "evaluate", "reviewer": "b"}, spool=root / "elsewhere")
    second.metrics({"test/miou": 0.3})
    second.close()
    (run,) = runs(root)["kd-s0"]
    assert run.data.metrics == {"val/miou": 0.4, "test/miou": 0.3}
    assert (run.info.status, run.data.tags["stage"], run.data.tags["reviewer"]) == ("FINISHED", "distill", "b")
    assert len(runs(root)[PIPELINE]) == 1


def test_what_is_added_to_a_training_that_ended_leaves_its_end_where_it_was(root: Path) -> None:
    training = tracker(root, "distill", tags={"stage": "distill"})
    training.child("kd-s0").metrics({"val/miou": 0.4}, 10)
    training.close()
    (ended,) = runs(root)["kd-s0"]
    evaluation = tracker(root, "evaluate", tags={"stage": "evaluate"}, spool=root / "of-another-pod")
    added = evaluation.child("kd-s0", ended=True)
    added.metrics({"test/miou": 0.5})
    lonely = evaluation.child("cwd-s0", ended=True)  # its training was of another pipeline run
    lonely.metrics({"test/miou": 0.3})
    evaluation.close()
    (run,), (other,) = runs(root)["kd-s0"], runs(root)["cwd-s0"]
    assert run.data.metrics == {"val/miou": 0.4, "test/miou": 0.5}
    assert (run.info.status, run.info.end_time) == ("FINISHED", ended.info.end_time)
    assert run.data.tags["stage"] == "distill"
    assert other.info.status == "FINISHED"


def test_a_training_that_waits_in_the_spool_begins_and_ends_when_it_did(root: Path) -> None:
    away = {"uri": "http://127.0.0.1:9", "flush_seconds": 0.0}
    training = tracker(root, "kd-s0", **away)
    training.metrics({"val/miou": 0.4}, 10)
    training.close()
    records = (root / "spool" / PIPELINE / "kd-s0.jsonl").read_text().splitlines()
    began, ended = (json.loads(records[number])["time"] for number in (0, -1))
    evaluation = tracker(root, "evaluate", **away).child("kd-s0", ended=True)
    evaluation.metrics({"test/miou": 0.5})
    evaluation.close()
    sync(root / "spool", default_store(root).uri)
    (run,) = runs(root)["kd-s0"]
    assert run.data.metrics == {"val/miou": 0.4, "test/miou": 0.5}
    assert (run.info.status, run.info.end_time) == ("FINISHED", round(1000 * ended))
    assert run.info.start_time == round(1000 * began)  # and not when it was sent, which is after its end


def test_the_pipeline_run_is_described_and_goes_on_when_the_stage_is_closed(root: Path) -> None:
    stage = tracker(root, "compare")
    pipeline = stage.parent()
    pipeline.describe("| experiment | test mIoU |")
    pipeline.metrics({"test/miou": 0.5})
    pipeline.params({"seeds": "0, 1"})
    stage.close()
    (run,) = runs(root)[PIPELINE]
    assert run.data.tags["mlflow.note.content"] == "| experiment | test mIoU |"
    assert (run.data.metrics, run.data.params) == ({"test/miou": 0.5}, {"seeds": "0, 1"})
    assert run.info.status == "RUNNING" and run.data.tags["segdistill.role"] == "parent"
    stage.finish_pipeline("FINISHED")
    assert [run.info.status for run in runs(root)[PIPELINE]] == ["FINISHED"]


def _first_contact(root: Path, number: int) -> None:
    default_store(root).client()  # not hidden by the tracker's patience
    one = tracker(root, f"kd-s{number}")
    one.metrics({"val/miou": number / 10}, 1)
    one.close()
    os._exit(0 if one._spool is not None and one._spool.unsent() == 0 else 1)


def test_six_processes_may_meet_a_fresh_store_at_once(tmp_path: Path) -> None:
    import_mlflow()  # forked with the modules, but without a connection to this store
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_first_contact, args=(tmp_path, number)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 6
    found = runs(tmp_path)
    assert sorted(found) == [*(f"kd-s{number}" for number in range(6)), PIPELINE]
    assert all(len(group) == 1 for group in found.values())
    parent = found[PIPELINE][0].info.run_id
    assert {found[f"kd-s{number}"][0].data.tags["mlflow.parentRunId"] for number in range(6)} == {parent}


def _closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_what_a_missing_server_did_not_take_is_sent_by_sync_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = tracker(root, uri=_closed_port(), flush_seconds=2)
    picture = root / "picture.png"
    picture.write_bytes(b"pixels")
    started = time.monotonic()
    for step in range(2000):
        one.metrics({"train/loss/total": 0.5 + step}, step)
    one.artifact(picture, "overlays")
    picture.unlink()
    assert time.monotonic() - started < 2, "logging waits for nobody"
    with caplog.at_level(logging.WARNING):
        started = time.monotonic()
        one.close()
    assert time.monotonic() - started < 6, "the wait at the end is bounded"
    assert f"segdistill sync {root / 'spool'}" in caplog.text
    assert str(root / "spool" / PIPELINE / "kd-s0.jsonl") in caplog.text

    (away,) = sync(root / "spool")
    assert (away.sent, away.left) == (0, 2002)
    assert away.error
    (done,) = sync(root / "spool", uri=default_store(root).uri)
    assert (done.sent, done.left, done.error) == (2002, 0, None)
    (again,) = sync(root / "spool", uri=default_store(root).uri)
    assert again.sent == 0
    (run,) = runs(root)["kd-s0"]
    assert len(history(root, run, "train/loss/total")) == 2000
    assert (artifacts(root, run, "overlays"), run.info.status) == (["overlays/picture.png"], "FINISHED")


def test_a_store_that_comes_back_in_the_midst_of_a_run_misses_nothing(tmp_path: Path, database: bytes) -> None:
    place = tmp_path / "volume"
    place.write_text("a file where the store's folder belongs: every contact fails")
    settings = Settings(Store(f"sqlite:///{place}/mlflow.db"), tmp_path / "spool", PIPELINE, interval=0.05)
    one = MlflowTracker("kd-s0", settings)
    for step in range(50):
        one.metrics({"a": step}, step)
    time.sleep(0.5)
    assert one.run_id is None
    place.unlink()
    place.mkdir()
    (place / "mlflow.db").write_bytes(database)
    for step in range(50, 100):
        one.metrics({"a": step}, step)
    one.close()
    (run,) = runs(place)["kd-s0"]
    assert history(place, run, "a") == [(step, float(step)) for step in range(100)]


def test_sending_again_what_was_sent_but_not_noted_changes_nothing(root: Path) -> None:
    one = tracker(root)
    one.params({"lr": 0.1})
    one.metrics({"a": 1.0, "b": float("nan")}, 3)
    one.close()
    (root / "spool" / PIPELINE / "kd-s0.position.json").unlink()
    (result,) = sync(root / "spool")
    assert result.error is None
    (run,) = runs(root)["kd-s0"]
    assert (len(history(root, run, "a")), len(history(root, run, "b"))) == (1, 1)
    assert run.info.status == "FINISHED"


def _log_and_die(root: Path, first: int, last: int) -> None:
    one = tracker(root)
    for step in range(first, last):
        one.metrics({"train/loss/total": 1 / (step + 1)}, step)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_and_resumed_job_keeps_one_run_with_every_point_once(root: Path) -> None:
    import_mlflow()
    fork = multiprocessing.get_context("fork")
    # The second attempt starts at an earlier checkpoint, so it repeats some steps exactly.
    for first, last in ((0, 300), (250, 500)):
        worker = fork.Process(target=_log_and_die, args=(root, first, last))
        worker.start()
        worker.join(60)
        assert worker.exitcode == -signal.SIGKILL
    with (root / "spool" / PIPELINE / "kd-s0.jsonl").open("a") as file:
        file.write('{"time": 1, "kind": "metr')  # the kill met the write of a line
    one = tracker(root)
    for step in range(450, 600):
        one.metrics({"train/loss/total": 1 / (step + 1)}, step)
    one.close()
    (run,) = runs(root)["kd-s0"]
    assert history(root, run, "train/loss/total") == [(step, 1 / (step + 1)) for step in range(600)]
    assert run.info.status == "FINISHED"


def test_sync_leaves_a_spool_to_the_process_that_writes_it(root: Path) -> None:
    one = tracker(root)
    one.params({"a": 1})
    (result,) = sync(root / "spool")
    assert result.error == "its process still runs"
    one.close()


def test_what_mlflow_refuses_for_good_is_kept_aside_and_the_rest_arrives(root: Path) -> None:
    one = tracker(root)
    one.params({"lr": 0.1, "steps": 5})
    one.close()
    two = tracker(root)
    two.params({"lr": 0.2, "decay": 0.3})  # MLflow never changes a parameter
    two.metrics({"val/miou": 0.5})
    two.close()
    (run,) = runs(root)["kd-s0"]
    assert run.data.params == {"lr": "0.1", "steps": "5", "decay": "0.3"}
    assert run.data.metrics == {"val/miou": 0.5}
    refused = (root / "spool" / PIPELINE / "kd-s0.refused.jsonl").read_text()
    assert refused.count("\n") == 1
    assert "0.2" in refused


def test_an_error_in_one_stage_ends_its_children_as_failed(root: Path) -> None:
    base = tracker(root, "distill")
    base.child("kd-s1").metrics({"a": 1})
    base.close("FAILED")
    assert runs(root)["kd-s1"][0].info.status == "FAILED"


def test_finishing_a_failed_pipeline_marks_its_lost_children_as_killed(root: Path) -> None:
    import_mlflow()
    worker = multiprocessing.get_context("fork").Process(target=_log_and_die, args=(root, 0, 1))
    worker.start()
    worker.join(60)
    sync(root / "spool")
    assert runs(root)["kd-s0"][0].info.status == "RUNNING"
    assert finish_parent(default_store(root), PIPELINE, "FAILED")
    found = runs(root)
    assert (found[PIPELINE][0].info.status, found["kd-s0"][0].info.status) == ("FAILED", "KILLED")


def test_where_kfp_makes_the_parent_our_runs_hang_below_it_and_nothing_is_made_twice(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KFP 2.17 makes one run for the pipeline, and one for each task, below that of the loop that the task is in."""
    client = default_store(root).client()
    experiment = client.create_experiment("KFP-Default")

    def made(name: str, parent: Any = None) -> Any:
        return client.create_run(
            experiment, run_name=name, tags={"mlflow.parentRunId": parent.info.run_id} if parent else {}
        )

    top = made("segdistill 2026-11-27")
    loop = made("for-loop-1", top)
    teaching, distilling = made("train-teacher", top), made("distill", loop)
    monkeypatch.setenv("SEGDISTILL_MLFLOW", "injected")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    for task, name in ((teaching, "teacher-s0"), (distilling, "kd-s0")):
        monkeypatch.setenv("MLFLOW_RUN_ID", task.info.run_id)
        one = tracker(root, name, tags={"git_commit": "abc"})
        one.metrics({"loss": 1})
        one.close("FINISHED")
    lost = tracker(root, "cwd-s0", flush_seconds=0.0)

    def away(self: Any) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr("segdistill.adapters.mlflow_spool.Sender.send", away)
    lost.metrics({"loss": 2})
    lost.close("FINISHED")
    monkeypatch.undo()
    sync(root / "spool", uri=f"sqlite:///{root}/mlflow.db")  # later, from another machine
    assert client.get_experiment_by_name("segdistill") is None
    found = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert len(found) == 7
    for name in ("teacher-s0", "kd-s0", "cwd-s0"):
        assert found[name].data.tags["mlflow.parentRunId"] == top.info.run_id
    assert found[top.info.run_name].data.tags["git_commit"] == "abc"
    monkeypatch.setenv("SEGDISTILL_MLFLOW", "injected")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.setenv("MLFLOW_RUN_ID", made("finish", top).info.run_id)
    assert finish_parent(default_store(root), PIPELINE, "FINISHED")
    assert client.get_run(top.info.run_id).info.status == "FINISHED"


def test_no_secret_reaches_a_file_or_the_store(root: Path) -> None:
    tags = {"stage": "kd-s0", "data_url": "https://user:hush-1@host/data"}
    one = open_pipeline_run(PIPELINE, tags, data=root / "data", root=root, spool=root / "spool")
    one.params({"remote.secret_access_key": "hush-2", "remote.url": "https://me:hush-3@host/x", "tokens": "four"})
    one.params({"note": "from https://me:hush@host/x today", "passwords": ["hush"], "command": "run --password=hush"})
    one.params({"commands": [["run", "--token", "hush"]], "nested": {"api_key": "hush"}})
    one.tags({"password": "hush-4"})
    one.close()
    for path in root.rglob("*"):
        assert path.is_dir() or b"hush" not in path.read_bytes(), path
    assert runs(root)["kd-s0"][0].data.params["tokens"] == "four"
    spool = Spool.create(root / "spool", "x", "y", Store("http://user:hush-5@127.0.0.1:1"), {}, None)
    assert "hush" not in spool.meta.read_text()
    spool.release()


def test_the_password_of_a_server_is_said_by_nobody(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "before")  # brought back afterwards
    address = _closed_port()
    given = address.replace("http://", "http://user:hu%2Fsh@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    one = tracker(root, flush_seconds=1)
    one.metrics({"a": 1}, 1)
    one.close()
    assert not finish_parent(default_store(root), PIPELINE, "FAILED", seconds=0.1)
    (away,) = sync(root / "spool")
    assert away.error and address in away.error
    for uri in (given, "postgresql+psycopg2://user:hush@127.0.0.1:9/db"):  # what MLflow itself would say of it
        logging.getLogger("mlflow.store").warning("cannot reach %s", uri)
    said = caplog.text + str(away) + "".join(capfd.readouterr())
    assert address in said
    assert "hush" not in said and "hu%2Fsh" not in said and "hu/sh" not in said
    assert os.environ["MLFLOW_TRACKING_URI"] == address, "the password goes apart, as MLflow takes it"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("user", "hu/sh")
    with pytest.raises(UserError, match="half of a user and password"):
        default_store(root, "http://hush@host")


def test_classes_whose_names_differ_in_special_characters_keep_a_metric_each(root: Path) -> None:
    names = ["tree (<1m)", "tree (>1m)", "tree __1m_", "a/b", "a_b", "a//b", ".", "été", "x" * 300, "x" * 301]
    one = tracker(root)
    one.metrics({f"test/iou/{name}": float(number) for number, name in enumerate(names)})
    one.close()
    (run,) = runs(root)["kd-s0"]
    assert {metric_name(f"test/iou/{name}"): float(number) for number, name in enumerate(names)} == run.data.metrics
    assert sorted(run.data.metrics.values()) == [float(number) for number in range(len(names))]


class _TooLarge:
    status_code = 413


def test_an_artifact_that_the_server_refuses_for_good_is_set_aside_and_told(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import_mlflow()
    import mlflow
    import requests

    def send(client, run_id: str, path: str, folder: str | None = None, real=mlflow.MlflowClient.log_artifact) -> None:
        if Path(path).is_dir() or path.endswith("large.bin"):
            raise requests.HTTPError("413 Client Error: http://user:hush@host", response=_TooLarge())
        real(client, run_id, path, folder)

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", send)
    monkeypatch.setattr(mlflow.MlflowClient, "log_artifacts", send)
    (root / "pictures/deep").mkdir(parents=True)
    for name in ("pictures/large.bin", "pictures/a.png", "pictures/deep/b.png", "large.bin"):
        (root / name).write_bytes(b"x")
    one = tracker(root)
    one.artifact(root / "large.bin")
    one.artifact(root / "pictures", "overlays")
    one.metrics({"a": 1})
    with caplog.at_level(logging.WARNING):
        one.close()
    (run,) = runs(root)["kd-s0"]
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"a": 1.0})
    assert artifacts(root, run, "overlays") == ["overlays/a.png", "overlays/deep"]
    refused = root / "spool" / PIPELINE / "kd-s0.refused.jsonl"
    assert f"refused 2 items for good; what and why: {refused}" in caplog.text
    kept = [json.loads(line)["item"]["path"] for line in refused.read_text().splitlines()]
    assert [Path(path).read_bytes() for path in kept] == [b"x", b"x"]
    assert "hush" not in refused.read_text() + caplog.text
    (done,) = sync(root / "spool")
    assert (done.left, done.error, done.refused) == (0, None, f"2 ({refused})")


def test_what_a_proxy_refuses_as_too_large_is_sent_in_smaller_parts(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_mlflow()
    import mlflow
    from mlflow.exceptions import MlflowException

    def send(client, run_id, metrics=(), params=(), tags=(), real=mlflow.MlflowClient.log_batch, **more) -> None:
        if len(metrics) > 3 or any(metric.key == "huge" for metric in metrics):
            raise MlflowException("API request to endpoint /x failed with error code 413 != 200. Body: ''")
        real(client, run_id, metrics, params, tags, **more)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", send)
    one = tracker(root)
    one.metrics({f"m{number}": 1.0 for number in range(20)} | {"huge": 2.0})
    one.close()
    (run,) = runs(root)["kd-s0"]
    assert run.data.metrics == {f"m{number}": 1.0 for number in range(20)}


FOREIGN = [
    "5", "[1]", "null", "{}", '{"kind": "metrics"}', '{"kind": "metrics", "values": {"a": "b"}, "time": 1}',
    '{"kind": "metrics", "values": [1], "time": 1}', '{"kind": "metrics", "values": {"a": 1}, "time": "now"}',
    '{"kind": "nonsense", "values": {}, "time": 1}', '{"kind": "close", "values": {"status": "DONE"}, "time": 1}',
    '{"kind": "artifact", "values": {"path": "../../keep/me", "folder": ""}, "time": 1}',
    '{"kind": "artifact", "values": {"path": "/", "folder": ""}, "time": 1}', "\x00\xff", "[" * 5000,
]  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [{"position": position} for position in (
        "", "{", "[]", "{}", '{"offset": -5}', '{"offset": 3}', '{"offset": 99999999}', '{"offset": "x"}',
     )]
    + [{"meta": meta} for meta in ("", "[]", "{}", '{"name": "kd-s0"}', '{"name": 5}')]
    + [{"line": FOREIGN}],
    ids=str,
)  # fmt: skip
def test_a_damaged_spool_stops_neither_itself_nor_the_others(
    damage: dict, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "keep").mkdir()
    (root / "keep" / "me").write_text("nobody's artifact")
    for name in ("kd-s0", "kd-s1"):
        one = tracker(root, name, uri=_closed_port(), flush_seconds=0)
        one.metrics({"a": 1.0}, 1)
        one.close()
    spool = root / "spool" / PIPELINE
    for kind, content in damage.items():
        if kind == "line":
            with (spool / "kd-s0.jsonl").open("ab") as file:
                file.write("\n".join(content).encode("latin-1") + b"\n")
                file.write(b'{"kind": "metrics", "values": {"b": 2.0}, "time": 1}\n')
        else:
            (spool / f"kd-s0.{kind}.json").write_text(content)
    broken, whole = sync(root / "spool", uri=default_store(root).uri)
    found = runs(root)
    assert (whole.name, whole.left, whole.error) == ("kd-s1", 0, None)
    assert found["kd-s1"][0].data.metrics == {"a": 1.0}
    if "meta" in damage:
        assert broken.error and "kd-s0.meta.json" in broken.error
        one = tracker(root)  # the run itself goes on beside the damage
        one.metrics({"c": 3.0})
        one.close()
        assert runs(root)["kd-s0"][0].data.metrics == {"c": 3.0}
    else:
        assert (broken.left, broken.error) == (0, None)
        assert found["kd-s0"][0].data.metrics == {"a": 1.0} | ({"b": 2.0} if "line" in damage else {})
    assert (root / "keep" / "me").exists()


def test_the_dataset_facts_of_a_pipeline_run_come_from_the_dvc_file(root: Path) -> None:
    (root / "data.dvc").write_text(f"outs:\n- md5: {MD5}.dir\n  size: 12\n  nfiles: 3\n  path: data\n")
    base = open_pipeline_run(
        PIPELINE, {"data_md5": f"{MD5}.dir", "stage": "distill"}, data=root / "data", root=root, spool=root / "spool"
    )
    child = base.child("kd-s0")
    child.metrics({"a": 1})
    child.close()
    base.close()
    dataset = runs(root)["kd-s0"][0].inputs.dataset_inputs[0].dataset
    assert (dataset.digest, json.loads(dataset.profile)) == (f"{MD5}.dir", {"files": 3, "bytes": 12})


def test_logging_a_number_costs_the_training_thread_well_under_a_millisecond(root: Path) -> None:
    one = tracker(root)
    seconds = []
    for step in range(2000):
        started = time.perf_counter()
        one.metrics({"train/loss/total": 1.0, "train/loss/ce": 0.5, "train/lr": 0.1}, step)
        seconds.append(time.perf_counter() - started)
    one.close()
    assert statistics.median(seconds) < 5e-4


@pytest.mark.parametrize("uri", ["file:///tmp/x", "runs", "./runs", "sqlite:///:memory:"])
def test_a_store_that_mlflow_cannot_keep_runs_in_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI: .*allowed: sqlite"):
        default_store(tmp_path, uri)


def test_names_that_would_break_a_search_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='run name: "it\'s" is not allowed'):
        tracker(tmp_path, "it's")
    with pytest.raises(UserError, match="no such folder"):
        sync(tmp_path / "absent")


def test_importing_the_adapters_neither_imports_mlflow_nor_starts_a_thread() -> None:
    code = (
        "import sys, threading, segdistill.adapters.mlflow_tracking, segdistill.adapters.mlflow_registry;"
        "sys.exit('mlflow' in sys.modules or threading.active_count() > 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_mlflow_the_tracker_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"install segdistill\[pipeline\]"):
        tracker(tmp_path)
