"""How a stage is run, from the command line or as a task: parameters in, tracker, clock, and a true exit."""

import contextlib
import glob
import importlib
import importlib.util
import inspect
import json
import logging
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from segdistill import environment
from segdistill.config import parse
from segdistill.engine.tracker import JsonLinesTracker, Tracker
from segdistill.errors import Interrupted, UserError, brief, nearest
from segdistill.files import disk_errors, folder_place, lock, write_file
from segdistill.plan import cohorts, experiments, jobs, require_defined
from segdistill.search import TuneConfig, tuned_experiments
from segdistill.stages import BY_NAME, STAGES, Stage, check_sections

Networks = Literal["built", "named", "ignored"]  # how far params.yaml is checked
TIMINGS, TRACKING = Path("artifacts/timings"), Path("artifacts/tracking")


@dataclass(frozen=True)
class Context:
    """Where a run belongs: the facts that every run is tagged with."""

    data_md5: str
    git_commit: str
    pipeline_run: str

    def tags(self, stage: Stage) -> dict[str, str]:
        """The tags of one stage's runs."""
        return {**asdict(self), "stage": stage.name}


def context(params_path: Path | None = None) -> Context:
    """The facts of this working copy, or of the container, whose environment states them.

    A pipeline run is one state of data, parameters and commit, so that a run that was stopped and continued is one run.
    ``SEGDISTILL_PIPELINE_RUN``, ``SEGDISTILL_DATA_MD5`` and ``SEGDISTILL_GIT_COMMIT`` go first: an orchestrator knows
    its run, and an image has no working copy.
    """
    data_file = Path("data.dvc")
    recorded = data_file.read_text() if data_file.exists() else ""
    found = re.search(r"md5:\s*(\S+)", recorded)
    md5 = environment.data_md5() or (found.group(1) if found else "unknown")
    commit = environment.git_commit() or _git("rev-parse", "HEAD") or "unknown"
    params = params_path.read_text() if params_path else ""
    state = sha256((recorded + params + commit).encode()).hexdigest()[:8]
    return Context(md5, commit, environment.pipeline_run() or f"{commit[:8]}-{state}")


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def open_tracker(kind: str, here: Context, stage: Stage, cohort: str | None, folder: Path = TRACKING) -> Tracker:
    """The tracker of the pipeline run; stages log to children of it.

    Args:
        kind: "mlflow", "jsonl", "none", or "auto" for MLflow where it is installed and JSON lines where not.
        here: where the run belongs.
        stage: what is run.
        cohort: of a stage that runs once per cohort.
        folder: for JSON lines, and for what MLflow was not sent yet.
    """
    if environment.rank():
        return Tracker()  # rank 0 speaks
    kind = _chosen(kind)
    if kind == "mlflow":
        from segdistill.adapters.mlflow_tracking import open_pipeline_run

        return open_pipeline_run(here.pipeline_run, here.tags(stage), data=Path("data"), spool=folder)
    if kind == "jsonl":
        tracker = JsonLinesTracker(folder / here.pipeline_run / f"{label(stage, cohort)}.jsonl")
        tracker.tags(here.tags(stage))
        return tracker
    return Tracker()


def finish_pipeline(kind: str, here: Context, status: str | None) -> None:
    """Ends the pipeline run that stages have logged to: FINISHED, FAILED or KILLED, or None, as the stages left it."""
    if _chosen(kind) == "mlflow":
        from segdistill.adapters.mlflow_store import default_store, finish_parent

        finish_parent(default_store(Path()), here.pipeline_run, status)


