"""The whole graph on one page, as data.

The command line comes from this table. ``dvc.yaml``, the components and the pipeline are written by hand, because they
are what a newcomer reads first; ``tests/contracts/test_graph.py`` proves that they name the same stages, inputs,
outputs and parameters. A stage's module has a ``Config`` and a ``run(config, ..., tracker)`` that takes the inputs and
outputs below as keyword paths and writes its outputs, and only those. Modules are imported when their stage runs, never
here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from segdistill.errors import UserError, brief, nearest


@dataclass(frozen=True)
class Stage:
    """One box of the graph.

    ``{cohort}`` in a path stands for the cohort of a stage that runs once per cohort. To other stages such an input
    arrives as a list, one path a cohort, in any order.
    """

    name: str
    module: str  # below segdistill.stages
    image: str | None  # which container image: "data" (no torch) or "train"; None: on a cluster, who submits runs it
    params: tuple[str, ...]  # sections of params.yaml, which are also what DVC watches
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    large: tuple[str, ...] = ()  # outputs that a cluster may keep on a volume, to be read there by every pod
    metrics: Mapping[str, str] = field(default_factory=dict)  # outputs that are small, readable and kept in git
    per_cohort: bool = False
    on_device: bool = False  # it trains or evaluates networks, on a GPU where there is one
    shows: tuple[str, ...] = ()  # its highlights (report/highlights.py), which Kubeflow's pages show
    help: str = ""

    @property
    def lists(self) -> tuple[str, ...]:
        """The inputs that have one path a cohort."""
        return () if self.per_cohort else tuple(name for name, path in self.inputs.items() if "{cohort}" in path)


PLAN, COHORT_PLAN = "artifacts/plan/teacher.json", "artifacts/plan/{cohort}.json"
STUDENTS, EVALUATIONS = "artifacts/students/{cohort}", "reports/evaluation/{cohort}"
TRIALS = "artifacts/tuning/{cohort}"

STAGES: tuple[Stage, ...] = (
    Stage(
        name="plan",
        module="plan",
        image=None,
        params=("train_teacher", "distill", "experiments", "run", "seeds"),
        inputs={},
        outputs={"plan": "artifacts/plan"},
        help="check what is to be trained as a whole, and write down what decides each cohort of jobs",
    ),
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
        params=(),
        inputs={"plan": PLAN, "prepared": "artifacts/prepared"},
        outputs={"teacher": "artifacts/teacher"},
        on_device=True,
        shows=("scores",),
        help="train the teacher, or import a checkpoint, and record its validation score",
    ),
    Stage(
        name="evaluate_teacher",
        module="evaluate_teacher",
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
        params=(),
        inputs={"plan": COHORT_PLAN, "prepared": "artifacts/prepared", "teacher": "artifacts/teacher"},
        outputs={"students": STUDENTS},
        per_cohort=True,
        on_device=True,
        shows=("scores",),
        help="train the students of one cohort: of all experiments, with one seed, by one pass of the teacher",
    ),
    Stage(
        name="evaluate",
        module="evaluate",
        image="train",
        params=("evaluate",),
        inputs={"prepared": "artifacts/prepared", "students": STUDENTS},
        outputs={"evaluations": EVALUATIONS},
        per_cohort=True,
        on_device=True,
        shows=("scores", "confusion"),
        help="the students of one cohort on the test split, at original resolution",
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
            "students": STUDENTS,
            "evaluations": EVALUATIONS,
        },
        outputs={"report": "reports/comparison"},
        metrics={"metrics": "reports/metrics.json"},
        shows=("scores", "page", "summary"),
        help="mean and spread over seeds, intervals of the gain over the undistilled student, one HTML report",
    ),
    Stage(
        name="register",
        module="register",
        image="train",
        params=("register", "run", "seeds"),
        inputs={
            "comparison": "reports/comparison",
            "prepared": "artifacts/prepared",
            "students": STUDENTS,
        },
        outputs={"registration": "reports/registration"},
        on_device=True,
        shows=("summary",),
        help="register the best student by validation score, and move the alias if it beats the champion",
    ),
)

# The search for settings, in a pipeline of its own; with the command ``tune`` on one machine. DVC has it not: what it
# writes is a params.yaml for the graph above. Its plan is the whole file, and a cohort of it a worker.
TUNING: tuple[Stage, ...] = (
    Stage(
        name="tune",
        module="tune",
        image="train",
        params=(),
        inputs={"plan": "params.yaml", "prepared": "artifacts/prepared", "teacher": "artifacts/teacher"},
        outputs={"trials": TRIALS},
        per_cohort=True,
        on_device=True,
        help="train trials, rounds of all experiments together, until no other worker has left any",
    ),
    Stage(
        name="tune_report",
        module="tune_report",
        image="train",
        params=(),
        inputs={
            "plan": "params.yaml",
            "prepared": "artifacts/prepared",
            "teacher": "artifacts/teacher",
            "trials": TRIALS,
        },
        outputs={"report": "reports/tuning"},
        shows=("page", "summary"),
        help="the tuned parameters and the page, once all trials are done",
    ),
)

BY_NAME: dict[str, Stage] = {stage.name: stage for stage in (*STAGES, *TUNING)}

# Sections that no stage reads, and that need not be there: each is a command's.
OF_COMMANDS = ("tune",)


def check_sections(params: Mapping[str, Any]) -> None:
    """Raises a UserError for a top-level key of params.yaml that nobody knows, or that a stage misses."""
    known = {key for stage in STAGES for key in stage.params}
    for key in params:
        if key not in (allowed := (*known, *OF_COMMANDS)):
            raise UserError(f"{brief(key)}: unknown section{nearest(key, allowed)}")
    for key in sorted(known):
        if key not in params:
            raise UserError(f"{key}: missing; params.yaml needs this section")
