"""The whole graph on one page, as data.

The command line comes from this table. ``dvc.yaml``, the components and the pipeline are written by hand, because they
are what a newcomer reads first; ``tests/contracts/test_graph.py`` proves that they name the same stages, inputs,
outputs and parameters. A stage's module has a ``Config`` and a ``run(config, ..., tracker)`` that takes the inputs and
outputs below as keyword paths and writes its outputs, and only those. Modules are imported when their stage runs, never
here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from segdistill.config import Name, Seed, parse
from segdistill.errors import UserError, brief, nearest


@dataclass(frozen=True)
class Stage:
    """One box of the graph.

    ``{experiment}`` and ``{seed}`` in a path or a parameter name stand for the job of a stage that runs once per
    (experiment, seed). An input that ends in ``{job}`` arrives as a list, one path per job, in the order of the matrix.
    """

    name: str
    module: str  # below segdistill.stages
    image: str  # which container image: "data" (no torch) or "train"
    params: tuple[str, ...]  # dotted keys of params.yaml, which are also what DVC watches
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    large: tuple[str, ...] = ()  # outputs that a cluster may keep on a volume, to be read there by every pod
    metrics: Mapping[str, str] = field(default_factory=dict)  # outputs that are small, readable and kept in git
    per_job: bool = False
    on_device: bool = False  # it trains or evaluates networks, on a GPU where there is one
    shows: tuple[str, ...] = ()  # its highlights (stages/highlights.py), which Kubeflow's pages show
    help: str = ""


JOB = "{experiment}-s{seed}"

STAGES: tuple[Stage, ...] = (
    Stage(
        name="validate",
        module="validate",
        image="data",
        params=("validate",),
        inputs={"data": "data"},
        outputs={"report": "reports/validation"},
        shows=("page", "summary"),
        help="check every file of the data set (Great Expectations) before anything is built on it",
    ),
    Stage(
        name="prepare",
        module="prepare",
        image="data",
        params=("prepare",),
        inputs={"data": "data", "report": "reports/validation"},
        outputs={"prepared": "artifacts/prepared"},
        large=("prepared",),
        help="turn the data set into Arrow shards with train ids and a manifest",
    ),
    Stage(
        name="train_teacher",
        module="train_teacher",
        image="train",
        params=("train_teacher",),
        inputs={"prepared": "artifacts/prepared"},
        outputs={"teacher": "artifacts/teacher"},
        on_device=True,
        shows=("scores",),
        help="train the teacher, or import a checkpoint, and record its validation score",
    ),
    Stage(
        name="evaluate_teacher",
        module="evaluate",
        image="train",
        params=("evaluate",),
        inputs={"prepared": "artifacts/prepared", "model": "artifacts/teacher"},
        outputs={"evaluation": "reports/evaluation/teacher"},
        on_device=True,
        shows=("scores", "confusion"),
        help="the teacher on the test split, at original resolution",
    ),
    Stage(
        name="distill",
        module="distill",
        image="train",
        params=("distill", "experiments.{experiment}"),
        inputs={"prepared": "artifacts/prepared", "teacher": "artifacts/teacher"},
        outputs={"students": f"artifacts/students/{JOB}"},
        per_job=True,
        on_device=True,
        shows=("scores",),
        help="train one experiment's student (or co-trained students) with one seed",
    ),
    Stage(
        name="evaluate",
        module="evaluate",
        image="train",
        params=("evaluate",),
        inputs={"prepared": "artifacts/prepared", "model": f"artifacts/students/{JOB}"},
        outputs={"evaluation": f"reports/evaluation/{JOB}"},
        per_job=True,
        on_device=True,
        shows=("scores", "confusion"),
        help="one job's students on the test split, at original resolution",
    ),
    Stage(
        name="compare",
        module="compare",
        image="train",
        params=("compare", "run", "seeds"),
        inputs={
            "prepared": "artifacts/prepared",
            "teacher": "artifacts/teacher",
            "teacher_evaluation": "reports/evaluation/teacher",
            "students": "artifacts/students/{job}",
            "evaluations": "reports/evaluation/{job}",
        },
        outputs={"report": "reports/comparison"},
        metrics={"metrics": "reports/metrics.json"},
        shows=("scores", "page", "summary"),
        help="mean and spread over seeds, paired bootstrap against the undistilled student, one HTML report",
    ),
    Stage(
        name="register",
        module="register",
        image="train",
        params=("register", "run", "seeds"),
        inputs={
            "comparison": "reports/comparison",
            "prepared": "artifacts/prepared",
            "students": "artifacts/students/{job}",
        },
        outputs={"registration": "reports/registration"},
        shows=("summary",),
        help="register the best student by validation score, and move the alias if it beats the champion",
    ),
)

BY_NAME: dict[str, Stage] = {stage.name: stage for stage in STAGES}

MOST_JOBS = 10_000  # of one matrix
# Top-level keys of params.yaml that are not a stage's section: the matrix.
MATRIX_KEYS = ("run", "experiments", "seeds")


@dataclass(frozen=True)
class Job:
    """One cell of the matrix.

    Raises:
        UserError: a name or a seed that cannot be one.
    """

    experiment: str
    seed: int

    def __post_init__(self) -> None:
        parse(Name, self.experiment, "experiment")
        parse(Seed, self.seed, "seed")

    def __str__(self) -> str:
        return f"{self.experiment}-s{self.seed}"


def jobs(params: Mapping[str, Any]) -> list[Job]:
    """The matrix of a params file: every experiment under ``run`` with every seed.

    Raises:
        UserError: what :func:`matrix` refuses, or an experiment that is run but not defined.
    """
    defined = parse(dict[Name, Any], params.get("experiments"), "experiments")
    cells = matrix(params)
    for cell in cells:
        if cell.experiment not in defined:
            raise UserError(
                f"run: '{cell.experiment}' is not defined under experiments{nearest(cell.experiment, defined)}"
            )
    return cells


def matrix(params: Mapping[str, Any]) -> list[Job]:
    """Every experiment under ``run`` with every one of ``seeds``, seed fastest.

    Raises:
        UserError: a name or seed that cannot be one, a repeated one, or none.
    """
    run = parse(list[Name], params.get("run"), "run")
    seeds = parse(list[Seed], params.get("seeds"), "seeds")
    for key, values in {"run": list[Any](run), "seeds": list[Any](seeds)}.items():
        if not values:
            raise UserError(f"{key}: empty; name at least one")
        if len(set(values)) < len(values):
            repeated = next(value for value in values if values.count(value) > 1)
            raise UserError(f"{key}: repeats {repeated!r}; each may stand there once")
    require_different("run", run)
    if len(run) * len(seeds) > MOST_JOBS:
        raise UserError(f"run, seeds: {len(run)} x {len(seeds)} jobs; at most {MOST_JOBS} are one matrix")
    return [Job(experiment, seed) for experiment in run for seed in seeds]


def require_different(key: str, names: Iterable[str]) -> None:
    """Raises a UserError for names that a file system without upper and lower case would take for one."""
    seen: dict[str, str] = {}
    for name in names:
        former = seen.setdefault(name.lower(), name)
        if former != name:
            raise UserError(f"{key}: '{former}' and '{name}' differ in upper and lower case alone; rename one of them")


def check_sections(params: Mapping[str, Any]) -> None:
    """Raises a UserError for a top-level key of params.yaml that no stage and no matrix knows, or that is missing."""
    known = {key.split(".")[0] for stage in STAGES for key in stage.params} | set(MATRIX_KEYS)
    for key in params:
        if key not in known:
            raise UserError(f"{brief(key)}: unknown section{nearest(key, known)}")
    for key in sorted(known):
        if key not in params:
            raise UserError(f"{key}: missing; params.yaml needs this section")
