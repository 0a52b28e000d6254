"""``python -m pipelines``: ``compile`` for a cluster, ``submit`` to one, ``run`` on this machine."""

import argparse
import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segdistill import environment
from segdistill.config import read_yaml, to_dict
from segdistill.errors import UserError


def arguments(params: Mapping[str, Any], *, size: int | None = None, here: bool = False) -> dict[str, Any]:
    """The pipeline's parameters that come from a params file: what each stage reads of it, and the plans.

    Args:
        params: the content of params.yaml.
        size: how many jobs a cohort has; None: all of a seed.
        here: whether the tasks run on this machine, with its files.

    Raises:
        UserError: the first mistake in the file.
    """
    from segdistill.execution import check_params, sections
    from segdistill.plan import cohort_plan, cohorts, teacher_plan
    from segdistill.stages import STAGES

    check_params(params, here=here)
    if params["evaluate"].get("out_of_domain"):
        raise UserError(
            "evaluate.out_of_domain: a pipeline's tasks have the data of data.dvc alone and no second test set; set it "
            "to null, or evaluate by dvc repro"
        )
    tasks = [stage for stage in STAGES if stage.image and stage.params]  # the teacher is evaluated as the students
    return {
        **{f"{stage.params[0]}_params": json.dumps(sections(stage, params)) for stage in tasks},
        "teacher_plan": _as_text(teacher_plan(params["train_teacher"])),
        "cohorts": [
            {"cohort": name, "plan": _as_text(cohort_plan(params["distill"], params["experiments"], jobs))}
            for name, jobs in cohorts(params["run"], params["seeds"], size).items()
        ],
    }


@dataclass(frozen=True)
class Tuning:
    """What makes the pipeline one that tunes."""

    workers: int  # that share the trials
    params_file: str  # the text of params.yaml, of which the tuned one is a copy

    def arguments(self, params: Mapping[str, Any], *, accelerators: int = 0, several: bool = True) -> dict[str, Any]:
        """The pipeline's parameters that come from a params file.

        Args:
            params: its content.
            accelerators: of each task that trains.
            several: whether the tasks run on several machines, or in containers.

        Raises:
            UserError: a mistake in the file, or a tuning that such tasks cannot share.
        """
        from segdistill.adapters.optuna_store import require_server
        from segdistill.execution import check_params, sections
        from segdistill.plan import teacher_plan
        from segdistill.stages import BY_NAME
        from segdistill.stages.tune import search_plan

        check_params(params, here=not several)
        plan = search_plan(params)
        if several:
            require_server(plan.config.storage)
        if accelerators > 1:
            raise UserError(
                f"accelerators of a task: {accelerators}, but a worker of a tuning trains on one; set 1, and "
                f"--tune {self.workers * accelerators}"
            )
        return {
            **{f"{name}_params": json.dumps(sections(BY_NAME[name], params)) for name in ("validate", "prepare")},
            "teacher_plan": _as_text(teacher_plan(params["train_teacher"])),
            "workers": [f"w{number}" for number in range(self.workers)],
            "params_file": self.params_file,
        }


def _as_text(plan: Any) -> str:
    """In one line, since all plans travel in one argument of a process (``limits.py``).

    The code is the image's, which is part of KFP's cache key; that of this working copy trains nothing there.
    """
    content = to_dict(plan)
    for entry in content.get("jobs", [content]):
        entry["code"] = ""
    return json.dumps(content, separators=(",", ":"))


