"""How large a matrix may be: what Kubeflow Pipelines has to fit into one argument of a process.

A run's first pod is given all parameters of the run as one argument, ``--runtime_config``, and every task all its
inputs as one, ``--executor_input``. Linux starts no process with an argument of more than 128 KiB. The run would end
there, and where ``compare`` is the task that is handed too much, it would end after everything is trained.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from segdistill.errors import UserError

ARGUMENT = 128 * 1024  # bytes, with the zero that ends it
# One artifact among a task's inputs: its address, and what the server says of its store; typically less than 600 bytes.
ARTIFACT = 768
# What else stands in such an argument: names, the artifacts that are not one a cohort, the version of the data set.
REST = 12 * ARTIFACT


def check_matrix(parameters: Mapping[str, Any]) -> None:
    """Refuses a matrix of more jobs than can be handed over.

    Args:
        parameters: those of the pipeline, all that come from params.yaml.

    Raises:
        UserError: says how many jobs would fit.
    """
    cohorts = parameters["cohorts"]
    others = {name: value for name, value in parameters.items() if name != "cohorts"}
    # ``compare`` gets two artifacts a cohort: its students and their evaluations. A cohort's own tasks get less.
    fitting = min(
        _fitting([_size(cohort) for cohort in cohorts], _size(others)),
        _fitting([2 * ARTIFACT] * len(cohorts), _size(parameters["compare_params"])),
    )
    if fitting < len(cohorts):
        counts = [len(json.loads(cohort["plan"])["jobs"]) for cohort in cohorts]
        raise UserError(
            f"run, seeds: {sum(counts)} jobs are more than one run of Kubeflow Pipelines can hand to a task, in an "
            f"argument of {ARGUMENT // 1024} KiB; in cohorts as these {sum(counts[:fitting])} would fit: name fewer "
            "experiments or seeds, or raise jobs_per_gpu of cluster.yaml"
        )


def check_tuning(parameters: Mapping[str, Any]) -> None:
    """Refuses a params file that is too long to be handed over.

    Raises:
        UserError: says how long it is.
    """
    if (size := _size(parameters)) > ARGUMENT - REST:
        raise UserError(
            f"--params: with it a run of Kubeflow Pipelines has {size / 1024:.0f} KiB of parameters, and can hand no "
            f"more than {(ARGUMENT - REST) // 1024} KiB to a task; take out the experiments that are not tuned"
        )


def _fitting(sizes: Sequence[int], others: int) -> int:
    """How many of the first cohorts fit beside the other content; sizes in bytes."""
    left, count = ARGUMENT - REST - others, 0
    for size in sizes:
        left -= size
        if left < 0:
            break
        count += 1
    return count


def _size(content: Any) -> int:
    """Bytes of JSON, a comma and a blank after it."""
    return len(json.dumps(content, ensure_ascii=False).encode()) + 2
