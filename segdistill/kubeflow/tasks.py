"""Stages as tasks of Kubeflow Pipelines: what the body of a component calls.

A task reads the marks of its inputs (``marks.py``), which carry the version of the data set from task to task, runs its
stage in this process, in several (``processes.py``) or on other nodes (``nodes.py``), and marks its outputs.

What is not a matter of the pipeline, the environment says: ``environment.py``.
"""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from segdistill import environment
from segdistill.errors import UserError, brief, exit_codes
from segdistill.execution import (
    TRACKING,
    context,
    finish_pipeline,
    label,
    open_tracker,
    quiet_libraries,
    run_stage,
    stage_module,
)
from segdistill.files import COMPLETED, parse_json, read_json
from segdistill.kubeflow.marks import content_of, in_turn, point_to, read_mark, write_mark
from segdistill.kubeflow.processes import run_together
from segdistill.kubeflow.shared_volume import bring_back
from segdistill.report.highlights import Highlights
from segdistill.stages import BY_NAME, Stage

logger = logging.getLogger(__name__)

# How the pipeline ended, in the words that released servers take from ML Metadata, and in those of KFP's local runner.
ENDS = {"COMPLETE": "FINISHED", "CACHED": "FINISHED", "SUCCEEDED": "FINISHED", "FAILED": "FAILED", "CANCELED": "KILLED"}

Paths = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class Task:
    """One stage with what KFP gave it."""

    name: str
    params: str  # the sections of params.yaml that the stage declares, as JSON
    paths: Paths  # inputs and outputs; the folders of all cohorts may come in any order
    plan: str = ""  # the content of the file that a stage reads as its input ``plan``
    cohort: str = ""  # of a stage that runs once per cohort
    accelerator: str = ""  # the resource's name, such as nvidia.com/gpu
    accelerators: int = 0  # how many of it this machine has for the task

    @property
    def stage(self) -> Stage:
        """The stage's line in the table."""
        return BY_NAME[self.name]

    @property
    def label(self) -> str:
        """``distill-s0``: what is kept of it on a volume is called so."""
        return label(self.stage, self.cohort or None)


@dataclass(frozen=True)
class Places:
    """Where a task's inputs and outputs really are, and the version of the data that they come from."""

    chosen: Mapping[str, Any]  # the parameters
    paths: Mapping[str, Path | list[Path]]
    data: Mapping[str, str] = field(default_factory=dict)  # data_md5 and data_commit
    shared: Mapping[str, Path] = field(default_factory=dict)  # outputs on a volume, by name


def run_component(
    name: str,
    params: str = "{}",
    *,
    paths: Paths,
    shown: Mapping[str, Any] | None = None,
    plan: str = "",
    cohort: str = "",
    accelerator: str = "",
    accelerators: str = "0",
) -> None:
    """Runs one stage as a task; ends the process as the command line does.

    Args:
        name: the stage.
        params: its ``sections`` of params.yaml as JSON.
        paths: its inputs and outputs, but for a plan; the folders of all cohorts may come in any order.
        shown: KFP's artifacts for its highlights, by name: Metrics for ``scores``, ClassificationMetrics for
            ``confusion``, HTML for ``page``, Markdown for ``summary``.
        plan: the content of the plan of a stage that trains.
        cohort: of a stage that runs once per cohort.
        accelerator: the resource's name, such as nvidia.com/gpu, of a stage that trains or evaluates.
        accelerators: how many of it the task has, in digits, as KFP gives them to the pod.
    """
    quiet_libraries()
    with exit_codes(f"segdistill {name}"):
        task = Task(name, params, paths, plan, cohort, accelerator, _count(accelerator, accelerators))
        places, count = _places(task), environment.processes(default=max(1, task.accelerators))
        nodes = environment.trainjob()
        with in_turn(places.shared.values(), f"segdistill {name}"):
            if places.shared and all(folder.is_dir() for folder in places.shared.values()):
                logger.info("%s: is on the volume already", ", ".join(map(str, places.shared.values())))
                _complete(task, places)
            elif nodes is not None:
                from segdistill.kubeflow.nodes import run_on_nodes

                run_on_nodes(task, __name__, nodes, count)
            else:
                _require_accelerators(task)
                if count > 1:
                    run_together(name, asdict(task), __name__, count)
                else:
                    _execute(task, places)
        if task.stage.shows:
            _show(stage_module(task.stage).highlights(places.paths), shown or {})


def run_fetch(repository: str, revision: str, *, data: str) -> dict[str, str]:
    """Brings a version of the data set as a task; ends the process as the command line does.

    Args:
        repository: a git repository's address.
        revision: a branch, a tag or a commit; a cache is right about a commit only.
        data: the folder to make.

    Returns:
        ``data_md5`` and ``data_commit``, which the folder's mark has too.
    """
    quiet_libraries()
    with exit_codes("segdistill fetch"):
        from segdistill.adapters.dvc_remote import fetch
        from segdistill.adapters.dvc_version import find

        output, volume = Path(data), environment.shared_volume()
        (output / COMPLETED).unlink(missing_ok=True)  # of an earlier attempt
        where = volume / "data" / find(repository, revision).md5 if volume else output
        with in_turn([where] if volume else [], "segdistill fetch"):
            version = fetch(repository, revision, where)
        facts = {"data_md5": version.md5, "data_commit": version.commit}
        if volume:
            point_to(output, where)
        write_mark(output, {"stage": "fetch", "cohort": None, **facts})
    return facts


