"""``python -m pipelines compile`` writes the pipeline for a cluster, ``run`` runs it on this machine."""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segdistill.errors import UserError


def arguments(params: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's parameters that come from a params file: one JSON string a stage, and the list of jobs.

    Raises:
        UserError: the first mistake in the file.
    """
    from segdistill.execution import check_params, sections
    from segdistill.stages import BY_NAME, Job, Stage, jobs

    def chosen(stage: Stage, job: Job | None = None) -> str:
        return json.dumps(sections(stage, params, job))

    check_params(params)
    single = (
        "validate",
        "prepare",
        "train_teacher",
        "evaluate",
        "compare",
        "register",
    )  # as the teacher's, so the jobs'
    return {
        **{f"{name}_params": chosen(BY_NAME[name]) for name in single},
        "jobs": [
            {"experiment": job.experiment, "seed": job.seed, "params": chosen(BY_NAME["distill"], job)}
            for job in jobs(params)
        ],
    }


def compile_to(path: Path, params: Mapping[str, Any]) -> None:
    """Writes the pipeline, whose parameters default to those of ``params``; the same input gives the same bytes."""
    from kfp import compiler

    from pipelines.distillation import distillation

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial.yaml")  # the compiler goes by the suffix
    compiler.Compiler().compile(distillation, str(partial), pipeline_parameters=arguments(params))
    # The compiler begins with a comment that repeats the parameters, a dictionary's keys in an order of chance.
    lines = itertools.dropwhile(lambda line: line.startswith("#"), partial.read_text().splitlines(keepends=True))
    partial.write_text("# Made by: python -m pipelines compile\n" + "".join(lines))
    partial.replace(path)


def run_here(params: Mapping[str, Any], data: Path, root: Path) -> dict[str, Path]:
    """Runs the pipeline, each task in a process of this environment; returns where its outputs lie.

    Args:
        params: the content of params.yaml.
        data: the data set.
        root: gets a folder for this run, with one for each task's outputs.
    """
    given = arguments(params)
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; make it with: segdistill data synth --out {data}")
    from kfp import local

    from pipelines.distillation import distillation

    os.environ.setdefault("SEGDISTILL_PIPELINE_RUN", time.strftime("local-%Y%m%d-%H%M%S"))
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root.resolve()))
    done = distillation(data_uri=str(data.resolve()), **given)
    return {name: Path(artifact.path) for name, artifact in done.outputs.items()}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m pipelines", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile", help="write the pipeline for a cluster")
    compiling.add_argument("--out", type=Path, default=Path("pipeline.yaml"), help="the file to write (%(default)s)")
    running = commands.add_parser("run", help="run the pipeline on this machine")
    running.add_argument("--runner", choices=("subprocess",), default="subprocess")
    running.add_argument("--data", type=Path, default=Path("data"), help="the data set (%(default)s)")
    running.add_argument("--root", type=Path, default=Path("artifacts/kfp"), help="where outputs go (%(default)s)")
    for command in (compiling, running):
        command.add_argument("--params", type=Path, default=Path("params.yaml"), help="the parameters (%(default)s)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 1 for a failed task, 2 for a user's mistake."""
    from segdistill.config import read_yaml

    given = parser().parse_args(argv)
    try:
        params = read_yaml(given.params)
        if given.command == "compile":
            compile_to(given.out, params)
            print(given.out)
        else:
            for name, path in run_here(params, given.data, given.root).items():
                sys.stdout.write(f"{name}: {path}\n")  # KFP replaces print while tasks run, and not always back
    except UserError as error:
        print(f"pipelines {given.command}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # KFP's word for a task that failed; the task has said why
        print(f"pipelines {given.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
