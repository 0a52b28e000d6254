"""A stage from the command line, with the whole of params.yaml checked before it."""

import argparse
import time

from segdistill import execution
from segdistill.config import Name, Seed, parse, read_yaml
from segdistill.errors import UserError, nearest
from segdistill.stages import BY_NAME, Job


def command(arguments: argparse.Namespace) -> None:
    """Runs the stage that the command names."""
    stage, started = BY_NAME[arguments.command], time.time()
    params = read_yaml(arguments.params)
    # What begins a run builds every network in outline; later stages build their own at once.
    execution.check_params(params, networks=stage.name in ("validate", "prepare", "train_teacher"), here=True)
    seed = parse(Seed, arguments.seed, "--seed") if stage.per_job else 0
    job = Job(parse(Name, arguments.experiment, "--experiment"), seed) if stage.per_job else None
    if job and job.experiment not in params["experiments"]:
        raise UserError(f"--experiment: '{job.experiment}' is unknown{nearest(job.experiment, params['experiments'])}")
    paths = {
        key.removeprefix("path_"): path for key, path in vars(arguments).items() if key.startswith("path_") and path
    }
    tracker = execution.open_tracker(arguments.tracker, execution.context(arguments.params), stage, job)
    chosen = execution.sections(stage, params, job)
    device = arguments.device if stage.on_device else "auto"
    execution.run_stage(stage, chosen, paths=paths, job=job, tracker=tracker, started=started, device=device)
    if stage.name == "register":
        from segdistill.commands.summary import show

        show()
