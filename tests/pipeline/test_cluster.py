"""What tasks ask of a cluster: the file that says it, and the rules that the compiled pipeline keeps."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compiled import Graphs

from segdistill.config import read_yaml
from segdistill.errors import UserError
from segdistill.stages import STAGES

pytest.importorskip("kfp")
ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
CLUSTERS = {"default": ROOT / "pipelines/cluster.yaml", "everything": GOLDEN / "cluster.yaml"}
TASKS = {stage.name.replace("_", "-") for stage in STAGES if stage.image} | {"fetch", "finish"}
QUEUE = {"kueue.x-k8s.io/queue-name": "gpus", "kueue.x-k8s.io/priority-class": "research"}
CERTIFICATES = dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), "/etc/segdistill/authorities/ca.crt")
TRAINING = {"train-teacher", "evaluate-teacher", "distill", "evaluate"}


class Compiled:
    """A compiled pipeline, by task."""

    def __init__(self, text: str, cluster: Any) -> None:
        self.text, self.cluster = text, cluster
        spec, platform = yaml.safe_load_all(text)
        self.inputs = spec["root"]["inputDefinitions"]["parameters"]
        self.containers = {
            name.removeprefix("exec-"): one["container"]
            for name, one in spec["deploymentSpec"]["executors"].items()
            if "container" in one
        }
        executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        self.settings = {name.removeprefix("exec-"): one for name, one in executors.items()}
        self.graphs = Graphs(spec)
        self.tasks = self.graphs.leaves

    def kind(self, name: str) -> str:
        kinds = dict.fromkeys(("fetch", "validate", "prepare", "finish"), "data")
        return (kinds | {"compare": "report", "register": "report"}).get(name, "train")

    def parameter(self, name: str, placeholder: str) -> str:
        """The pipeline's parameter behind a placeholder, found as KFP's server does: among the inputs of the task."""
        (key,) = re.findall(r"^\{\{\$\.inputs\.parameters\['(.+)'\]\}\}$", placeholder)
        graph, parameter = self.graphs.origin(name, self.tasks[name]["inputs"]["parameters"][key], "Parameter")
        assert graph == "root" and self.inputs[parameter]["parameterType"] == "STRING", "the server reads text alone"
        return parameter

    def resources(self, name: str) -> Any:
        return getattr(self.cluster.tasks, self.kind(name))


def compile_with(cluster: Path, folder: Path, **options: Any) -> Compiled:
    from pipelines.__main__ import compile_to
    from pipelines.cluster import read_cluster

    out = folder / "pipeline.yaml"
    compile_to(out, read_yaml(GOLDEN / "params.yaml"), cluster=cluster, **options)
    return Compiled(out.read_text(), read_cluster(cluster))


@pytest.fixture(scope="module", params=CLUSTERS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compile_with(CLUSTERS[request.param], tmp_path_factory.mktemp(request.param))


# The rules


def test_every_task_that_trains_has_its_accelerators_a_toleration_and_shared_memory(compiled: Compiled) -> None:
    asked = compiled.cluster.accelerator
    assert {name: one.get("defaultValue") for name, one in compiled.inputs.items() if "accelerator" in name} == {
        "accelerator_type": asked.type,
        "accelerator_count": str(asked.count),
    }
    found = {name for name, one in compiled.containers.items() if "accelerator" in one["resources"]}
    assert found == TRAINING
    for name in TRAINING:
        accelerator = compiled.containers[name]["resources"]["accelerator"]
        assert compiled.parameter(name, accelerator["resourceType"]) == "accelerator_type"
        assert compiled.parameter(name, accelerator["resourceCount"]) == "accelerator_count"
        settings = compiled.settings[name]
        assert [taint["key"] for taint in settings["tolerations"]] == [taint.key for taint in asked.tolerations]
        assert settings["tolerations"]
        assert settings.get("nodeSelector", {}).get("labels", {}) == asked.node_selector
        (shared,) = settings["emptyDirMounts"]
        assert (shared["mountPath"], shared["medium"]) == ("/dev/shm", "Memory")
        assert shared["sizeLimit"] == compiled.cluster.shared_memory


def test_every_task_asks_for_processors_and_memory_within_a_limit(compiled: Compiled) -> None:
    assert set(compiled.containers) == TASKS
    for name, container in compiled.containers.items():
        found, asked = container["resources"], compiled.resources(name)
        assert found["resourceCpuRequest"] == asked.cpu_request
        assert found["resourceCpuLimit"] == asked.cpu_limit
        assert found["resourceMemoryRequest"] == asked.memory_request
        assert found["resourceMemoryLimit"] == asked.memory_limit


def test_every_task_has_a_timeout_and_is_tried_again(compiled: Compiled) -> None:
    assert set(compiled.settings) == TASKS
    for name, task in compiled.tasks.items():
        assert compiled.settings[name]["activeDeadlineSeconds"] == str(compiled.resources(name).timeout_seconds)
        policy = task["retryPolicy"]
        assert policy["maxRetryCount"] == compiled.cluster.retries.count > 0
        assert policy["backoffDuration"] == f"{compiled.cluster.retries.wait_seconds}s" != "0s"
        assert policy["backoffFactor"] == compiled.cluster.retries.factor
        # After this KFP tries nothing again, however few the attempts were.
        attempts = (compiled.cluster.retries.count + 1) * compiled.resources(name).timeout_seconds
        assert int(policy["backoffMaxDuration"].removesuffix("s")) > attempts


def test_no_task_runs_as_root(compiled: Compiled) -> None:
    for name, task in compiled.settings.items():
        context = task["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert (context["runAsUser"], context["runAsGroup"]) == ("1000", "1000"), name


def test_every_task_is_told_its_pipeline_run_and_gets_its_environment_by_reference(compiled: Compiled) -> None:
    for name, task in compiled.settings.items():
        (run,) = task["fieldPathAsEnv"]
        assert run == {"name": "SEGDISTILL_PIPELINE_RUN", "fieldPath": "metadata.labels['pipeline/runid']"}
        (store,) = task["configMapAsEnv"]
        assert [entry["envVar"] for entry in store["keyToEnv"]] == ["MLFLOW_TRACKING_URI"]
        asked = [
            (item.name, item.optional, list(item.keys.values()))
            for item in compiled.cluster.secrets
            if compiled.kind(name) in item.tasks
        ]
        found = [
            (item["secretName"], item["optional"], [entry["envVar"] for entry in item["keyToEnv"]])
            for item in task.get("secretAsEnv", [])
        ]
        assert found == asked
        assert task["imagePullPolicy"] == compiled.cluster.pull_policy, name


def test_no_secret_is_in_the_compiled_file(compiled: Compiled) -> None:
    secret = re.compile(r"password|passwd|secret|token|credential|api_?key|access_?key", re.IGNORECASE)
    assert not [name for name in compiled.inputs if secret.search(name)]
    for container in compiled.containers.values():
        literal = {entry["name"] for entry in container.get("env", [])}
        certificates = compiled.cluster.certificates
        assert literal <= {"SEGDISTILL_WORK", "SEGDISTILL_SHARED", *(certificates.variables if certificates else [])}
        assert not secret.search(" ".join([*container["command"], *container["args"]]))
    names = {text for item in compiled.cluster.secrets for text in (item.name, *item.keys, *item.keys.values())}
    schema = {"imagePullSecret", "secretAsEnv", "secretKey", "secretName", "secretNameParameter"}
    words = set(re.findall(r"[\w-]+", compiled.text))
    assert {word for word in words if secret.search(word)} <= names | schema


def test_no_image_is_one_that_moves(compiled: Compiled) -> None:
    for name, container in compiled.containers.items():
        tag = container["image"].rpartition("/")[2].partition(":")[2]
        assert tag and tag != "latest", name


def test_only_what_changes_mlflow_is_never_cached(compiled: Compiled) -> None:
    # A key of our own would be one string for all cohorts: kfp compiles a loop's item into it as a word, not its value.
    assert compiled.tasks["register"]["cachingOptions"] == compiled.tasks["finish"]["cachingOptions"] == {}
    for name in TASKS - {"register", "finish"}:
        assert compiled.tasks[name]["cachingOptions"] == {"enableCache": True}


def test_without_caching_no_task_takes_over_a_result(tmp_path: Path) -> None:
    compiled = compile_with(CLUSTERS["default"], tmp_path, caching=False)
    assert all(task["cachingOptions"] == {} for task in compiled.tasks.values())


def test_a_workspace_is_mounted_where_training_looks_for_it(tmp_path: Path) -> None:
    compiled = compile_with(CLUSTERS["everything"], tmp_path)
    for name in TASKS:
        mounts = [(one["pvcNameParameter"], one["mountPath"]) for one in compiled.settings[name].get("pvcMount", [])]
        environment = {one["name"]: one["value"] for one in compiled.containers[name].get("env", [])}
        assert mounts == [({"runtimeValue": {"constant": "segdistill-workspace"}}, "/workspace")]
        training = {"SEGDISTILL_WORK": "/workspace/work"} if name in TRAINING else {}
        assert environment == {"SEGDISTILL_SHARED": "/workspace/shared"} | training | CERTIFICATES


def test_a_volume_for_checkpoints_alone_is_mounted_only_where_there_are_any(tmp_path: Path) -> None:
    content = read_yaml(CLUSTERS["everything"])
    content["workspace"]["share_data"] = False
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(content))
    compiled = compile_with(tmp_path / "cluster.yaml", tmp_path)
    assert {name for name, one in compiled.settings.items() if "pvcMount" in one} == TRAINING
    assert "SEGDISTILL_SHARED" not in compiled.text


def test_cohorts_run_at_most_so_many_at_a_time(compiled: Compiled) -> None:
    policy = compiled.graphs.tasks[compiled.graphs.loop].get("iteratorPolicy", {})
    assert policy.get("parallelismLimit") == compiled.cluster.parallel_cohorts


def test_on_several_nodes_the_pod_of_a_task_only_waits_and_the_job_asks_for_the_rest(tmp_path: Path) -> None:
    content = read_yaml(CLUSTERS["everything"])
    content["accelerator"]["nodes"] = 3
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(content))
    compiled = compile_with(tmp_path / "cluster.yaml", tmp_path)
    for name in TRAINING:
        container, settings = compiled.containers[name], compiled.settings[name]
        assert "accelerator" not in container["resources"] and "tolerations" not in settings
        assert container["resources"]["resourceMemoryLimit"] == compiled.cluster.tasks.report.memory_limit
        timeout = compiled.cluster.tasks.train.timeout_seconds
        assert settings["activeDeadlineSeconds"] == str(timeout)
        (template,) = [one["value"] for one in container["env"] if one["name"] == "SEGDISTILL_TRAINJOB"]
        assert json.loads(template)["volume"] == compiled.cluster.workspace.path
        job = json.loads(template)["manifest"]
        trainer = job["spec"]["trainer"]
        assert (trainer["numNodes"], trainer["image"]) == (3, container["image"])
        assert job["spec"]["activeDeadlineSeconds"] < int(timeout)
        secrets = {one["valueFrom"]["secretKeyRef"]["name"] for one in trainer["env"] if "secretKeyRef" in str(one)}
        assert secrets == {"segdistill-mlflow"}  # S3 is for the tasks that fetch
        assert QUEUE.items() <= job["metadata"]["labels"].items()
        # The pod that waits must not stand in the queue before the job that it waits for.
        assert settings["podMetadata"]["labels"] == {"team": "vision"}
        assert settings["pvcMount"]
    assert "SEGDISTILL_TRAINJOB" not in {one["name"] for one in compiled.containers["prepare"]["env"]}


def test_pods_have_the_labels_the_queue_the_registrys_secret_and_the_certificates_of_the_file(tmp_path: Path) -> None:
    compiled = compile_with(CLUSTERS["everything"], tmp_path)
    for name in TASKS:
        settings = compiled.settings[name]
        queue = QUEUE if compiled.kind(name) == "train" else {}
        assert settings["podMetadata"] == {
            "labels": {"team": "vision", **queue},
            "annotations": {"example.com/contact": "vision team"},
        }
        assert [one["secretName"] for one in settings["imagePullSecret"]] == ["registry"]
        (mount,) = settings["configMapAsVolume"]
        assert (mount["configMapName"], mount["mountPath"]) == ("authorities", "/etc/segdistill/authorities")
        variables = {one["name"]: one["value"] for one in compiled.containers[name]["env"]}
        assert CERTIFICATES.items() <= variables.items()


def test_where_nothing_of_that_is_asked_for_nothing_of_it_is_compiled(tmp_path: Path) -> None:
    compiled = compile_with(CLUSTERS["default"], tmp_path)
    for name in TASKS:
        assert not {"podMetadata", "imagePullSecret", "configMapAsVolume"} & set(compiled.settings[name])


def changed(tmp_path: Path, **sections: Any) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(read_yaml(CLUSTERS["everything"]) | sections))
    return path


@pytest.mark.parametrize("nodes", [1, 2])
def test_where_kfp_makes_the_runs_of_mlflow_no_variable_of_its_own_is_set_by_us(nodes: int, tmp_path: Path) -> None:
    accelerator = read_yaml(CLUSTERS["everything"])["accelerator"] | {"nodes": nodes}
    compiled = compile_with(changed(tmp_path, mlflow="injected", accelerator=accelerator), tmp_path)
    for name in TASKS:
        settings, container = compiled.settings[name], compiled.containers[name]
        references = settings.get("configMapAsEnv", []) + settings.get("secretAsEnv", [])
        names = [entry["envVar"] for one in references for entry in one["keyToEnv"]]
        literal = {one["name"]: one["value"] for one in container["env"]}
        assert not [variable for variable in [*names, *literal] if variable.startswith("MLFLOW_")]
        assert literal["SEGDISTILL_MLFLOW"] == "injected"
        assert ("AWS_ACCESS_KEY_ID" in names) == (compiled.kind(name) == "data")
    if nodes > 1:
        # To the pods of a TrainJob the plugin gives nothing: the waiting one hands on what is no secret.
        variables = {one["name"]: one["value"] for one in compiled.containers["distill"]["env"]}
        job = json.loads(variables["SEGDISTILL_TRAINJOB"])["manifest"]
        of_mlflow = {one["name"] for one in job["spec"]["trainer"]["env"] if one["name"].startswith("MLFLOW")}
        assert of_mlflow == {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}


def test_a_variable_that_would_be_set_twice_is_named(tmp_path: Path) -> None:
    from pipelines.cluster import read_cluster

    again = {"name": "b", "optional": True, "tasks": ["train"], "keys": {"k": "MLFLOW_TRACKING_USERNAME"}}
    secrets = [*read_yaml(CLUSTERS["everything"])["secrets"], again]
    with pytest.raises(UserError, match="MLFLOW_TRACKING_USERNAME is given twice to tasks of the kind 'train'"):
        read_cluster(changed(tmp_path, secrets=secrets))
    ours = again | {"keys": {"k": "SEGDISTILL_WORK"}}
    with pytest.raises(UserError, match="SEGDISTILL_WORK is given to tasks by the pipeline itself"):
        read_cluster(changed(tmp_path, secrets=[ours]))


def test_the_patch_for_administrators_has_every_failed_attempt_tried_again() -> None:
    (patch,) = yaml.safe_load_all((ROOT / "pipelines/manifests/administrator/retry-always.yaml").read_text())
    assert (patch["kind"], patch["metadata"]["name"]) == ("ConfigMap", "workflow-controller-configmap")
    defaults = yaml.safe_load(patch["data"]["workflowDefaults"])["spec"]
    assert defaults["templateDefaults"]["retryStrategy"]["retryPolicy"] == "Always"
    assert isinstance(defaults["templateDefaults"]["retryStrategy"]["limit"], str)  # as Argo reads it


def test_several_nodes_need_a_volume(tmp_path: Path) -> None:
    from pipelines.cluster import read_cluster

    content = read_yaml(CLUSTERS["everything"]) | {"workspace": None}
    content["accelerator"]["nodes"] = 2
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"accelerator\.nodes above 1 needs a workspace"):
        read_cluster(tmp_path / "cluster.yaml")


def test_without_an_accelerator_tasks_run_on_any_node(tmp_path: Path) -> None:
    content = read_yaml(CLUSTERS["default"]) | {"accelerator": None}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(content))
    compiled = compile_with(tmp_path / "cluster.yaml", tmp_path)
    none = {name: compiled.inputs[name]["defaultValue"] for name in ("accelerator_type", "accelerator_count")}
    assert none == {"accelerator_type": "", "accelerator_count": "0"}  # KFP's server sets no limit for a type of ""
    assert all(compiled.settings[name]["emptyDirMounts"] for name in TRAINING)
    assert "tolerations" not in compiled.text


# The file


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("accelerator.cuont", 1, "accelerator.cuont: unknown key; did you mean 'count'?"),
        ("accelerator.count", 0, "accelerator.count: input should be greater than 0, not 0"),
        ("security.user", 0, "security.user: input should be greater than 0, not 0"),
        ("tasks.data.memory_limit", "8 gigs", "tasks.data.memory_limit: '8 gigs' is not an amount; write it like"),
        ("tasks.data.memory_limit", "1Gi", "tasks.data: memory_request 4Gi is above memory_limit 1Gi"),
        ("tasks.data.cpu_request", "9", "tasks.data: cpu_request 9 is above cpu_limit 8"),
        ("retries.factor", 1.5, "retries.factor: input should be a valid integer"),
        ("labels", {"team": "a b"}, "labels.team: 'a b' is no value of a label"),
        ("mlflow", "plugin", "mlflow: 'plugin' is not allowed; allowed: 'config-map' or 'injected'"),
        ("shared_memory", "48Gi", "shared_memory 48Gi leaves nothing of tasks.train.memory_limit 48Gi"),
        ("pull_policy", "Sometimes", "pull_policy: 'Sometimes' is not allowed; allowed: 'Always', 'IfNotPresent'"),
        (
            "workspace",
            {"claim": "w", "path": "work", "share_data": True},
            "workspace.path: string should match pattern",
        ),
    ],
)
def test_a_mistake_in_the_file_is_named(path: str, value: Any, sentence: str, tmp_path: Path) -> None:
    from pipelines.cluster import read_cluster

    content = read_yaml(CLUSTERS["default"])
    *parents, key = path.split(".")
    section = content
    for parent in parents:
        section = section[parent]
    section[key] = value
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as raised:
        read_cluster(file)
    assert str(raised.value).startswith(f"{file}: {sentence}")


def test_a_missing_setting_is_named_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.__main__ import main

    content = read_yaml(CLUSTERS["default"])
    del content["retries"]
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(content))
    given = ["--params", str(GOLDEN / "params.yaml"), "--cluster", str(tmp_path / "cluster.yaml")]
    assert main(["compile", *given, "--out", str(tmp_path / "pipeline.yaml")]) == 2
    expected = f"pipelines compile: {tmp_path / 'cluster.yaml'}: retries: missing; it has no default\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "pipeline.yaml").exists()


def test_the_manifests_have_what_the_default_file_names() -> None:
    from pipelines.cluster import read_cluster

    cluster = read_cluster()
    documents = [
        one for file in (ROOT / "pipelines/manifests").glob("*.yaml") for one in yaml.safe_load_all(file.read_text())
    ]
    by_kind: dict[str, dict[str, Any]] = {}
    for one in documents:
        by_kind.setdefault(one["kind"], {})[one["metadata"]["name"]] = one
    assert {item.name: set(item.keys) for item in cluster.config_maps} == {
        name: set(one["data"]) for name, one in by_kind["ConfigMap"].items()
    }
    assert {item.name: set(item.keys) for item in cluster.secrets} == {
        name: set(one["stringData"]) for name, one in by_kind["Secret"].items()
    }
    assert not any(value for one in by_kind["Secret"].values() for value in one["stringData"].values())
    assert "segdistill-workspace" in by_kind["PersistentVolumeClaim"]


# Cohorts


def cohorts_of(compiled: Compiled) -> dict[str, list[str]]:
    """The jobs of each cohort, by its name."""
    items = compiled.inputs["cohorts"]["defaultValue"]
    plans = {item["cohort"]: json.loads(item["plan"]) for item in items}
    return {name: [f"{job['experiment']}-s{job['seed']}" for job in plan["jobs"]] for name, plan in plans.items()}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, {name: [name] for name in ("none-s0", "kd-s0", "none-s1", "kd-s1")}),
        (2, {"s0-0": ["none-s0", "kd-s0"], "s1-0": ["none-s1", "kd-s1"]}),
    ],
)
def test_a_pod_trains_as_many_jobs_of_a_seed_as_a_gpu_is_to_hold(
    size: int, expected: dict[str, list[str]], tmp_path: Path
) -> None:
    assert cohorts_of(compile_with(changed(tmp_path, jobs_per_gpu=size), tmp_path)) == expected


# Where training keeps its checkpoint


@pytest.mark.parametrize("volume", [None, "volume"])
def test_a_component_names_its_checkpoints_after_pipeline_run_and_cohort(
    volume: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segdistill import execution
    from segdistill.kubeflow import tasks
    from segdistill.report.highlights import Highlights

    seen: dict[str, Any] = {}

    class Module:
        @staticmethod
        def run(*, plan: Path, students: Path, work: Path | None) -> dict[str, float]:
            seen.update(plan=plan.read_text(), students=students, work=work)
            students.mkdir(parents=True)
            return {}

        @staticmethod
        def highlights(paths: Any) -> Highlights:
            return Highlights()

    monkeypatch.chdir(tmp_path)
    for module in (execution, tasks):
        monkeypatch.setattr(module, "stage_module", lambda stage: Module)
    monkeypatch.setenv("SEGDISTILL_PIPELINE_RUN", "run-7")
    monkeypatch.setenv("SEGDISTILL_TRACKER", "none")
    monkeypatch.delenv("SEGDISTILL_WORK", raising=False)
    if volume:
        monkeypatch.setenv("SEGDISTILL_WORK", str(tmp_path / volume))
    paths = {name: str(tmp_path / name) for name in ("prepared", "teacher", "students")}
    for name in ("prepared", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / tasks.COMPLETED).write_text('{"stage": "any", "cohort": null}')
    tasks.run_component("distill", plan="the plan", cohort="s1-0", paths=paths)
    own = tmp_path / "volume/run-7/distill-s1-0"
    places = {"students": own / "students", "work": own / "checkpoints"} if volume else {
        "students": tmp_path / "students", "work": None
    }  # fmt: skip
    assert seen == {"plan": "the plan", **places}
    assert sorted(path.name for path in (tmp_path / "students").iterdir()) == [tasks.COMPLETED]