def _chosen(kind: str) -> str:
    return ("mlflow" if _installed("mlflow") else "jsonl") if kind == "auto" else kind


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def check_params(params: Any, *, networks: Networks = "built", here: bool = False) -> None:
    """Checks the whole of params.yaml, since a slip must not wait for its stage: keys, values, and what goes together.

    Args:
        params: what the file says.
        networks: "built": each is built in outline, and the methods between them, which takes seconds; "named": whether
            there are such encoders and files; "ignored": by what has nothing to do with them.
        here: whether it is to run on this machine; the files that it names must then be here.

    Raises:
        UserError: the first mistake, by its dotted path.
    """
    from segdistill.data.layouts import LAYOUTS, open_layout
    from segdistill.plan import DistillConfig

    if not isinstance(params, Mapping):
        raise UserError(f"parameters: expected a mapping of sections, found {type(params).__name__}")
    params = parse(dict[str, Any], params, "")
    check_sections(params)
    matrix = jobs(params["run"], params["seeds"])
    configs = {stage.params[0]: parse(stage_module(stage).Config, params[stage.params[0]], stage.params[0])
               for stage in STAGES if stage.params}  # fmt: skip
    parse(DistillConfig, params["distill"], "distill")
    defined = experiments(params["experiments"])
    require_defined(matrix, defined)
    second = configs["evaluate"].out_of_domain
    layouts = {f"{section}.layout": configs[section].layout for section in ("validate", "prepare")}
    for key, layout in (layouts | ({"evaluate.out_of_domain.layout": second.layout} if second else {})).items():
        if layout not in LAYOUTS:
            raise UserError(f"{key}: unknown layout '{brief(layout)}'{nearest(layout, LAYOUTS)}")
    if second and here and not second.data.is_dir():
        raise UserError(f"evaluate.out_of_domain.data: {second.data}: no such folder")
    if second and here and networks != "named" and (data := Path(BY_NAME["validate"].inputs["data"])).is_dir():
        from segdistill.data.mapped import MappedDataset

        ours = [entry.name for entry in open_layout(configs["prepare"].layout, data).classes]
        MappedDataset(second.data, second.layout, second.classes, ours, "evaluate.out_of_domain")
    if configs["validate"].layout != configs["prepare"].layout:
        raise UserError(
            f"prepare.layout: '{configs['prepare'].layout}', but validate.layout is '{configs['validate'].layout}';"
            " make them equal"
        )
    if "tune" in params:
        tune: TuneConfig = parse(TuneConfig, params["tune"], "tune")
        tuned_experiments(tune, params["run"], defined)
    wanted = configs["register"].student
    trained = {student for job in matrix for student in defined[job.experiment].students}
    if wanted is not None and wanted not in trained:
        raise UserError(f"register.student: no experiment under run trains a '{wanted}'{nearest(wanted, trained)}")
    if networks != "ignored":
        from segdistill.stages import _networks

        _networks.check(configs["train_teacher"], defined, outlines=networks == "built", files=here)


