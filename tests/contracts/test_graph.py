"""The stage table, dvc.yaml, the components and the compiled pipeline name one and the same graph."""

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from segdistill.config import read_yaml
from segdistill.stages import BY_NAME, JOB, STAGES, Stage, jobs

ROOT = Path(__file__).resolve().parents[2]
DVC: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
every_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)


def as_template(text: str) -> str:
    """A path or key of dvc.yaml, written as in the table."""
    return re.sub(r"\$\{item\.(\w+)\}", r"{\1}", text)


def names(entries: list[Any]) -> set[str]:
    return {as_template(name) for entry in entries for name in ([entry] if isinstance(entry, str) else entry)}


def dependencies(stage: Stage) -> tuple[set[str], set[str]]:
    """What dvc.yaml says that a stage depends on: (code, data)."""
    found = names(DVC[stage.name]["deps"])
    code = {name for name in found if name.startswith("segdistill/")}
    return code, found - code


# dvc.yaml


def test_dvc_has_the_stages_of_the_table_in_its_order() -> None:
    assert list(DVC) == [stage.name for stage in STAGES]


@every_stage
def test_dvc_watches_the_parameters_of_the_table(stage: Stage) -> None:
    assert [as_template(key) for key in DVC[stage.name]["params"]] == list(stage.params)


@every_stage
def test_dvc_tracks_the_inputs_of_the_table_and_no_others(stage: Stage) -> None:
    # An input that has one path a job is covered by the folder of them all.
    expected = {path.removesuffix("/{job}") for path in stage.inputs.values()}
    _, data = dependencies(stage)
    covered = {path for path in expected if any(path == one or path.startswith(f"{one}/") for one in data)}
    assert covered == expected
    assert data <= expected


@every_stage
def test_dvc_keeps_the_outputs_of_the_table(stage: Stage) -> None:
    entry = DVC[stage.name]
    assert names(entry["outs"]) == set(stage.outputs.values())
    assert names(entry.get("metrics", [])) == set(stage.metrics.values())
    for metric in entry.get("metrics", []):
        assert all(options == {"cache": False} for options in metric.values()), "a metric is kept in git"


@every_stage
def test_dvc_calls_the_stage_by_our_command_line(stage: Stage) -> None:
    from segdistill.__main__ import parser

    command = as_template(DVC[stage.name]["cmd"]).format(experiment="kd", seed=7).split()
    assert command[:3] == ["python", "-m", "segdistill"]
    given = parser().parse_args(command[3:])
    assert given.command == stage.name
    assert (getattr(given, "experiment", None), getattr(given, "seed", None)) == (
        ("kd", 7) if stage.per_job else (None, None)
    )
    assert not [key for key, value in vars(given).items() if key.startswith("path_") and value], "other paths"


@every_stage
def test_dvc_has_the_matrix_of_run_and_seeds_where_a_stage_runs_once_per_job(stage: Stage) -> None:
    expected = {"experiment": "${run}", "seed": "${seeds}"} if stage.per_job else None
    assert DVC[stage.name].get("matrix") == expected


@every_stage
def test_dvc_depends_on_code_that_exists_and_that_the_stage_imports(stage: Stage) -> None:
    code, _ = dependencies(stage)
    own = f"segdistill.stages.{stage.module}"
    modules, _ = imported(own)
    files = {file_of(module) for module in modules}
    assert file_of(own) in {ROOT / name for name in code}
    for name in code:
        path = ROOT / name
        assert path.exists(), name
        assert any(path == file or path in file.parents for file in files), f"{stage.name} does not import {name}"


# Components


def read_component(stage: Stage) -> Any:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import components

    assert sorted(components.__all__) == sorted(BY_NAME)
    return getattr(components, stage.name)


@every_stage
def test_a_component_takes_and_gives_what_the_table_says(stage: Stage) -> None:
    component = read_component(stage)
    spec = component.component_spec
    parameters = {"params": "String"} | ({"experiment": "String", "seed": "Integer"} if stage.per_job else {})
    found = {name: item.type for name, item in spec.inputs.items() if name not in stage.inputs}
    assert found == parameters
    artifacts = {name: item for name, item in spec.inputs.items() if name in stage.inputs}
    assert set(artifacts) == set(stage.inputs)
    for name, item in artifacts.items():
        assert item.is_artifact_list == stage.inputs[name].endswith("{job}"), name
    assert set(spec.outputs) == {*stage.outputs, *stage.metrics}


@every_stage
def test_a_component_runs_in_the_image_of_its_stage(stage: Stage) -> None:
    image = read_component(stage).component_spec.implementation.container.image
    assert image.rpartition("/")[2].startswith(f"segdistill-{stage.image}")


@every_stage
def test_a_component_calls_the_library_once_for_its_stage_with_every_path(stage: Stage) -> None:
    tree = ast.parse(inspect.getsource(read_component(stage).python_func))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    (call,) = calls
    assert ast.unparse(call.func) == "run_component"
    assert ast.literal_eval(call.args[0]) == stage.name
    (paths,) = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    given = {ast.literal_eval(key): ast.unparse(value) for key, value in zip(paths.keys, paths.values, strict=True)}
    expected = {name: f"{name}.path" for name in (*stage.inputs, *stage.outputs, *stage.metrics)}
    lists = {name for name, path in stage.inputs.items() if path.endswith("{job}")}
    assert given == expected | {name: f"[folder.path for folder in {name}]" for name in lists}
    passed = {item.arg: ast.unparse(item.value) for item in call.keywords if item.arg != "paths"}
    assert passed == ({"experiment": "experiment", "seed": "seed"} if stage.per_job else {})


# The compiled pipeline

