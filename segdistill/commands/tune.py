"""The same search for every experiment, on this machine: the stages ``tune`` and ``tune_report`` in one process."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from segdistill import environment, execution
from segdistill.config import read_yaml
from segdistill.errors import Interrupted
from segdistill.files import lock
from segdistill.stages import BY_NAME
from segdistill.stages.tune import WORK, Tuning

logger = logging.getLogger(__name__)


def command(arguments: argparse.Namespace) -> None:
    """Tunes the experiments of params.yaml; of several processes, the last one writes the report."""
    params, stage = read_yaml(arguments.params), BY_NAME["tune"]
    execution.check_params(params, networks="named", here=True)
    paths = execution.resolve(stage, None, params, {"plan": arguments.params})
    tuning = Tuning(params, paths["prepared"], paths["teacher"], device=arguments.device)
    context = execution.context(arguments.params)
    here = replace(context, pipeline_run=environment.pipeline_run() or f"tune-{tuning.name}")
    tuning.tracker = execution.open_tracker(arguments.tracker, here, stage, None)
    status, complete = "FAILED", False
    try:
        complete = tuning.run()
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        tuning.tracker.close(status)
        if complete or status != "FINISHED":
            tuning.tracker.finish_pipeline(status)
    report = Path(BY_NAME["tune_report"].outputs["report"])
    if not complete:
        logger.info("other processes train the rest; the last of them writes %s", report)
        return
    with lock(report, "segdistill tune", file=WORK / "report.lock"):
        tuning.write(arguments.params.read_text(encoding="utf-8-sig"), report)
    print(f"{report / 'report.html'}: the page; {report / 'params.yaml'}: the tuned parameters")
