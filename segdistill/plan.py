"""The matrix: from params.yaml to jobs, and to cohorts of jobs that train together.

A job is an experiment with a seed. The jobs of a cohort see the same batches and share each pass of the teacher; what
each of them gives is what it would give alone. ``artifacts/plan/<cohort>.json`` holds all that decides the cohort's
students, but for the data and the teacher, which are made later: settings with their defaults spelled out, and the hash
of the code that uses them. So an edit of params.yaml or of code concerns those cohorts whose file changes.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from segdistill.config import Fraction, Name, Seed, parse, to_dict
from segdistill.config import config as config_class
from segdistill.engine.settings import InferenceConfig, OptimizerConfig, TrainConfig
from segdistill.errors import UserError, nearest
from segdistill.files import read_json
from segdistill.identity import code_of, effective
from segdistill.models.config import ModelConfig
from segdistill.models.teachers import FAMILIES, files_hash

if TYPE_CHECKING:
    from segdistill.methods.method import Method

Plan = TypeVar("Plan")

MOST_JOBS = 10_000  # of one matrix
TRAINED, DIVERGED = "metrics.json", "diverged.json"  # the folder of a job has one of them
TEACHER = "teacher"  # the name of its plan, of its folder and of its run
# The code that trains any network; what a job has beside it are its methods.
TRAINING = ("segdistill.engine.building", "segdistill.engine.cohort")


@config_class
class DistillConfig:
    """Section ``distill`` of params.yaml: one budget and one protocol for every experiment."""

    train: TrainConfig
    """How every student is trained."""

    inference: InferenceConfig
    """How students, and the teacher before it teaches, are validated."""

    teacher_tolerance: Annotated[float, Field(ge=0, le=100)]
    """How far, in points of mIoU, the teacher may fall below its recorded validation score before the run stops."""


@config_class
class TeacherConfig:
    """Section ``train_teacher`` of params.yaml."""

    model: ModelConfig
    """The teacher's network."""

    optimizer: OptimizerConfig
    """What trains it."""

    train: TrainConfig
    """How it is trained."""

    inference: InferenceConfig
    """How the teacher is validated."""

    seed: Seed
    """Of its weights, its order of images and its augmentation."""

    import_from: Path | Annotated[list[Path], Field(min_length=1)] | None
    """A trained teacher's folder, ours, of Hugging Face or of torchvision, to use instead of training; of several, the
    mean of their logits teaches; null trains. See docs/teachers.md."""

    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    """A class of an imported teacher: the data set's class that it is part of, where their names differ."""

    @property
    def folders(self) -> list[Path]:
        """Where the teacher is imported from; nothing where it is trained."""
        if self.import_from is None:
            return []
        return self.import_from if isinstance(self.import_from, list) else [self.import_from]

    @property
    def code(self) -> str:
        """The hash of what makes the teacher; see :func:`segdistill.identity.code_of`."""
        return code_of([*TRAINING, *(FAMILIES.values() if self.folders else ())])

    @model_validator(mode="after")
    def _learns_from_labels(self) -> "TeacherConfig":
        if self.train.unlabelled:
            raise ValueError(
                f"train.unlabelled: {self.train.unlabelled}, but a teacher learns from labels alone; use 0"
            )
        if self.labels and self.import_from is None:
            raise ValueError(
                "labels: are those of an imported teacher; name its folder in import_from, or leave them out"
            )
        return self


@config_class
class StudentConfig:
    """A network and what trains it."""

    model: ModelConfig
    """The student's network."""

    optimizer: OptimizerConfig
    """What trains it."""