LOOP = "for-loop-1"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The first document of the compiled pipeline."""
    sys.path.insert(0, str(ROOT))
    from pipelines.__main__ import compile_to

    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compile_to(path, read_yaml(ROOT / "params.yaml"))
    return next(iter(yaml.safe_load_all(path.read_text())))


def tasks_of(compiled: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every task by the name of its stage, with the name of the graph it is in."""
    graphs = {"root": compiled["root"], LOOP: compiled["components"][f"comp-{LOOP}"]}
    return {
        name.replace("-", "_"): (graph, task)
        for graph, content in graphs.items()
        for name, task in content["dag"]["tasks"].items()
    }


def origin(compiled: dict[str, Any], graph: str, selector: dict[str, Any]) -> tuple[str, str]:
    """Follows an input artifact through the loop's border to (task, name of its output)."""
    if "componentInputArtifact" in selector:
        outer = compiled["root"]["dag"]["tasks"][graph]["inputs"]["artifacts"][selector["componentInputArtifact"]]
        return origin(compiled, "root", outer)
    task, key = selector["taskOutputArtifact"]["producerTask"], selector["taskOutputArtifact"]["outputArtifactKey"]
    if task == LOOP:
        selectors = compiled["components"][f"comp-{LOOP}"]["dag"]["outputs"]["artifacts"][key]["artifactSelectors"]
        (inner,) = selectors
        task, key = inner["producerSubtask"], inner["outputArtifactKey"]
    return task.replace("-", "_"), key


def test_the_pipeline_has_the_stages_of_the_table_the_jobs_in_a_loop(compiled: dict[str, Any]) -> None:
    found = tasks_of(compiled)
    assert set(found) == {*BY_NAME, "importer", LOOP.replace("-", "_")}
    assert {name for name, (graph, _) in found.items() if graph == LOOP} == {s.name for s in STAGES if s.per_job}


@every_stage
def test_the_pipeline_joins_outputs_to_inputs_as_the_table_does(stage: Stage, compiled: dict[str, Any]) -> None:
    makers = {path: (one.name, name) for one in STAGES for name, path in (one.outputs | one.metrics).items()}
    makers["data"] = ("importer", "artifact")
    graph, task = tasks_of(compiled)[stage.name]
    found = {name: origin(compiled, graph, selector) for name, selector in task["inputs"]["artifacts"].items()}
    assert found == {name: makers[path.replace("{job}", JOB)] for name, path in stage.inputs.items()}


@every_stage
def test_the_pipeline_gives_a_stage_the_sections_that_the_table_declares(
    stage: Stage, compiled: dict[str, Any]
) -> None:
    inputs = compiled["root"]["inputDefinitions"]["parameters"]
    graph, task = tasks_of(compiled)[stage.name]
    given = task["inputs"]["parameters"]["params"]
    source = given["componentInputParameter"].removeprefix("pipelinechannel--")
    if stage.name == "distill":
        assert source == "jobs-loop-item" and given["parameterExpressionSelector"].endswith('["params"]')
        values = [(job["experiment"], job["params"]) for job in inputs["jobs"]["defaultValue"]]
    else:
        assert source == f"{stage.params[0]}_params", graph
        values = [("", inputs[source]["defaultValue"])]
    for experiment, value in values:
        assert list(json.loads(value)) == [key.format(experiment=experiment) for key in stage.params]


def test_the_pipeline_runs_the_jobs_of_params_yaml(compiled: dict[str, Any]) -> None:
    params = read_yaml(ROOT / "params.yaml")
    found = compiled["root"]["inputDefinitions"]["parameters"]["jobs"]["defaultValue"]
    assert [(job["experiment"], job["seed"]) for job in found] == [(job.experiment, job.seed) for job in jobs(params)]
    for job in found:
        settings = json.loads(job["params"])
        assert settings["distill"] == params["distill"]
        assert settings[f"experiments.{job['experiment']}"] == params["experiments"][job["experiment"]]


# The data image


def test_the_data_image_has_what_its_stages_import_and_no_torch() -> None:
    text = (ROOT / "dockerfiles/data.Dockerfile").read_text()
    (line,) = [line.strip() for line in text.splitlines() if line.strip().startswith("great-expectations ")]
    installed = set(line.split())
    locked = {entry.partition("==")[0] for entry in (ROOT / "requirements.lock").read_text().split()}
    starts = [f"segdistill.stages.{stage.module}" for stage in STAGES if stage.image == "data"]
    needed = {"kfp"}
    for start in (*starts, "segdistill.config", "segdistill.adapters.mlflow_tracking"):
        needed |= imported(start)[1]
    packages = {{"PIL": "pillow", "yaml": "pyyaml"}.get(name, name.replace("_", "-")) for name in needed}
    assert packages <= installed <= locked
    assert not {"torch", "torchvision", "timm", "segmentation-models-pytorch"} & installed


# What a module imports, also inside functions, without importing it


def file_of(module: str) -> Path | None:
    base = ROOT / module.replace(".", "/")
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def statements(node: ast.AST) -> Iterator[tuple[str, str | None]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, None) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((str(child.module), alias.name) for alias in child.names)
        elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from statements(child)


def imported(start: str) -> tuple[set[str], set[str]]:
    """The modules of ours, and the packages of others, that a module leads to."""
    ours: set[str] = set()
    others: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        path = file_of(module)
        if module in ours or path is None:
            continue
        ours.add(module)
        for name, member in statements(ast.parse(path.read_text())):
            if name.partition(".")[0] == "segdistill":
                parents = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
                waiting += [*parents, name, f"{name}.{member}"]
            elif name.partition(".")[0] not in sys.stdlib_module_names:
                others.add(name.partition(".")[0])
    return ours, others
