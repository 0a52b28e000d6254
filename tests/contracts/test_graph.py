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
from compiled import Graphs

from segdistill.config import read_yaml, to_dict
from segdistill.identity import DECISIVE
from segdistill.plan import jobs, teacher_plan
from segdistill.stages import STAGES, TUNING, Stage

ROOT = Path(__file__).resolve().parents[2]

DVC: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
TASKS = [stage for stage in STAGES if stage.image]  # on a cluster
every_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
every_task = pytest.mark.parametrize("stage", TASKS, ids=lambda stage: stage.name)
every_component = pytest.mark.parametrize("stage", [*TASKS, *TUNING], ids=lambda stage: stage.name)


def as_template(text: str) -> str:
    """A path of dvc.yaml, written as in the table."""
    return text.replace("s${item.seed}", "{cohort}")


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


def test_the_lock_has_no_stage_that_is_gone() -> None:  # DVC never drops one, and parses all of them at each stage
    seeds = read_yaml(ROOT / "params.yaml")["seeds"]
    expected = {f"{name}@{seed}" for name, stage in DVC.items() if "matrix" in stage for seed in seeds}
    expected |= {name for name, stage in DVC.items() if "matrix" not in stage}
    assert set(yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]) == expected


@every_stage
def test_dvc_watches_the_parameters_of_the_table(stage: Stage) -> None:
    assert DVC[stage.name].get("params", []) == list(stage.params)


@every_stage
def test_dvc_tracks_the_inputs_of_the_table_and_no_others(stage: Stage) -> None:
    # An input that has one path a cohort is covered by the folder of them all.
    expected = {path.removesuffix("/{cohort}") if name in stage.lists else path for name, path in stage.inputs.items()}
    _, data = dependencies(stage)
    # What need not be there: params.yaml may name a folder of it.
    data -= {"plan": {"teachers"}, "evaluate_teacher": {"elsewhere"}, "evaluate": {"elsewhere"}}.get(stage.name, set())
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

    # DVC writes a mapping as options (test_names.py).
    command = DVC[stage.name]["cmd"].replace("${item}", "--seed 7").split()
    assert command[:3] == ["python", "-m", "segdistill"]
    given = parser().parse_args(command[3:])
    assert given.command == stage.name
    assert getattr(given, "seed", None) == (7 if stage.per_cohort else None)
    assert not [key for key, value in vars(given).items() if key.startswith("path_") and value], "other paths"


@every_stage
def test_dvc_runs_a_stage_once_a_seed_where_it_runs_once_a_cohort(stage: Stage) -> None:
    assert DVC[stage.name].get("matrix") == ({"seed": "${seeds}"} if stage.per_cohort else None)


KEPT = {"train_teacher", "distill", "evaluate"}  # stages that keep what is there with the same identity


@every_stage
def test_dvc_leaves_the_outputs_of_a_stage_that_keeps_what_is_there(stage: Stage) -> None:
    kept = [entry for entry in DVC[stage.name]["outs"] if isinstance(entry, dict)]
    assert all(options == {"persist": True} for entry in kept for options in entry.values())
    assert bool(kept) == (stage.name in KEPT)


@every_stage
def test_dvc_depends_on_code_that_exists_and_that_the_stage_imports(stage: Stage) -> None:
    code, _ = dependencies(stage)
    own = f"segdistill.stages.{stage.module}"
    modules, _ = imported(own)
    files = {file_of(module) for module in modules}
    if "plan" in stage.inputs:
        assert not code, "the plan has the hash of the code that counts"
        return
    assert file_of(own) in {ROOT / name for name in code}
    # The plan also depends on the code of which it holds the hash.
    hashed = {path for room in DECISIVE for path in (f"segdistill/{room}", f"segdistill/{room}.py")}
    if stage.name == "plan":
        assert {path for path in hashed if (ROOT / path).exists()} <= code
        code -= hashed
    for name in code:
        path = ROOT / name
        assert path.exists(), name
        read = path.suffix in (".css", ".jinja")  # by a module that the next test looks for
        assert read or any(path == file or path in file.parents for file in files), (
            f"{stage.name} does not import {name}"
        )


# What checks and tells, and where: no output depends on it, or only through an input.
UNWATCHED = {
    "config", "engine/settings", "engine/tracker", "environment", "errors", "models/config", "patience", "plan",
    "report/highlights", "secrets", "stages/train_teacher",
}  # fmt: skip


@every_stage
def test_dvc_depends_on_all_code_that_decides_an_output_of_the_stage(stage: Stage) -> None:
    if "plan" in stage.inputs:
        return
    code, _ = dependencies(stage)
    watched = {ROOT / name for name in code}
    for module in imported(f"segdistill.stages.{stage.module}")[0]:
        file = file_of(module)
        assert file is not None
        name = file.relative_to(ROOT / "segdistill").with_suffix("").as_posix()
        if file.name != "__init__.py" and name not in UNWATCHED - {f"stages/{stage.module}"}:
            assert watched & {file, *file.parents}, f"{stage.name} leads to {name}, which dvc.yaml does not name"


