"""Runs a compiled pipeline by the rules of the released servers of Kubeflow Pipelines, without a cluster.

KFP's local runner is kinder than they are. The rules are those of ``backend/src/v2`` (driver, launcher, metadata) in
kubeflow/pipelines, tags 2.14.0 to 2.17.0:

* A graph within the graph keeps its input artifacts by name, one artifact a name, and one name an artifact.
* A list out of a loop is collected, in the order of its iterations, for tasks that stand beside the loop.
* Every number is a double, and what goes into a parameter of type STRING becomes text.
* All inputs of a task are one argument of its process, as all parameters of the run are one of its first pod.
* What a task does is COMPLETE, FAILED or CACHED in ML Metadata's words. A graph is RUNNING until a task in it that has
  just run finds all others done; up to 2.16.1 nobody looks further up, nor counts a loop's iterations.
* A pod that fails is tried again; one that vanishes is not, and leaves its task RUNNING.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ARGUMENT = 128 * 1024  # bytes of one argument of a process on Linux, with the zero that ends it
SESSION = json.dumps(
    {
        "Provider": "minio",
        "Params": {
            "accessKeyKey": "accesskey", "disableSSL": "true", "endpoint": "minio-service.kubeflow:9000",
            "fromEnv": "false", "region": "minio", "secretKeyKey": "secretkey",
            "secretName": "mlpipeline-minio-artifact",
        },
    }
)  # fmt: skip

Artifact = dict[str, Any]  # a RuntimeArtifact of KFP
Executor = Callable[[str, Mapping[str, Any], dict[str, Any]], None]  # the task's name, its container, executor_input


class TaskFailed(Exception):
    """The pod of a task ended with an error."""


class PodLost(Exception):
    """The pod of a task vanished with its node."""


@dataclass(eq=False)
class Execution:
    """What ML Metadata keeps of a task, or of a graph."""

    number: int
    task: str
    component: Mapping[str, Any]
    parent: "Execution | None"
    parameters: dict[str, Any]
    artifacts: dict[str, list[Artifact]]
    iteration: int | None = None
    iteration_count: int | None = None
    state: str = "RUNNING"
    children: list["Execution"] = field(default_factory=list)
    output_parameters: dict[str, Any] = field(default_factory=dict)
    output_artifacts: dict[str, Artifact] = field(default_factory=dict)
    executor_input: dict[str, Any] = field(default_factory=dict)

    @property
    def as_read_back(self) -> dict[str, list[Artifact]]:
        """A graph's input artifacts as its tasks find them."""
        name_of = {artifact["name"]: name for name, given in self.artifacts.items() for artifact in given}
        by_number = {artifact["name"]: artifact for given in self.artifacts.values() for artifact in given}
        return {name_of[number]: [artifact] for number, artifact in sorted(by_number.items(), key=lambda x: int(x[0]))}


@dataclass
class Run:
    """What became of a pipeline."""

    identity: str
    executions: list[Execution] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # why, by the task's name

    @property
    def state(self) -> str:
        """As the page of the run shows it, by Argo's word."""
        return "FAILED" if self.failed else "SUCCEEDED"

    def of(self, task: str) -> list[Execution]:
        """A task's executions: more than one in a loop."""
        return [one for one in self.executions if one.task == task]