def run_finish(state: str) -> None:
    """Ends the pipeline's run in MLflow with the state that KFP gave the pipeline.

    Released servers leave a graph RUNNING that has long ended well (kubeflow/pipelines#13321). So a state that is no
    end says nothing, and the run ends as its stages left it.
    """
    quiet_libraries()
    with exit_codes("segdistill finish"):
        finish_pipeline(environment.tracker(), context(), ENDS.get(state))


# Where things are


def _places(task: Task) -> Places:
    """Reads the marks of all inputs.

    Raises:
        UserError: parameters that are not the stage's, or an input that is not complete.
    """
    stage, chosen = task.stage, _read_sections(task)
    paths: dict[str, Path | list[Path]] = {}
    data: dict[str, str] = {}
    for name, given in task.paths.items():
        if name not in stage.inputs:
            paths[name] = Path(str(given))
            continue
        folders = [Path(given)] if isinstance(given, str) else list(map(Path, given))
        marks = [read_mark(stage, folder) for folder in folders]
        data = next(({key: mark[key] for key in mark if key.startswith("data_")} for mark in marks), {}) or data
        contents = [content_of(folder) for folder in folders]
        paths[name] = contents[0] if isinstance(given, str) else contents
    shared = _on_volume(task, chosen, data)
    return Places(chosen, {**paths, **shared}, data, shared)


def _read_sections(task: Task) -> dict[str, Any]:
    expected = task.stage.params
    chosen = parse_json(task.params, f"params of {task.name}")
    if not isinstance(chosen, dict) or sorted(chosen) != sorted(expected):
        given = ", ".join(map(brief, chosen)) if isinstance(chosen, dict) else type(chosen).__name__
        raise UserError(f"params of {task.name}: expected the sections {', '.join(expected)}, found {given}")
    return chosen


def _on_volume(task: Task, chosen: Mapping[str, Any], data: Mapping[str, str]) -> dict[str, Path]:
    """Where large outputs go if there is a volume for them: a folder that every run with the same cause shares."""
    volume = environment.shared_volume()
    if volume is None or not task.stage.large:
        return {}
    cause = [task.name, dict(chosen), dict(data), context().git_commit]
    name = f"{task.name}-{sha256(json.dumps(cause, sort_keys=True).encode()).hexdigest()[:16]}"
    return {output: volume / name / output for output in task.stage.large}


def _complete(task: Task, places: Places) -> None:
    facts = {"stage": task.name, "cohort": task.cohort or None, **places.data}
    for output in task.stage.outputs:
        folder = Path(str(task.paths[output]))
        if output in places.shared:
            point_to(folder, places.shared[output])
        write_mark(folder, facts)


# Running


def _execute(task: Task, places: Places) -> None:
    """Runs the stage in this process, which may be one of several; the first of them completes the task.

    A pod that is tried again finds nothing beside its output. A volume that outlives it may hold the checkpoints, what
    the tracker was not sent yet, and of a cohort the jobs that are done: they are kept by the next attempt.
    """
    started, here = time.time(), context()
    here = replace(here, data_md5=places.data.get("data_md5", here.data_md5))
    volume, kept, work, tracking = environment.work_volume(), {}, None, TRACKING
    if volume:
        own = volume / here.pipeline_run / task.label
        work, tracking = own / "checkpoints", volume / "tracking" / task.label
        kept = {name: own / name for name in task.stage.outputs} if task.stage.per_cohort else {}
    tracker = open_tracker(environment.tracker(), here, task.stage, task.cohort or None, tracking)
    with tempfile.TemporaryDirectory() as folder:
        planned = {}
        if "plan" in task.stage.inputs:
            planned["plan"] = Path(folder) / f"{task.cohort or 'teacher'}.json"
            planned["plan"].write_text(task.plan)
        run_stage(
            task.stage,
            places.chosen,
            paths={**places.paths, **planned, **kept},
            cohort=task.cohort or None,
            tracker=tracker,
            started=started,
            work=work,
            device="cuda" if task.accelerators else "auto",
        )
    if not environment.rank():
        for name, place in kept.items():
            bring_back(place, Path(str(task.paths[name])))
        _complete(task, places)


def _count(accelerator: str, accelerators: str) -> int:
    """How many accelerators the task has."""
    if not accelerators.isdecimal():
        raise UserError(f"accelerators: '{accelerators}' is not a number of them; expected 0 or more")
    if int(accelerators) and not accelerator:
        raise UserError(f"accelerator: missing; name the resource of which the task has {accelerators}")
    return int(accelerators)


def _require_accelerators(task: Task) -> None:
    """A pod may have its GPUs and no driver that this torch can use: days on the CPU are no substitute.

    Raises:
        UserError: torch sees fewer accelerators than the task was given.
    """
    if task.accelerators and task.stage.on_device:
        from segdistill.engine.device import require_gpus

        require_gpus(task.accelerators, f"accelerators: {task.accelerators} of {task.accelerator} were asked for")


def _show(found: Highlights, shown: Mapping[str, Any]) -> None:
    """Hands the highlights to KFP's artifacts; duck-typed, as this package does not import kfp."""
    for name, artifact in shown.items():
        value = getattr(found, name)
        if name == "scores":
            for key, number in value.items():
                artifact.log_metric(key, number)
        elif name == "confusion":
            artifact.log_confusion_matrix(list(value[0]), [list(row) for row in value[1]])
        else:
            Path(artifact.path).write_text(value, encoding="utf-8")


def main(path: str) -> None:
    """One of the processes of a task."""
    task = Task(**read_json(Path(path)))
    quiet_libraries()
    with exit_codes(f"segdistill {task.name}"):
        _require_accelerators(task)
        _execute(task, _places(task))


if __name__ == "__main__":
    main(sys.argv[1])
