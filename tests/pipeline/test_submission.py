"""``python -m pipelines submit``, by KFP's own client, against a small server that stands for its API."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from compiled import Graphs
from stand_in import Request, serving

pytest.importorskip("kfp")
MD5 = "0123456789abcdef0123456789abcdef.dir"
GOLDEN = Path(__file__).parent / "golden"
TOKEN = "not-for-anyones-eyes"


class Api:
    """The four calls that a submission makes; every request is kept."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.states: list[Any] = []  # the answers when asked for the run; the last one stays
        self.refuse: int | None = None
        self.health: Any = {"multi_user": False, "tag_name": "2.17.0"}
        self.host = ""

    def answer(self, request: Request) -> tuple[int, Any]:
        self.requests.append(request)
        return self.reply(request.method, request.path)

    def reply(self, method: str, path: str) -> tuple[int, Any]:
        if self.refuse:
            return self.refuse, {"error": "you may not,\n not here"}
        if path.endswith("/healthz"):
            return 200, self.health
        if path.endswith("/experiments"):
            made = {"experiment_id": "e1", "display_name": "segdistill"}
            return 200, made if method == "POST" else {"experiments": []}
        if path.endswith("/runs"):
            return 200, {"run_id": "r1", "experiment_id": "e1"}
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state is None:
            return 503, {"error": "away"}
        name, tasks, *error = state
        details = [{"task_id": task, "display_name": task, "state": value} for task, value in tasks.items()]
        answer = {"run_id": "r1", "state": name, "run_details": {"task_details": details}}
        return 200, answer | ({"error": {"code": 1, "message": error[0]}} if error else {})

    def sent(self) -> Any:
        """The run as the server got it."""
        (sent,) = [one for one in self.requests if one.method == "POST" and one.path.endswith("/runs")]
        return sent.body


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    from kfp import client

    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_UI_ENDPOINT", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "none/context.json"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name in ("DATA", "TRAIN"):
        monkeypatch.setattr(f"components.images.{name}", "registry.example/team/image:1")
    stand_in = Api()
    with serving(stand_in.answer) as stand_in.host:
        yield stand_in


