"""One component as a pipeline, in containers: ``python one_task.py SETTINGS`` with the settings as JSON.

``component``, its ``parameters``, its input ``artifacts`` below ``root``, ``work`` for checkpoints, ``retries``,
``memory`` as a limit.
"""

import json
import sys
from pathlib import Path
from typing import Any

from kfp import dsl, local

import components
from pipelines import docker_runner


def run(settings: dict[str, Any]) -> None:
    @dsl.pipeline(name=settings["component"])
    def pipeline() -> None:
        given = {
            name: dsl.importer(artifact_uri=path, artifact_class=getattr(dsl, kind)).output
            for name, (path, kind) in settings["artifacts"].items()
        }
        task = getattr(components, settings["component"])(**settings["parameters"], **given)
        task.set_retry(settings["retries"], backoff_duration="0s")

    root, work = Path(settings["root"]), settings["work"]
    runner = docker_runner.runner(root, work=Path(work) if work else None, memory=settings["memory"])
    local.init(runner, pipeline_root=str(root))
    pipeline()


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
