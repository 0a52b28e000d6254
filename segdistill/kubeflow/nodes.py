"""A stage on several nodes: a TrainJob that reads and writes on a volume, in the place of this pod."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdistill import environment
from segdistill.config import parse
from segdistill.execution import context
from segdistill.files import COMPLETED, disk_errors
from segdistill.kubeflow import trainjob_run
from segdistill.kubeflow.shared_volume import OUTPUTS, bring_back, copy_input
from segdistill.kubeflow.trainjob import LAUNCH, TrainJob, job_name

if TYPE_CHECKING:
    from segdistill.kubeflow.tasks import Task


def run_on_nodes(task: "Task", module: str, template: Mapping[str, Any], processes: int) -> None:
    """Has the task run as a TrainJob, and brings its outputs here.

    An attempt that is lost after the job's end leaves the outputs on the volume, and the next one takes them.

    Args:
        task: what to run.
        module: runs one process of it, given a file that describes the task.
        template: the fields of the job that the pipeline fixed when it was compiled.
        processes: on each node.
    """
    run, volume = context().pipeline_run, Path(template["volume"]["path"])
    name = job_name(run, task.label, task.params + task.plan)
    folder = volume / OUTPUTS / name
    inputs = {key: copy_input(Path(str(task.paths[key])), volume) for key in task.stage.inputs if key in task.paths}
    outputs = {key: folder / key for key in task.stage.outputs}
    if not all((place / COMPLETED).is_file() for place in outputs.values()):
        with disk_errors(volume):
            folder.mkdir(parents=True, exist_ok=True)
            there = replace(task, paths={key: str(path) for key, path in (inputs | outputs).items()})
            (folder / "task.json").write_text(json.dumps(asdict(there)))
        own = {
            "name": name,
            "command": [*LAUNCH, module],
            "args": [str(folder / "task.json")],
            "processes": processes,
            "env": {**template.get("env", {}), **environment.injected(), "SEGDISTILL_PIPELINE_RUN": run},
        }
        if task.accelerators:  # without any: the CPU
            own |= {"accelerator": task.accelerator, "accelerators": task.accelerators}
        trainjob_run.run(parse(TrainJob, {**template, **own}, "SEGDISTILL_TRAINJOB"))
    for key, place in outputs.items():
        bring_back(place, Path(str(task.paths[key])))