@pytest.fixture(scope="module", autouse=True)
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a git server, with a repository whose data is in S3."""
    root = tmp_path_factory.mktemp("git")
    folder = root / "streets"
    (folder / ".dvc").mkdir(parents=True)
    (folder / "data.dvc").write_text(f"outs:\n- {{md5: {MD5}, hash: md5, path: data}}\n")
    (folder / ".dvc/config").write_text("[core]\nremote = s\n['remote \"s\"']\nurl = s3://bucket/streets\n")
    author = {f"GIT_{who}_{what}": "ci" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for command in (["init", "--quiet", "--initial-branch", "main"], ["add", "."], ["commit", "--quiet", "-m", "data"]):
        subprocess.run(["git", *command], cwd=folder, env=os.environ | author, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["git", "daemon", f"--base-path={root}", "--export-all", "--listen=127.0.0.1", f"--port={port}"]
    daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    address = f"git://127.0.0.1:{port}/streets"
    deadline = time.monotonic() + 30
    while subprocess.run(["git", "ls-remote", address], capture_output=True).returncode:
        assert time.monotonic() < deadline and daemon.poll() is None
    yield address
    os.killpg(daemon.pid, signal.SIGTERM)  # it has a child that serves
    daemon.wait()


@pytest.fixture(autouse=True)
def _its_address(repository: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.__main__.origin", lambda: repository)


def submit(*options: str, host: str | None = None) -> int:
    from pipelines.__main__ import main

    given = ["--params", str(GOLDEN / "params.yaml"), "--cluster", str(GOLDEN / "cluster.yaml")]
    given += ["--host", host] if host else []
    return main(["submit", *given, *options])


def test_a_run_is_sent_with_the_parameters_of_the_file_and_its_page_is_printed(
    api: Api, repository: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert submit("--revision", "main", "--run-name", "first", "--service-account", "runner", host=api.host) == 0
    out, err = capfd.readouterr()
    assert (out, err) == (f"{api.host}/#/runs/details/r1\n", "")
    run = api.sent()
    assert (run["display_name"], run["experiment_id"], run["service_account"]) == ("first", "e1", "runner")
    parameters = run["runtime_config"]["parameters"]
    head = subprocess.run(["git", "ls-remote", repository, "HEAD"], capture_output=True, text=True).stdout.split()[0]
    assert (parameters["repository"], parameters["revision"]) == (repository, head), "a branch may move"
    plans = {item["cohort"]: json.loads(item["plan"]) for item in parameters["cohorts"]}
    assert {name: [job["experiment"] for job in plan["jobs"]] for name, plan in plans.items()} == {
        "none-s0": ["none"], "kd-s0": ["kd"], "none-s1": ["none"], "kd-s1": ["kd"]
    }  # fmt: skip
    assert json.loads(parameters["compare_params"])["seeds"] == [0, 1]
    # The settings for Kubernetes travel beside the graph, and register stays uncached.
    executors = run["pipeline_spec"]["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors["exec-distill"]["securityContext"]["runAsNonRoot"] is True
    tasks = Graphs(run["pipeline_spec"]["pipeline_spec"]).tasks
    assert "enableCache" not in tasks["register"].get("cachingOptions", {})
    assert tasks["compare"]["cachingOptions"]["enableCache"] is True


def test_a_run_may_ask_for_other_accelerators_than_the_file(api: Api) -> None:
    assert submit("--accelerator-type", "amd.com/gpu", "--accelerator-count", "4", host=api.host) == 0
    parameters = api.sent()["runtime_config"]["parameters"]
    assert (parameters["accelerator_type"], parameters["accelerator_count"]) == ("amd.com/gpu", "4")


def test_without_caching_also_the_cohorts_of_the_loop_run_anew(api: Api) -> None:
    assert submit("--no-cache", host=api.host) == 0
    tasks = Graphs(api.sent()["pipeline_spec"]["pipeline_spec"]).leaves
    assert not any(task.get("cachingOptions", {}).get("enableCache") for task in tasks.values())


def test_a_token_comes_from_the_named_variable_and_is_never_printed(
    api: Api, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    assert submit("--token-env", "MY_TOKEN", host=api.host) == 0
    assert {one.headers["authorization"] for one in api.requests if "healthz" not in one.path} == {f"Bearer {TOKEN}"}
    assert submit("--token-env", "MY_TOKEN", "--dry-run", host=api.host) == 0
    assert TOKEN not in "".join(capfd.readouterr())


def test_cookies_and_a_namespace_reach_the_server(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_COOKIES", f"authservice_session={TOKEN}")
    assert submit("--cookies-env", "MY_COOKIES", "--namespace", "team", host=api.host) == 0
    assert all(one.headers["Cookie"] == f"authservice_session={TOKEN}" for one in api.requests)
    (experiment,) = [one.body for one in api.requests if one.method == "POST" and "experiments" in one.path]
    assert experiment["namespace"] == "team"


def test_in_a_cluster_the_token_of_the_service_account_is_used(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    assert submit("--in-cluster", host=api.host) == 2
    assert capfd.readouterr().err.startswith(f"pipelines submit: {tmp_path / 'token'}: no such file; --in-cluster")
    (tmp_path / "token").write_text(TOKEN)
    assert submit("--in-cluster", host=api.host) == 0
    assert api.requests[-1].headers["authorization"] == f"Bearer {TOKEN}"


def test_a_dry_run_shows_what_would_be_sent_and_sends_nothing(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("--dry-run", "--run-name", "first", host=api.host) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["host"], shown["run"], shown["authentication"]) == (api.host, "first", "none")
    assert len(shown["images"]) == 2 and len(shown["arguments"]["cohorts"]) == 4
    assert api.requests == []


def test_a_dry_run_needs_no_host_and_warns_of_images_that_no_cluster_can_pull(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from components import images

    monkeypatch.setattr(images, "TRAIN", f"{images.NOWHERE}/train:1")
    assert submit("--dry-run") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["host"] is None
    assert err.startswith("pipelines: warning: the images are under example.invalid") and err.count("\n") == 1


@pytest.mark.parametrize(("end", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELED", 1)])
def test_waiting_tells_of_the_tasks_and_ends_as_the_run_ends(
    end: str, code: int, api: Api, capfd: pytest.CaptureFixture[str]
) -> None:
    api.states = [
        ("PENDING", {}),
        ("RUNNING", {"validate": "RUNNING"}),
        None,  # an answer that does not come is not the end
        ("RUNNING", {"validate": "SUCCEEDED", "prepare": "RUNNING"}),
        (end, {"validate": "SUCCEEDED", "prepare": end}, *(["prepare did it"] if end == "FAILED" else [])),
    ]
    assert submit("--wait", host=api.host) == code
    out, err = capfd.readouterr()
    page, *lines = out.splitlines()
    assert page == f"{api.host}/#/runs/details/r1"
    told = [line.partition(" ")[2] for line in lines if line != "prepare did it"]
    assert told == [
        "validate: running", "validate: succeeded", "prepare: running", f"prepare: {end.lower()}"
    ]  # fmt: skip
    assert ("prepare did it" in lines) == (end == "FAILED")
    assert err == ("" if code == 0 else f"pipelines submit: the run ended as {end.lower()}: {page}\n")


@pytest.mark.parametrize("version", ["2.5.0", "v1.8.22", "2.13.9-rc.1"])
def test_a_server_that_is_too_old_gets_no_run(version: str, api: Api, capfd: pytest.CaptureFixture[str]) -> None:
    api.health = {"tag_name": version, "multi_user": False}
    assert submit(host=api.host) == 2
    out, err = capfd.readouterr()
    assert (out, err) == (
        "",
        f"pipelines submit: {api.host}: Kubeflow Pipelines {version}; this pipeline needs 2.14.0 or later\n",
    )
    assert not [one for one in api.requests if one.method == "POST"]


@pytest.mark.parametrize(
    ("health", "warning"),
    [
        ({"tag_name": "2.14.0"}, "Kubeflow Pipelines 2.14.0 ignores 'security' of cluster.yaml, which needs 2.16.0"),
        ({"tag_name": "2.16.0"}, None),
        ({"tag_name": "3.0.1"}, None),
        ({"tag_name": "unknown"}, "does not say which version it is; this pipeline needs 2.14.0 or later"),
        ({}, "does not say which version it is; this pipeline needs 2.14.0 or later"),
    ],
)
def test_a_server_that_may_run_it_gets_the_run_and_a_warning_where_one_is_due(
    health: dict[str, Any], warning: str | None, api: Api, capfd: pytest.CaptureFixture[str]
) -> None:
    api.health = {"multi_user": False, **health}
    assert submit(host=api.host) == 0
    err = capfd.readouterr().err
    assert err == "" if warning is None else err.startswith(f"pipelines submit: {api.host}: {warning}")
    assert api.sent()


def test_a_matrix_that_a_server_could_not_hand_over_is_refused_with_the_size_of_one_that_it_could(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = yaml.safe_load((GOLDEN / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**params, "seeds": list(range(90))}))
    assert submit("--params", str(tmp_path / "params.yaml"), host=api.host) == 2
    err = capsys.readouterr().err
    assert err.startswith("pipelines submit: run, seeds: 180 jobs are more than one run of Kubeflow Pipelines can hand")
    assert re.search(r"in cohorts as these [78]\d would fit", err) and api.requests == []


@pytest.mark.parametrize("status", [401, 503])
def test_a_server_that_does_not_want_it_gives_one_sentence(
    status: int, api: Api, capfd: pytest.CaptureFixture[str]
) -> None:
    api.refuse = status
    assert submit(host=api.host) == 2
    out, err = capfd.readouterr()
    assert err.startswith(f"pipelines submit: {api.host}: ") and err.count("\n") == 1 and out == ""


def test_a_server_that_is_not_there_gives_one_sentence(api: Api, capfd: pytest.CaptureFixture[str]) -> None:
    assert submit("--namespace", "team", host="http://127.0.0.1:9") == 2
    err = capfd.readouterr().err
    assert err.startswith("pipelines submit: http://127.0.0.1:9: no answer: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "--host: missing; give the URL"),
        (["--host", "kubeflow.example"], "--host: 'kubeflow.example' is not a URL"),
        (["--host", "http://h", "--token-env", "UNSET_VARIABLE"], "UNSET_VARIABLE: this environment variable"),
        (["--host", "http://h", "--token-env", "A", "--in-cluster"], "--token-env, --cookies-env and --in-cluster"),
        (["--host", "http://h", "--repository", "."], "--repository: '.' is a folder of this machine"),
        (["--host", "http://h", "--repository", "https://me:pass@h/x"], "--repository: 'https://h/x' was given"),
        (["--host", "http://h", "--accelerator-count", "-1"], "--accelerator-count: '-1' is not a number of them"),
        (["--host", "http://h", "--revision", "v9"], "git://127.0.0.1"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    options: list[str], sentence: str, api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(*options) == 2
    assert capsys.readouterr().err.startswith(f"pipelines submit: {sentence}")