class Server:
    """Runs pipelines; keeps what it has cached."""

    def __init__(self, root: Path, execute: Executor, version: str = "2.17.0") -> None:
        self.root, self.execute = root, execute
        self.follows_loops = tuple(map(int, version.split("."))) >= (2, 17, 0)
        self.cache: dict[str, Execution] = {}
        self.numbers = iter(range(1, 10**9))
        self.run = Run("")
        self.spec: dict[str, Any] = {}

    def start(self, package: str, arguments: Mapping[str, Any], identity: str | None = None) -> Run:
        """Runs the compiled pipeline in ``package`` to its end."""
        self.spec = next(iter(yaml.safe_load_all(package)))
        self.run = Run(identity or str(uuid.uuid4()))
        defined = self.spec["root"].get("inputDefinitions", {}).get("parameters", {})
        defaults = {name: one["defaultValue"] for name, one in defined.items() if "defaultValue" in one}
        given = _as_values(defaults | dict(arguments))
        _fits("--runtime_config", {"parameterValues": given})
        root = Execution(next(self.numbers), "root", self.spec["root"], None, given, {})
        self.run.executions.append(root)
        self._graph(root)
        return self.run

    # Graphs

    def _graph(self, graph: Execution) -> bool:
        """Runs the tasks of a graph; says whether all went well."""
        tasks = dict(graph.component["dag"]["tasks"])
        done: dict[str, bool] = {}
        while tasks:
            name = next(name for name, task in tasks.items() if set(task.get("dependentTasks", ())) <= set(done))
            task = tasks.pop(name)
            at_the_end = task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED"
            if not at_the_end and not all(done[one] for one in task.get("dependentTasks", ())):
                done[name] = False
                continue
            try:
                done[name] = self._task(graph, name, task)
            except (TaskFailed, PodLost) as error:
                self.run.failed[name], done[name] = str(error), False
        return all(done.values())

    def _task(self, graph: Execution, name: str, task: Mapping[str, Any]) -> bool:
        component = self.spec["components"][task["componentRef"]["name"]]
        parameters, artifacts = self._inputs(graph, task, component)
        execution = self._created(graph, name, component, parameters, artifacts)
        condition = task.get("triggerPolicy", {}).get("condition")
        if condition is not None and not _holds(condition, parameters):
            execution.state = "CANCELED"
            return True
        if "dag" not in component:
            self._container(execution, task)
            return True
        iterator = task.get("parameterIterator")
        if iterator is None:
            return self._graph(execution)
        items = parameters[iterator["items"]["inputParameter"]]
        execution.iteration_count = len(items)
        well = True
        for number, item in enumerate(items):
            own = {key: value for key, value in parameters.items() if key != iterator["items"]["inputParameter"]}
            own[iterator["itemInput"]] = item
            one = self._created(execution, name, component, own, execution.as_read_back)
            one.iteration = number
            well = self._graph(one) and well
        return well

    def _created(
        self,
        graph: Execution,
        name: str,
        component: Mapping[str, Any],
        parameters: dict[str, Any],
        artifacts: dict[str, list[Artifact]],
    ) -> Execution:
        execution = Execution(next(self.numbers), name, component, graph, parameters, artifacts)
        graph.children.append(execution)
        self.run.executions.append(execution)
        return execution

    # Inputs

    def _inputs(
        self, graph: Execution, task: Mapping[str, Any], component: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, list[Artifact]]]:
        asked, defined = task.get("inputs", {}), component.get("inputDefinitions", {})
        parameters, artifacts = {}, {}
        for name, source in asked.get("parameters", {}).items():
            value = self._parameter(graph, task, source)
            if "parameterExpressionSelector" in source:
                value = _selected(source["parameterExpressionSelector"], value)
            kind = defined["parameters"].get(name, {}).get("parameterType")  # a resource's parameter has none
            parameters[name] = _typed(name, value, kind) if kind else value
        for name, source in asked.get("artifacts", {}).items():
            outer = source.get("componentInputArtifact")
            if outer is None:
                made = source["taskOutputArtifact"]
                artifacts[name] = list(_made(graph, made["producerTask"], made["outputArtifactKey"]))
            elif outer in graph.as_read_back:
                artifacts[name] = graph.as_read_back[outer]
            else:
                raise TaskFailed(f"parent DAG does not have input artifact {outer}")
        return parameters, artifacts

    def _parameter(self, graph: Execution, task: Mapping[str, Any], source: Mapping[str, Any]) -> Any:
        if "componentInputParameter" in source:
            outer = source["componentInputParameter"]
            if outer not in graph.parameters:
                raise TaskFailed(f"parent DAG does not have input parameter {outer}")
            return graph.parameters[outer]
        if "taskOutputParameter" in source:
            made = source["taskOutputParameter"]
            (producer,) = [one for one in graph.children if one.task == made["producerTask"]]
            return producer.output_parameters[made["outputParameterKey"]]
        if "taskFinalStatus" in source:
            (before,) = [one for one in graph.children if one.task == task["dependentTasks"][0]]
            return {"state": before.state, "pipelineJobResourceName": "", "pipelineTaskName": before.task, "error": {}}
        return _as_values(source["runtimeValue"]["constant"])

    # Tasks

    def _container(self, execution: Execution, task: Mapping[str, Any]) -> None:
        component = execution.component
        container = self.spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        names = {name: [one["name"] for one in given] for name, given in execution.artifacts.items()}
        key = json.dumps([container, execution.parameters, names], sort_keys=True)
        if task.get("cachingOptions", {}).get("enableCache") and key in self.cache:
            before = self.cache[key]
            execution.output_parameters, execution.output_artifacts = before.output_parameters, before.output_artifacts
            execution.state = "CACHED"  # by the driver, which looks at no graph
            return
        defined = component.get("outputDefinitions", {})
        folder = self.root / self.spec["pipelineInfo"]["name"] / self.run.identity / execution.task / str(uuid.uuid4())
        execution.executor_input = {
            "inputs": {
                "parameterValues": execution.parameters,
                "artifacts": {name: {"artifacts": given} for name, given in execution.artifacts.items()},
            },
            "outputs": {
                "parameters": {
                    name: {"outputFile": str(folder / "parameters" / name)} for name in defined.get("parameters", {})
                },
                "artifacts": {
                    name: {"artifacts": [{"name": name, "uri": str(folder / name), "type": one["artifactType"]}]}
                    for name, one in defined.get("artifacts", {}).items()
                },
                "outputFile": str(folder / "executor_output.json"),
            },
        }
        _fits("--executor_input", execution.executor_input)
        for left in reversed(range(1 + task.get("retryPolicy", {}).get("maxRetryCount", 0))):
            execution.state = "RUNNING"
            try:
                self.execute(execution.task, container, execution.executor_input)
            except TaskFailed:
                self._published(execution, "FAILED")
                if not left:
                    raise
            else:
                break
        self._collect_outputs(execution, folder)
        self._published(execution, "COMPLETE")
        self.cache[key] = execution

    def _collect_outputs(self, execution: Execution, folder: Path) -> None:
        file = folder / "executor_output.json"
        written = json.loads(file.read_text()) if file.is_file() else {}
        execution.output_parameters = _as_values(written.get("parameterValues", {}))
        for name, given in execution.executor_input["outputs"]["artifacts"].items():
            told = written.get("artifacts", {}).get(name, {}).get("artifacts", [{}])[0].get("metadata", {})
            execution.output_artifacts[name] = {
                "name": str(next(self.numbers)),
                "type": {"instanceSchema": ""},
                "uri": given["artifacts"][0]["uri"],
                "metadata": {**_as_values(told), "display_name": name, "store_session_info": SESSION},
            }

    def _published(self, execution: Execution, state: str) -> None:
        """A task's end, written by its launcher, which then looks at the graph that the task is in."""
        execution.state = state
        graph = execution.parent
        while graph is not None and graph.parent is not None:  # nobody counts the tasks of the root
            expected = len(graph.component["dag"]["tasks"])
            if self.follows_loops and graph.iteration_count is not None:
                expected = graph.iteration_count
            states = [one.state for one in graph.children]
            if sum(one in ("COMPLETE", "CACHED", "CANCELED") for one in states) == expected:
                graph.state = "COMPLETE"
            elif "FAILED" in states:
                graph.state = "FAILED"
            else:
                return
            if not self.follows_loops:
                return
            graph = graph.parent