# Components


SHOWN = {  # what a highlight is to KFP's pages
    "scores": "system.Metrics@0.0.1",
    "confusion": "system.ClassificationMetrics@0.0.1",
    "page": "system.HTML@0.0.1",
    "summary": "system.Markdown@0.0.1",
}


AROUND = {"fetch", "finish"}  # steps of the pipeline that are no stages
TRAINING = {"train_teacher", "evaluate_teacher", "distill", "evaluate", "tune"}  # the stages that run on accelerators


def read_component(stage: Stage) -> Any:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import components

    assert sorted(components.__all__) == sorted({*(stage.name for stage in (*TASKS, *TUNING)), *AROUND})
    return getattr(components, stage.name)


@every_component
def test_a_component_takes_and_gives_what_the_table_says(stage: Stage) -> None:
    component = read_component(stage)
    spec = component.component_spec
    names = ["params"] * bool(stage.params) + ["plan"] * ("plan" in stage.inputs) + ["cohort"] * stage.per_cohort
    names += ["accelerator", "accelerators"] * (stage.name in TRAINING)
    folders = set(stage.inputs) - {"plan"}
    assert {name: item.type for name, item in spec.inputs.items() if name not in folders} == dict.fromkeys(
        names, "String"
    )
    artifacts = {name: item for name, item in spec.inputs.items() if name in folders}
    assert set(artifacts) == folders
    for name, item in artifacts.items():
        assert item.is_artifact_list == (name in stage.lists), name
    shown = {name: SHOWN[name] for name in stage.shows}
    files = {name: item.type for name, item in spec.outputs.items() if name not in shown and name != "Output"}
    assert set(files) == {*stage.outputs, *stage.metrics}
    assert {name: item.type for name, item in spec.outputs.items() if name in shown} == shown
    assert "Output" not in spec.outputs, "what a stage found out is in the folders that it makes"


@every_component
def test_a_component_runs_in_the_image_of_its_stage(stage: Stage) -> None:
    image = read_component(stage).component_spec.implementation.container.image
    assert image.rpartition("/")[2].startswith(f"segdistill-{stage.image}")


@every_component
def test_a_component_calls_the_library_once_for_its_stage_with_every_path(stage: Stage) -> None:
    tree = ast.parse(inspect.getsource(read_component(stage).python_func))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    (call,) = calls
    assert ast.unparse(call.func) == "run_component"
    assert ast.literal_eval(call.args[0]) == stage.name
    tables = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    paths, *shown = [
        {ast.literal_eval(k): ast.unparse(v) for k, v in zip(t.keys, t.values, strict=True)} for t in tables
    ]
    assert shown == ([{name: name for name in stage.shows}] if stage.shows else [])
    folders = [name for name in stage.inputs if name != "plan"]
    expected = {name: f"{name}.path" for name in (*folders, *stage.outputs, *stage.metrics)}
    assert paths == expected | {name: f"[folder.path for folder in {name}]" for name in stage.lists}
    passed = {item.arg: ast.unparse(item.value) for item in call.keywords if item.arg not in ("paths", "shown")}
    own = ["plan"] * ("plan" in stage.inputs) + ["cohort"] * stage.per_cohort
    own += ["accelerator", "accelerators"] * (stage.name in TRAINING)
    assert passed == {name: name for name in own}


# The compiled pipeline


@pytest.fixture(scope="module")
def tuning_graphs() -> Graphs:
    path = ROOT / "tests/pipeline/golden/tuning.yaml"  # which test_kubeflow.py keeps true
    return Graphs(next(iter(yaml.safe_load_all(path.read_text()))))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    sys.path.insert(0, str(ROOT))
    from pipelines.__main__ import compile_to

    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compile_to(path, read_yaml(ROOT / "params.yaml"))
    return Graphs(next(iter(yaml.safe_load_all(path.read_text()))))


def task_name(stage: Stage) -> str:
    return stage.name.replace("_", "-")


def test_the_pipeline_has_the_stages_of_the_table_the_cohorts_in_a_loop(graphs: Graphs) -> None:
    assert set(graphs.leaves) == {task_name(stage) for stage in TASKS} | AROUND
    in_loop = {name for name in graphs.leaves if graphs.inside(name, graphs.loop)}
    assert in_loop == {task_name(stage) for stage in TASKS if stage.per_cohort}


