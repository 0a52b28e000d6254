"""A stage on several nodes: a TrainJob that reads and writes on a volume, in the place of this pod."""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdistill import environment
from segdistill.execution import context
from segdistill.files import COMPLETED, disk_errors
from segdistill.kubeflow import trainjob
from segdistill.kubeflow.shared_volume import OUTPUTS, bring_back, copy_input

if TYPE_CHECKING:
    from segdistill.kubeflow.tasks import Task

# JobSet refuses a job whose pods' names would be longer than 63: <name>-node-0-<999 at most>-<5 random characters>.
LONGEST_NAME = 63 - len("-node-0-999-abcde")
# Each node runs this and the arguments of a module. The variables of Trainer's controller (PET_*) say the rest: torch
# reads them where the command line does not.
LAUNCH = ("python", "-m", "torch.distributed.run", "-m")


def run_on_nodes(task: "Task", module: str, template: Mapping[str, Any], processes: int) -> None:
    """Has the task run as a TrainJob, and brings its outputs here.

    An attempt that is lost after the job's end leaves the outputs on the volume, and the next one takes them.

    Args:
        task: what to run.
        module: runs one process of it, given a file that describes the task.
        template: what the pipeline fixed when it was compiled: the path of the volume, and the job's manifest.
        processes: on each node.
    """
    run, volume = context().pipeline_run, Path(template["volume"])
    name = job_name(run, task.label, task.params + task.plan)
    folder = volume / OUTPUTS / name
    inputs = {key: copy_input(Path(str(task.paths[key])), volume) for key in task.stage.inputs if key in task.paths}
    outputs = {key: folder / key for key in task.stage.outputs}
    if not all((place / COMPLETED).is_file() for place in outputs.values()):
        with disk_errors(volume):
            folder.mkdir(parents=True, exist_ok=True)
            there = replace(task, paths={key: str(path) for key, path in (inputs | outputs).items()})
            (folder / "task.json").write_text(json.dumps(asdict(there)))
        trainjob.run(_job(template["manifest"], task, name, [*LAUNCH, module], str(folder / "task.json"), processes))
    for key, place in outputs.items():
        bring_back(place, Path(str(task.paths[key])))


def _job(
    manifest: Mapping[str, Any], task: "Task", name: str, command: list[str], file: str, processes: int
) -> dict[str, Any]:
    """The manifest with what is the task's own."""
    job = copy.deepcopy(dict(manifest))
    job["metadata"]["name"] = name
    trainer = job["spec"]["trainer"]
    trainer |= {"command": command, "args": [file], "numProcPerNode": processes}
    own = environment.injected() | {"SEGDISTILL_PIPELINE_RUN": context().pipeline_run}
    trainer["env"] += [{"name": variable, "value": value} for variable, value in own.items()]
    if task.accelerators:  # without any: the CPU
        for asked in trainer["resourcesPerNode"].values():
            asked[task.accelerator] = str(task.accelerators)
    return job


def job_name(pipeline_run: str, label: str, parameters: str) -> str:
    """A name under which every attempt of one task finds the same job, and no other task does.

    Args:
        pipeline_run: the orchestrator's run.
        label: the stage, and its cohort if it has one.
        parameters: all else that makes it another task.
    """
    fingerprint = sha256("\0".join((pipeline_run, label, parameters)).encode()).hexdigest()[:12]
    readable = re.sub("[^a-z0-9]+", "-", f"segdistill-{label}".lower())
    return f"{readable[: LONGEST_NAME - len(fingerprint) - 1].strip('-')}-{fingerprint}"