def compile_to(
    path: Path,
    params: Mapping[str, Any],
    *,
    cluster: Path | None = None,
    caching: bool = True,
    tuning: Tuning | None = None,
    accelerators: str | None = None,
) -> dict[str, Any]:
    """Writes the pipeline, whose parameters default to those of ``params``; the same input gives the same bytes.

    Args:
        path: the file to write.
        params: the content of params.yaml.
        cluster: what tasks ask of the cluster; by default ``pipelines/cluster.yaml``.
        caching: whether KFP may take over results of earlier runs, but for what depends on more than its inputs.
        tuning: makes it the pipeline that tunes.
        accelerators: how many a run of it will give a task, in digits, if not as many as ``cluster`` says.

    Returns:
        The parameters that come from ``params``.

    Raises:
        UserError: a mistake in one of them, or a matrix that is too large for one run.
    """
    from kfp import compiler

    from components import images
    from pipelines import distillation, limits
    from pipelines import tuning as tuning_graph
    from pipelines.cluster import DEFAULT, read_cluster
    from pipelines.placement import Placement

    asked = read_cluster(cluster or DEFAULT)
    place = Placement(asked, caching=caching)
    if tuning:
        if asked.on_nodes:
            raise UserError("accelerator.nodes: above 1, but a worker of a tuning trains on one node; set it to 1")
        given = tuning.arguments(params, accelerators=int(accelerators or place.parameters["accelerator_count"]))
        limits.check_tuning(given)
        pipeline = tuning_graph.pipeline(place)
    else:
        given = arguments(params, size=asked.jobs_per_gpu)
        limits.check_matrix(given)
        pipeline = distillation.pipeline(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial.yaml")  # the compiler goes by the suffix
    compiler.Compiler().compile(pipeline, str(partial), pipeline_parameters=given | place.parameters)
    # The compiler begins with a comment that repeats the parameters, a dictionary's keys in an order of chance, and of
    # a text in several lines the first one alone as a comment.
    lines = itertools.dropwhile(
        lambda line: not line.startswith("components:"), partial.read_text().splitlines(keepends=True)
    )
    partial.write_text("# Made by: python -m pipelines compile\n" + "".join(lines))
    partial.replace(path)
    if any(image.startswith(images.NOWHERE) for image in (images.DATA, images.TRAIN)):
        print(
            f"pipelines: warning: the images are under {images.NOWHERE}, which no cluster can pull; set"
            " SEGDISTILL_IMAGE_DATA and SEGDISTILL_IMAGE_TRAIN to yours (docs/kubeflow.md)",
            file=sys.stderr,
        )
    return given


def submit(params: Mapping[str, Any], given: argparse.Namespace) -> int:
    """Compiles the pipeline and starts a run of it on a cluster; returns the exit code.

    Raises:
        UserError: a mistake in what was given, or a server that does not take it.
    """
    from pipelines.submission import Submission, server, wait

    to = server(given)
    if given.accelerator_count is not None and not given.accelerator_count.isdecimal():
        raise UserError(f"--accelerator-count: '{given.accelerator_count}' is not a number of them; expected 0 or more")
    version = data_version(given.repository or origin(), given.revision)
    name = given.run_name or time.strftime("segdistill %Y-%m-%d %H:%M:%S")
    chosen = {"accelerator_type": given.accelerator_type, "accelerator_count": given.accelerator_count}
    own = {key: value for key, value in chosen.items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        parameters = compile_to(
            file, params, cluster=given.cluster, caching=not given.no_cache, tuning=_tuning(given),
            accelerators=given.accelerator_count,
        )  # fmt: skip
        package = file.read_text()
    what = Submission({**version, **parameters, **own}, given.experiment, name, given.service_account)
    if given.dry_run:
        sys.stdout.write(what.shown(to, package) + "\n")
        return 0
    client, run = what.send(to, package)
    sys.stdout.write(to.page(run) + "\n")
    sys.stdout.flush()
    if not given.wait:
        return 0
    try:
        state = wait(client, to, run)
    except KeyboardInterrupt:
        print(f"pipelines submit: no longer waiting; the run goes on: {to.page(run)}", file=sys.stderr)
        return 130
    if state != "SUCCEEDED":
        print(f"pipelines submit: the run ended as {state.lower()}: {to.page(run)}", file=sys.stderr)
    return 0 if state == "SUCCEEDED" else 1


def origin() -> str:
    """Where this working copy was cloned from.

    Raises:
        UserError: nowhere that is known.
    """
    done = subprocess.run(["git", "remote", "get-url", "origin"], capture_output=True, text=True)
    if done.returncode:
        raise UserError("--repository: missing, and this folder has no git remote 'origin' to take it from")
    return done.stdout.strip()


def data_version(repository: str, revision: str) -> dict[str, str]:
    """The parameters of ``fetch`` for a cluster. A name may move while the run waits, and its commit does not.

    Raises:
        UserError: a repository, revision or remote that pods cannot read.
    """
    from segdistill.adapters.dvc_version import find
    from segdistill.secrets import masked_text

    if Path(repository).exists() or repository.startswith("file:"):
        raise UserError(
            f"--repository: '{repository}' is a folder of this machine; give an address that pods can reach"
        )
    if re.match(r"https?://[^/]*@|[^:]+://[^/@]*:[^/@]*@", repository):
        raise UserError(
            f"--repository: '{masked_text(repository)}' was given with credentials; docs/kubeflow.md says how"
        )
    found = find(repository, revision)
    if found.remote.bucket is None:
        raise UserError(f"{repository}: its DVC remote is a folder, '{found.remote.prefix}'; pods need one in S3")
    return {"repository": repository, "revision": found.commit}


def run_here(
    params: Mapping[str, Any],
    repository: str,
    revision: str,
    root: Path,
    runner: str = "subprocess",
    tuning: Tuning | None = None,
) -> dict[str, Path]:
    """Runs the pipeline, each task in a process of this environment or in a container; returns where its outputs lie.

    Args:
        params: the content of params.yaml.
        repository: of the data set: a folder, or an address that git understands.
        revision: of the data set.
        root: gets a folder for this run, with one for each task's outputs.
        runner: "subprocess" or "docker".
        tuning: runs the pipeline that tunes.

    Raises:
        UserError: a mistake in the parameters, or no such version of the data, or no Docker engine.
        RuntimeError: a task failed.
    """
    from segdistill.adapters.dvc_version import find

    here, root = runner == "subprocess", root.resolve()
    given = tuning.arguments(params, several=not here) if tuning else arguments(params, here=here)
    version = find(repository, revision)
    from kfp import local

    from pipelines import distillation
    from pipelines import tuning as tuning_graph
    from pipelines.local_log import LocalLog
    from pipelines.placement import Placement

    environment.set_defaults({"SEGDISTILL_PIPELINE_RUN": time.strftime("local-%Y%m%d-%H%M%S")})
    place = Path(repository)
    where = str(place.resolve()) if place.is_dir() else repository  # tasks run in other folders
    if runner == "docker":
        if place.is_dir():
            raise UserError(
                f"--repository: '{repository}' is a folder, which a container does not see; give an address"
            )
        if environment.tracker() in ("auto", "mlflow") and environment.tracking_uri() is None:
            raise UserError("MLFLOW_TRACKING_URI: not set; a container's own store would be gone with the container")
        from pipelines import docker_runner

        chosen = docker_runner.runner(root, work=environment.work_volume())
    else:
        chosen = local.SubprocessRunner(use_venv=False)
    before = set(root.glob("*"))
    local.init(chosen, pipeline_root=str(root))
    nowhere = Placement(None)
    pipeline = (tuning_graph if tuning else distillation).pipeline(nowhere)
    with contextlib.closing(LocalLog(sys.stdout)) as log, contextlib.redirect_stdout(log):
        pipeline(repository=where, revision=version.commit, **given, **nowhere.parameters)
    (run,) = set(root.glob("*")) - before
    outputs = {"report": "tune-report"} if tuning else {"report": "compare", "registration": "register"}
    return {name: run / task / name for name, task in outputs.items()}


def _tuning(given: argparse.Namespace) -> Tuning | None:
    """What ``--tune`` asks for.

    Raises:
        UserError: it is no number of workers.
    """
    if given.tune is None:
        return None
    if not given.tune.isdecimal() or not int(given.tune):
        raise UserError(f"--tune: '{given.tune}' is not a number of workers; expected 1 or more")
    return Tuning(int(given.tune), given.params.read_text(encoding="utf-8-sig"))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m pipelines", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile", help="write the pipeline for a cluster")
    compiling.add_argument("--out", type=Path, default=Path("pipeline.yaml"), help="the file to write (%(default)s)")
    submitting = commands.add_parser("submit", help="start a run on a cluster, with the parameters of a params file")
    submitting.add_argument("--repository", help="the data set's git repository (the origin of this one)")
    submitting.add_argument("--host", help="the URL of the Kubeflow Pipelines API (KF_PIPELINES_ENDPOINT)")
    submitting.add_argument("--ui", help="the URL of its pages, if another (KF_PIPELINES_UI_ENDPOINT)")
    submitting.add_argument("--namespace", help="of the profile, where the server has several users")
    submitting.add_argument("--token-env", metavar="NAME", help="the environment variable that holds a bearer token")
    submitting.add_argument("--cookies-env", metavar="NAME", help="the environment variable that holds cookies")
    submitting.add_argument("--in-cluster", action="store_true", help="use the token of this pod's service account")
    submitting.add_argument("--ca-cert", type=Path, metavar="FILE", help="certificates of a private authority")
    submitting.add_argument("--service-account", help="that the run's pods get; by default the server's choice")
    submitting.add_argument("--accelerator-type", metavar="TYPE", help="nvidia.com/gpu or another (cluster.yaml's)")
    submitting.add_argument("--accelerator-count", metavar="N", help="for each task that trains (cluster.yaml's)")
    submitting.add_argument("--experiment", default="segdistill", help="of KFP, a folder of runs (%(default)s)")
    submitting.add_argument("--run-name", help="by default the project and the time")
    submitting.add_argument("--wait", action="store_true", help="tell of its tasks, and end as the run ends")
    submitting.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    for command in (compiling, submitting):
        command.add_argument("--cluster", type=Path, help="what tasks ask of it (pipelines/cluster.yaml)")
        command.add_argument("--no-cache", action="store_true", help="run every task anew")
    running = commands.add_parser("run", help="run the pipeline on this machine")
    running.add_argument("--runner", choices=("subprocess", "docker"), default="subprocess")
    running.add_argument("--repository", default=".", help="the data set's git repository: a folder or an address")
    running.add_argument("--root", type=Path, default=Path("artifacts/kfp"), help="where outputs go (%(default)s)")
    for command in (submitting, running):
        command.add_argument("--revision", default="HEAD", help="the data set's: commit, tag or branch (%(default)s)")
    for command in (compiling, submitting, running):
        command.add_argument(
            "--tune", metavar="WORKERS", help="tune the parameters instead, by so many tasks that share the trials"
        )
    for command, params in ((compiling, "params.yaml"), (submitting, "params.yaml"), (running, "presets/smoke.yaml")):
        command.add_argument("--params", type=Path, default=Path(params), help="the parameters (%(default)s)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 1 for a failed run, 2 for a user's mistake."""
    given = parser().parse_args(argv)
    try:
        params = read_yaml(given.params)
        if given.command == "compile":
            compile_to(
                given.out, params, cluster=given.cluster, caching=not given.no_cache, tuning=_tuning(given)
            )  # fmt: skip
            print(given.out)
        elif given.command == "submit":
            return submit(params, given)
        else:
            made = run_here(
                params, given.repository, given.revision, given.root, given.runner, tuning=_tuning(given)
            )  # fmt: skip
            for name, path in made.items():
                sys.stdout.write(f"{name}: {path}\n")  # KFP replaces print while tasks run, and not always back
    except UserError as error:
        print(f"pipelines {given.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pipelines {given.command}: stopped", file=sys.stderr)
        return 130
    except RuntimeError as error:  # KFP's word for a task that failed; the task has said why
        print(f"pipelines {given.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
