"""A stage from the command line, with the whole of params.yaml checked before it."""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segdistill import execution
from segdistill.config import read_yaml, to_dict
from segdistill.errors import UserError
from segdistill.files import read_json
from segdistill.plan import cohort_plan, cohorts, teacher_plan
from segdistill.stages import BY_NAME


def command(arguments: argparse.Namespace) -> None:
    """Runs the stage that the command names."""
    stage, started = BY_NAME[arguments.command], time.time()
    params = read_yaml(arguments.params)
    # The plan comes before whatever is trained, and builds every network in outline; who needs none imports none.
    networks: execution.Networks = "built" if stage.name == "plan" else "named" if stage.on_device else "ignored"
    execution.check_params(params, networks=networks, here=True)
    cohort = f"s{arguments.seed}" if stage.per_cohort else None
    if cohort is not None and cohort not in cohorts(params["run"], params["seeds"]):
        known = ", ".join(map(str, params["seeds"]))
        raise UserError(f"--seed: {arguments.seed} is not under seeds; these are: {known}")
    paths = {
        key.removeprefix("path_"): path for key, path in vars(arguments).items() if key.startswith("path_") and path
    }
    if "plan" in stage.inputs:
        _require_current(paths.get("plan", Path(stage.inputs["plan"].format(cohort=cohort))), params, cohort)
    tracker = execution.open_tracker(arguments.tracker, execution.context(arguments.params), stage, cohort)
    chosen = execution.sections(stage, params)
    device = arguments.device if stage.on_device else "auto"
    execution.run_stage(stage, chosen, paths=paths, cohort=cohort, tracker=tracker, started=started, device=device)
    if stage.name == "register":
        from segdistill.commands.summary import show

        show()


def _require_current(path: Path, params: Mapping[str, Any], cohort: str | None) -> None:
    """Raises a UserError for a plan that is not what the parameters and the code say now."""
    if not path.exists():
        return  # the stage says so
    if cohort is None:
        current: Any = teacher_plan(params["train_teacher"])
    else:
        current = cohort_plan(params["distill"], params["experiments"], cohorts(params["run"], params["seeds"])[cohort])
    if read_json(path, mend="run the stage 'plan' again") != to_dict(current):
        raise UserError(
            f"{path}: made from other parameters or other code than there are now; run the stage 'plan' again"
        )