def test_the_pipeline_that_tunes_has_the_stages_to_a_teacher_and_its_own(tuning_graphs: Graphs) -> None:
    graphs, before = tuning_graphs, {"validate", "prepare", "train-teacher"}
    assert set(graphs.leaves) == before | {task_name(stage) for stage in TUNING} | AROUND
    assert {name for name in graphs.leaves if graphs.inside(name, graphs.loop)} == {"tune"}
    plans = [graphs.tasks[task_name(stage)]["inputs"]["parameters"]["plan"] for stage in TUNING]
    found = {graphs.origin(task_name(stage), plan, "Parameter") for stage, plan in zip(TUNING, plans, strict=True)}
    assert found == {("root", "params_file")}


@every_component
def test_the_pipeline_joins_outputs_to_inputs_as_the_table_does(
    stage: Stage, graphs: Graphs, tuning_graphs: Graphs
) -> None:
    graphs = tuning_graphs if stage in TUNING else graphs
    every = (*TASKS, *TUNING)
    makers = {path: (task_name(one), name) for one in every for name, path in (one.outputs | one.metrics).items()}
    makers["data"] = ("fetch", "data")
    name = task_name(stage)
    inputs = graphs.tasks[name]["inputs"]["artifacts"]
    found = {key: graphs.origin(name, source, "Artifact") for key, source in inputs.items()}
    assert found == {key: makers[path] for key, path in stage.inputs.items() if key != "plan"}


@pytest.mark.parametrize("stage", [stage for stage in TASKS if stage.params], ids=lambda stage: stage.name)
def test_the_pipeline_gives_a_stage_the_sections_that_the_table_declares(stage: Stage, graphs: Graphs) -> None:
    defaults = graphs.spec["root"]["inputDefinitions"]["parameters"]
    given = graphs.tasks[task_name(stage)]["inputs"]["parameters"]["params"]
    assert graphs.origin(task_name(stage), given, "Parameter") == ("root", f"{stage.params[0]}_params")
    assert list(json.loads(defaults[f"{stage.params[0]}_params"]["defaultValue"])) == list(stage.params)


def test_the_pipeline_gives_each_training_its_plan(graphs: Graphs) -> None:
    params = read_yaml(ROOT / "params.yaml")
    defaults = graphs.spec["root"]["inputDefinitions"]["parameters"]
    given = graphs.tasks["train-teacher"]["inputs"]["parameters"]["plan"]
    assert graphs.origin("train-teacher", given, "Parameter") == ("root", "teacher_plan")
    expected = to_dict(teacher_plan(params["train_teacher"])) | {"code": ""}  # which is the image's
    assert json.loads(defaults["teacher_plan"]["defaultValue"]) == expected
    given = graphs.tasks["distill"]["inputs"]["parameters"]["plan"]
    assert graphs.origin("distill", given, "Parameter") == (graphs.loop, "pipelinechannel--cohorts-loop-item")
    assert given["parameterExpressionSelector"].endswith('["plan"]')
    planned = {item["cohort"]: json.loads(item["plan"]) for item in defaults["cohorts"]["defaultValue"]}
    members = [job for plan in planned.values() for job in plan["jobs"]]
    assert sorted((job["experiment"], job["seed"]) for job in members) == sorted(
        (job.experiment, job.seed) for job in jobs(params["run"], params["seeds"])
    )


def test_compare_and_register_stand_beside_the_loop_and_the_run_is_always_closed(graphs: Graphs) -> None:
    assert {graphs.graph_of[name] for name in ("compare", "register", graphs.loop)} == {"exit-handler-1"}
    assert not [name for name, task in graphs.tasks.items() if "condition" in task.get("triggerPolicy", {})]
    closing = graphs.tasks["finish"]
    assert closing["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    (everything_else,) = closing["dependentTasks"]
    assert all(graphs.inside(name, everything_else) for name in set(graphs.leaves) - {"finish"})


# The data image


def test_the_data_image_has_what_its_stages_import_and_no_torch() -> None:
    text = (ROOT / "dockerfiles/data.Dockerfile").read_text()
    (line,) = [line for line in text.splitlines() if " great-expectations " in line]
    installed = set(line.replace("\\", "").split())
    locked = {entry.partition("==")[0] for entry in (ROOT / "requirements.lock").read_text().split()}
    starts = [f"segdistill.stages.{stage.module}" for stage in STAGES if stage.image == "data"]
    needed = {"kfp"}
    adapters = ("mlflow_tracking", "dvc_remote", "s3")
    for start in (*starts, "segdistill.config", *(f"segdistill.adapters.{name}" for name in adapters)):
        needed |= imported(start)[1]
    packages_of = {"PIL": "pillow", "yaml": "pyyaml", "botocore": "boto3", "pydantic_core": "pydantic"}
    packages = {packages_of.get(name, name.replace("_", "-")) for name in needed}
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