def sections(stage: Stage, params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a params file that a stage declares: all that it may know of it."""
    for key in stage.params:
        if key not in params:
            raise UserError(f"{key}: missing; {stage.name} needs it")
    return {key: params[key] for key in stage.params}


def run_stage(
    stage: Stage,
    chosen: Mapping[str, Any],
    *,
    paths: Mapping[str, Path | list[Path]],
    cohort: str | None,
    tracker: Tracker,
    started: float,
    work: Path | None = None,
    device: str = "auto",
) -> None:
    """Runs one stage and records where its seconds went.

    Args:
        stage: what to run.
        chosen: its :func:`sections`.
        paths: replacements of the declared inputs and outputs, by name.
        cohort: of a stage that runs once per cohort.
        tracker: of the pipeline run; closed with the stage's true status.
        started: when the process began, in seconds since the epoch; what no activity claims is start-up.
        work: where a stage that trains keeps its checkpoints; None is beside its output.
        device: of a stage that trains or evaluates: "cpu", "cuda", or "auto" for a GPU where there is one.

    Raises:
        UserError: whatever the stage finds wrong, a full disk, or another process that writes the same outputs, whose
            run is none of our business: nothing is said of it to the tracker.
    """
    with _outputs(stage, cohort, paths), _reported(stage, tracker):
        module = stage_module(stage)
        arguments: dict[str, Any] = {"tracker": tracker, "work": work, "device": device}
        arguments |= {key: chosen[key] for key in stage.params[1:]} | resolve(stage, cohort, chosen, paths)
        if stage.params:
            arguments["config"] = parse(module.Config, chosen[stage.params[0]], stage.params[0])
        accepted = inspect.signature(module.run).parameters
        if "git_commit" in accepted:
            here = context()
            versions = {"data_md5": here.data_md5, "git_commit": here.git_commit}
            arguments |= {key: None if value == "unknown" else value for key, value in versions.items()}
        seconds = module.run(**{key: value for key, value in arguments.items() if key in accepted})
    _record_seconds(stage, cohort, dict(seconds or {}), time.time() - started)


@contextlib.contextmanager
def _outputs(stage: Stage, cohort: str | None, paths: Mapping[str, Path | list[Path]]) -> Iterator[None]:
    """Holds the outputs for us alone, without what a process that was killed has left there; a full disk is told."""
    outputs = [_place(stage, name, cohort, paths) for name in stage.outputs]
    places = [folder_place(output) for output in outputs]
    for metrics in (_place(stage, name, cohort, paths) for name in stage.metrics):
        if metrics.is_dir():
            raise UserError(f"{metrics}: a folder; {stage.name} writes a file there: remove it, or choose another name")
    with contextlib.ExitStack() as held:
        if not environment.rank():  # the others of this run work for rank 0
            for output in places:
                held.enter_context(lock(output, f"segdistill {label(stage, cohort)}"))
                for folder, name in ((output.parent, f".{glob.escape(output.name)}.*.partial"), (output, ".*.partial")):
                    for left in folder.glob(name):  # nobody writes here but us
                        shutil.rmtree(left, ignore_errors=True)
        held.enter_context(disk_errors(outputs[0]))
        yield


@contextlib.contextmanager
def _reported(stage: Stage, tracker: Tracker) -> Iterator[None]:
    """Closes the tracker with what became of the stage."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        tracker.close(status)
        if status != "FINISHED" or stage is STAGES[-1]:
            tracker.finish_pipeline(status)


def _record_seconds(stage: Stage, cohort: str | None, spent: dict[str, float], whole: float) -> None:
    spent["start-up"] = max(0.0, whole - sum(spent.values()))
    record = {"stage": stage.name, "cohort": cohort, "seconds": spent, "ended": time.time()}
    with disk_errors(TIMINGS):
        TIMINGS.mkdir(parents=True, exist_ok=True)
        write_file(TIMINGS / f"{label(stage, cohort)}.json", (json.dumps(record) + "\n").encode())


def resolve(
    stage: Stage, cohort: str | None, chosen: Mapping[str, Any], given: Mapping[str, Path | list[Path]]
) -> dict[str, Any]:
    """Input and output paths of a stage, the declared ones unless given; lists where a stage reads every cohort.

    Raises:
        UserError: a name that the stage has not, or an input that is not there.
    """
    declared = {**stage.inputs, **stage.outputs, **stage.metrics}
    for name in given:
        if name not in declared:
            raise UserError(f"{name}: {stage.name} has no such path{nearest(name, declared)}")
    paths: dict[str, Any] = {}
    for name, template in declared.items():
        if name in stage.lists and name not in given:
            paths[name] = [Path(template.format(cohort=one)) for one in cohorts(chosen["run"], chosen["seeds"])]
        else:
            paths[name] = _place(stage, name, cohort, given)
    for name in stage.inputs:
        for path in paths[name] if isinstance(paths[name], list) else [paths[name]]:
            if not path.exists():
                raise UserError(f"{path}: {stage.name} needs it as '{name}'; run what makes it first: dvc repro")
    return paths


def _place(stage: Stage, name: str, cohort: str | None, given: Mapping[str, Path | list[Path]]) -> Any:
    """Where an input or output lies, unless it was given."""
    template = {**stage.inputs, **stage.outputs, **stage.metrics}[name]
    return given.get(name) or Path(template.format(cohort=cohort))


def label(stage: Stage, cohort: str | None) -> str:
    """What files about one run of a stage are called: ``distill-s0``."""
    return f"{stage.name}-{cohort}" if cohort else stage.name


def stage_module(stage: Stage) -> Any:
    """The module that has the stage's ``Config`` and ``run``."""
    return importlib.import_module(f"segdistill.stages.{stage.module}")


class _StandardError(logging.Handler):
    """Writes to what ``sys.stderr`` is at the time: while there is a progress bar, that is the place above it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line."""
        try:
            sys.stderr.write(f"{self.format(record)}\n")
        except OSError:
            self.handleError(record)


def quiet_libraries() -> None:
    """Our own news at INFO, other libraries' only from WARNING on."""
    logger = logging.getLogger("segdistill")
    if not logger.handlers:
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library may have given the root logger a format of its own