def run_source(task: str, container: Mapping[str, Any], executor_input: dict[str, Any]) -> None:
    """Runs the code of a component as it stands in the compiled pipeline, by KFP's executor, in this process."""
    from kfp.dsl.executor import Executor as Execute

    namespace: dict[str, Any] = {}
    exec(compile(container["command"][-1], f"<{task}>", "exec", dont_inherit=True), namespace)
    name = container["args"][container["args"].index("--function_to_execute") + 1]
    try:
        Execute(json.loads(json.dumps(executor_input)), namespace[name]).execute()
    except SystemExit as ended:
        if ended.code:
            raise TaskFailed(f"{task} exited with {ended.code}") from None


def _made(graph: Execution, task: str, key: str) -> Iterator[Artifact]:
    """An output of a task beside the one that reads it: one artifact, or one of each iteration."""
    for producer in [one for one in graph.children if one.task == task]:
        if "dag" not in producer.component:
            yield producer.output_artifacts[key]
            continue
        (inner,) = producer.component["dag"]["outputs"]["artifacts"][key]["artifactSelectors"]
        for place in producer.children if producer.iteration_count is not None else [producer]:
            yield from _made(place, inner["producerSubtask"], inner["outputArtifactKey"])


def _as_values(content: Any) -> Any:
    """As JSON whose numbers have been doubles."""
    if isinstance(content, bool) or not isinstance(content, (int, float, dict, list)):
        return content
    if isinstance(content, dict):
        return {key: _as_values(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_as_values(value) for value in content]
    double = float(content)
    return int(double) if double.is_integer() else double


def _typed(name: str, value: Any, kind: str) -> Any:
    """A parameter's value as a component of that type gets it."""
    if kind == "STRING":
        return value if isinstance(value, str) else json.dumps(value)
    found = {bool: "BOOLEAN", int: "NUMBER", float: "NUMBER", list: "LIST", dict: "STRUCT"}.get(type(value), "STRING")
    if not (kind.startswith(found) or (found, kind) == ("STRUCT", "TASK_FINAL_STATUS")):
        raise TaskFailed(f'input parameter "{name}" type mismatch: expect {kind}, got {found}')
    return value


def _selected(selector: str, value: Any) -> Any:
    """The one kind of expression that the compiler writes for an item of a loop."""
    (key,) = re.fullmatch(r'parseJson\(string_value\)\["(.+)"\]', selector).groups()  # type: ignore[union-attr]
    return (json.loads(value) if isinstance(value, str) else value)[key]


def _holds(condition: str, parameters: Mapping[str, Any]) -> bool:
    """The one kind of condition that is needed here."""
    name, word = re.fullmatch(r"inputs\.parameter_values\['(.+)'\] == (true|false)", condition).groups()  # type: ignore[union-attr]
    return bool(parameters[name] is (word == "true"))


def _fits(argument: str, content: Any) -> None:
    size = len(json.dumps(content, ensure_ascii=False).encode())
    if size >= ARGUMENT:
        raise TaskFailed(f"{argument}: argument list too long: {size} bytes")
