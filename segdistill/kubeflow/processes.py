"""A stage in several processes of one machine, as torchrun has them."""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segdistill import environment
from segdistill.errors import Interrupted


def run_together(name: str, task: Mapping[str, Any], module: str, count: int) -> None:
    """Runs so many processes to their end.

    Args:
        name: of what they do.
        task: what describes it, as JSON has it.
        module: runs one of the processes, given a file with the description.
        count: how many.

    Raises:
        SystemExit: one of them failed, with its code; it has said why.
        Interrupted: SIGTERM came; the checkpoint is written.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the stage has said what was wrong
    environment.set_defaults({"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))})
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        max_restarts=0,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=name,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.json"
        file.write_text(json.dumps(task))
        try:
            elastic_launch(launch, sys.executable)("-m", module, str(file))
        except ChildFailedError as error:
            codes = {failure.exitcode for failure in error.failures.values()}
            raise SystemExit(next((code for code in (2, 75) if code in codes), 1)) from None
        except SignalException:
            raise Interrupted("stopped; the checkpoint is written, and the next attempt goes on from it") from None