@config_class
class ExperimentConfig:
    """One entry of ``experiments`` in params.yaml."""

    students: Annotated[dict[Name, StudentConfig], Field(min_length=1)]
    """Name -> student; one for offline methods, two or more for online ones."""

    methods: list[dict[str, Any]]
    """The methods, each with its ``name``, ``weight`` and what else its config has; none is the undistilled student."""

    supervised: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Weight of what the labels teach: the cross-entropy, and what distill.train.loss has beside it."""

    auxiliary: Annotated[float, Field(ge=0, le=1e6)] = 0.4
    """Weight of what the labels teach the auxiliary head, as a multiple of supervised; matters with model.aux alone."""

    pseudo_labels: Fraction | None = None
    """To the methods, a pixel without a label has the class of which the teacher, or the mean of students that teach
    each other, is at least so sure; null leaves it without."""

    budget: Annotated[float, Field(ge=1e-3, le=1000)] = 1.0
    """A multiple of the budget, iterations or seconds, for this experiment: an undistilled student may so have the time
    that a method takes."""


@dataclass(frozen=True)
class Job:
    """One cell of the matrix."""

    experiment: Name
    seed: Seed

    def __str__(self) -> str:
        return f"{self.experiment}-s{self.seed}"


@config_class
class PlannedJob:
    """A job with what decides its students."""

    experiment: Name
    seed: Seed
    settings: ExperimentConfig
    code: str
    """See :func:`segdistill.identity.code_of`."""

    @property
    def job(self) -> Job:
        """The cell of the matrix."""
        return Job(self.experiment, self.seed)


@config_class
class CohortPlan:
    """What ``artifacts/plan/<cohort>.json`` holds: the jobs of one seed that train together."""

    protocol: DistillConfig
    jobs: Annotated[list[PlannedJob], Field(min_length=1)]


@config_class
class TeacherPlan:
    """What ``artifacts/plan/teacher.json`` holds."""

    settings: TeacherConfig
    code: str
    imported: str | None = None
    """The hash of an imported teacher's files, where they are on the machine that plans; None for a trained one."""


def jobs(run: Any, seeds: Any) -> list[Job]:
    """The matrix: every experiment under ``run`` with every one of ``seeds``, seed fastest.

    Raises:
        UserError: a name or seed that cannot be one, a repeated one, or none.
    """
    run, seeds = parse(list[Name], run, "run"), parse(list[Seed], seeds, "seeds")
    for key, values in {"run": list[Any](run), "seeds": list[Any](seeds)}.items():
        if not values:
            raise UserError(f"{key}: empty; name at least one")
        if len(set(values)) < len(values):
            repeated = next(value for value in values if values.count(value) > 1)
            raise UserError(f"{key}: repeats {repeated!r}; each may stand there once")
    require_different("run", run)
    if TEACHER in run:
        raise UserError(f"run: '{TEACHER}' is the teacher's own name in a report; give the experiment another one")
    if len(run) * len(seeds) > MOST_JOBS:
        raise UserError(f"run, seeds: {len(run)} x {len(seeds)} jobs; at most {MOST_JOBS} are one matrix")
    return [Job(experiment, seed) for experiment in run for seed in seeds]


def cohorts(run: Any, seeds: Any, size: int | None = None) -> dict[str, list[Job]]:
    """The matrix by cohort: all jobs of a seed, ``s0``, or parts of at most ``size`` jobs, ``s0-0``, ``s0-1``, ...

    A cohort of one has the job's own name, whatever stands before it in the matrix.
    """
    matrix, parts = jobs(run, seeds), {}
    for seed in seeds:
        column = [job for job in matrix if job.seed == seed]
        if size is None:
            parts[f"s{seed}"] = column
        else:
            starts = range(0, len(column), size)
            for part, start in enumerate(starts):
                name = str(column[start]) if size == 1 else f"s{seed}-{part}"
                parts[name] = column[start : start + size]
    return parts


def run_name(experiment: str, seed: int, student: str, students: Iterable[str]) -> str:
    """``kd-s0``, or ``dml.vit-s0`` where an experiment trains several students."""
    return f"{experiment}-s{seed}" if len(list(students)) == 1 else f"{experiment}.{student}-s{seed}"


def require_different(key: str, names: Iterable[str]) -> None:
    """Raises a UserError for names that a file system without upper and lower case would take for one."""
    seen: dict[str, str] = {}
    for name in names:
        former = seen.setdefault(name.lower(), name)
        if former != name:
            raise UserError(f"{key}: '{former}' and '{name}' differ in upper and lower case alone; rename one of them")


def experiments(defined: Any) -> dict[str, ExperimentConfig]:
    """All that ``experiments`` of params.yaml defines, checked: keys, values, and what goes together."""
    entries = parse(dict[Name, Any], defined, "experiments")
    require_different("experiments", entries)
    settings = {name: parse(ExperimentConfig, entry, f"experiments.{name}") for name, entry in entries.items()}
    for name, experiment in settings.items():
        require_different(f"experiments.{name}.students", experiment.students)
        parse_methods(name, experiment)
    return settings


def require_defined(matrix: Iterable[Job], defined: Iterable[str]) -> None:
    """Raises a UserError for an experiment that is run but not defined."""
    for job in matrix:
        if job.experiment not in defined:
            raise UserError(
                f"run: '{job.experiment}' is not defined under experiments{nearest(job.experiment, defined)}"
            )


def parse_methods(
    experiment: str, settings: ExperimentConfig
) -> tuple[Literal["none", "offline", "online"], list[tuple[type["Method"], Any]]]:
    """The experiment's method classes with their configs, and whether it needs a teacher.

    Raises:
        UserError: an unknown method or key, or methods and students that do not go together.
    """
    from segdistill.methods import parse_method

    where = f"experiments.{experiment}"
    parsed = [parse_method(data, f"{where}.methods.{index}") for index, data in enumerate(settings.methods)]
    kinds = {cls.kind for cls, _ in parsed}  # type: ignore[attr-defined]
    count = len(settings.students)
    if len(kinds) > 1:
        raise UserError(f"{where}.methods: offline and online methods do not go together in one experiment")
    if kinds == {"offline"} and count != 1:
        raise UserError(f"{where}.students: offline methods teach one student, not {count}")
    if kinds == {"online"} and count < 2:
        raise UserError(f"{where}.students: online methods need two students or more, not {count}")
    if not kinds and count != 1:
        raise UserError(f"{where}.methods: {count} students and no method between them; give each its own experiment")
    if settings.pseudo_labels is not None and not parsed:
        raise UserError(
            f"{where}.pseudo_labels: {settings.pseudo_labels}, and no method that learns from them; use null"
        )
    if not settings.supervised and not any(item.weight for _, item in parsed):
        raise UserError(f"{where}.supervised: 0, and no method has a weight: nothing would train the student")
    return (kinds.pop() if kinds else "none"), parsed


def teacher_plan(settings: Any) -> TeacherPlan:
    """The plan of a section ``train_teacher``."""
    config: TeacherConfig = parse(TeacherConfig, settings, "train_teacher")
    here = bool(config.folders) and all(folder.is_dir() for folder in config.folders)
    return TeacherPlan(settings=config, code=config.code, imported=files_hash(config.folders) if here else None)


def cohort_plan(protocol: Any, defined: Any, members: Iterable[Job]) -> CohortPlan:
    """The plan of one cohort.

    Args:
        protocol: section ``distill``.
        defined: ``experiments``.
        members: the cohort's jobs.

    Raises:
        UserError: a setting that is none, or an experiment that is not defined.
    """
    members = list(members)
    require_defined(members, defined)
    planned = []
    for job in members:
        where = f"experiments.{job.experiment}"
        settings: ExperimentConfig = parse(ExperimentConfig, defined[job.experiment], where)
        _, methods = parse_methods(job.experiment, settings)
        settings = replace(settings, methods=[to_dict(config) for _, config in methods])  # with their defaults
        code = code_of_job(methods)
        planned.append(PlannedJob(experiment=job.experiment, seed=job.seed, settings=settings, code=code))
    return CohortPlan(protocol=parse(DistillConfig, protocol, "distill"), jobs=planned)


def code_of_job(methods: Iterable[tuple[type["Method"], Any]]) -> str:
    """The hash of what trains a job with these methods; see :func:`parse_methods`."""
    return code_of([*TRAINING, *(cls.__module__ for cls, _ in methods)])


def read_plan(kind: type[Plan], path: Path) -> Plan:
    """What a plan's file holds.

    Raises:
        UserError: absent, damaged, or another's.
    """
    return parse(kind, read_json(path, mend="run the stage 'plan' again"), str(path))


def decisive(job: PlannedJob, protocol: DistillConfig) -> dict[str, Any]:
    """The settings that decide the students of a job."""
    return {
        **to_dict(job.settings), "inference": to_dict(protocol.inference), "train": effective(protocol.train),
    }  # fmt: skip


def method_names(methods: Iterable[Mapping[str, Any]]) -> str:
    """``kd+cwd``, or ``none``."""
    return "+".join(str(method["name"]) for method in methods) or "none"
