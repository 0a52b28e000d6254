"""One cohort of the matrix: students that learn from the frozen teacher, or from each other, on the same batches."""

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from segdistill.config import flatten, to_dict
from segdistill.engine.tracker import Tracker
from segdistill.errors import Interrupted, UserError
from segdistill.files import new_folder, read_sealed_json, seal
from segdistill.identity import Identity
from segdistill.plan import (
    DIVERGED,
    TEACHER,
    TRAINED,
    CohortPlan,
    DistillConfig,
    PlannedJob,
    code_of_job,
    decisive,
    method_names,
    parse_methods,
    read_plan,
    run_name,
)
from segdistill.report.highlights import Highlights, scores_of
from segdistill.stages._cohort import RECORD, diverged, job_folders, made_by, remove_others, write_record

if TYPE_CHECKING:
    from segdistill.data.shards import DatasetInfo, ShardDataset
    from segdistill.engine.distributed import Processes
    from segdistill.engine.evaluate import Evaluation
    from segdistill.engine.progress import Advance
    from segdistill.engine.trainer import Ended, Result, Training
    from segdistill.models.teacher import Teacher

T = TypeVar("T")

AGAIN = "run the stage 'distill' again"
# What a step takes, compared with that of an undistilled CNN: as measured with the default networks on a CPU.
STEP, WITH_METHODS, TEACHER_PASS = {"cnn": 1.0, "vit": 1.7}, 1.1, 1.0


@dataclass(frozen=True)
class Member:
    """A job of the cohort with what decides its students."""

    planned: PlannedJob
    protocol: DistillConfig
    methods: Sequence[Any]  # their configs
    needs_teacher: bool
    identity: Identity
    trial: str = ""  # what tells it from other members of this experiment
    judge: "Callable[[int, Mapping[str, Evaluation]], None] | None" = None  # see Training

    @property
    def name(self) -> str:
        """Its own among the members."""
        return f"{self.planned.experiment}-{self.trial}" if self.trial else self.planned.experiment

    @functools.cached_property
    def cost(self) -> float:
        """How long it trains, compared with an undistilled CNN on the plan's budget; the teacher's pass aside."""
        from segdistill.stages._networks import kind_of

        settings = self.planned.settings
        students = sum(STEP[kind_of(student.model)] for student in settings.students.values())
        return students * settings.budget * (WITH_METHODS if self.methods else 1.0)

    @property
    def facts(self) -> dict[str, Any]:
        """What is written beside its students, or in place of them."""
        planned = self.planned
        facts = {"config": to_dict(self.protocol), "settings": to_dict(planned.settings)}
        return {"experiment": planned.experiment, "seed": planned.seed, **self.identity.facts(), **facts}

    def trackers(self, tracker: Tracker) -> dict[str, Tracker]:
        """A run for each student, told what it is."""
        planned, children = self.planned, {}
        settings = planned.settings
        for name, student in settings.students.items():
            run = run_name(planned.experiment, planned.seed, name, settings.students)
            child = tracker.child(f"{run}-{self.trial}" if self.trial else run)
            # The teacher's names, so that all runs share their columns.
            child.params(flatten({**to_dict(self.protocol), **to_dict(student), "seed": planned.seed}))
            child.params(flatten({"methods": settings.methods}))
            child.tags({
                "experiment": planned.experiment, "student": name, "seed": str(planned.seed),
                "methods": method_names(settings.methods), **self.identity.facts(),
                **({"trial": self.trial} if self.trial else {}),
            })  # fmt: skip
            children[name] = child
        return children


@dataclass(frozen=True)
class Common:
    """What members that train together have in common."""

    protocol: DistillConfig
    info: "DatasetInfo"
    train_set: "ShardDataset"
    val_set: "ShardDataset"
    unlabelled_set: "ShardDataset | None"
    teacher: "Teacher | None"
    class_weights: Sequence[float] | None  # how much a pixel of each counts
    processes: "Processes"
    work: Path  # for checkpoints, a folder a member
    advanced: "Callable[[Advance], None]"  # is told how far they are


def run(
    *,
    plan: Path,
    prepared: Path,
    teacher: Path,
    students: Path,
    tracker: Tracker,
    device: str = "auto",
    work: Path | None = None,
) -> dict[str, float]:
    """Writes ``students``: a folder an experiment with each student's weights, ``metrics.json`` and curves.

    Students that are there with the same identity stay; what a former plan has left goes. A job that diverges leaves
    ``diverged.json`` in place of its students. Checkpoints lie in ``work``, by default beside the output in
    ``<students>.work``, until the output is complete.

    Returns:
        Seconds by activity.
    """
    from segdistill.data.shards import read_dataset_info
    from segdistill.engine.distributed import processes as join
    from segdistill.stages._training import forget

    cohort: CohortPlan = read_plan(CohortPlan, plan)
    protocol, work = cohort.protocol, work or students.with_name(students.name + ".work")
    with join(device) as processes:
        info, weights = read_dataset_info(prepared), teacher_hash(teacher)
        members = [as_member(planned, protocol, info.content_hash, weights) for planned in cohort.jobs]
        waiting = [member for member in members if not _is_there(students, member)]
        processes.barrier()  # all have seen what is there
        if processes.is_main:
            students.mkdir(parents=True, exist_ok=True)
            (students / RECORD).unlink(missing_ok=True)
            remove_others(students, {member.planned.experiment for member in members})

        def train(group: Sequence[Member], common: Common) -> dict[str, float]:
            return _train(group, common, students, tracker)

        spent = in_parts(waiting, protocol, prepared, teacher, work, processes, train)
        if processes.is_main:
            write_record(students, [member.planned.job for member in members])
            forget(work)
        processes.barrier()
    totals = [sum(map(Counter, groups), Counter[str]()) for groups in spent]
    return max(map(dict, totals), key=lambda seconds: sum(seconds.values()), default={})


def in_parts(
    members: Sequence[Member],
    protocol: DistillConfig,
    prepared: Path,
    teacher: Path,
    work: Path,
    processes: "Processes",
    act: Callable[[Sequence[Member], Common], T],
    *,
    kind: str = "student",
    before: float = 0.0,
    share: float = 1.0,
) -> list[list[T]]:
    """Calls ``act`` with members that train together, in as many processes as pay; what it gave, by process.

    ``kind``, ``before`` and ``share`` are those of the :class:`TrainingBar`.

    Raises:
        UserError: the teacher is not what was trained; see :func:`_verified_teacher`.
    """
    from segdistill.data.memory import Memory
    from segdistill.engine.parts import divided, run_parts
    from segdistill.engine.progress import TrainingBar
    from segdistill.engine.supervision import class_weights
    from segdistill.stages._training import dataset, unlabelled_set

    # Those that the teacher teaches last: where many members are divided, few parts need it. A clock that several
    # trainings share is not the clock of one.
    members = sorted(members, key=lambda member: member.needs_teacher)
    parts = (
        [[part] for part in divided(members, cost_of, processes)]
        if protocol.train.iterations
        else [[[member] for member in members]]
    )
    room = protocol.train.cache_gib
    memory = Memory(room if room == "auto" else room / max(1, len(parts)))
    info, train_set, val_set = dataset(prepared, memory)
    beside = unlabelled_set(prepared, protocol.train.unlabelled, memory)
    weights = class_weights(protocol.train.loss, prepared, "distill.train.loss")

    together = [group for groups in parts for group in groups]
    bar = TrainingBar(
        kind, [[member.name for member in group] for group in together],
        [cost_of(group) for group in together], before=before, share=share,
        enabled=processes.is_main,
    )  # fmt: skip

    def run_part(number: int, groups: Sequence[Sequence[Member]]) -> list[T]:
        frozen = None
        if any(member.needs_teacher for group in groups for member in group):
            frozen = _verified_teacher(teacher, info, val_set, protocol, processes)
        first = sum(map(len, parts[:number]))
        common = Common(protocol, info, train_set, val_set, beside, frozen, weights, processes, work, bar.update)
        return [
            act(group, replace(common, advanced=functools.partial(bar.update, group=first + index)))
            for index, group in enumerate(groups)
        ]

    tasks = [functools.partial(run_part, number, groups) for number, groups in enumerate(parts)]
    with bar:
        return run_parts(tasks, processes, bar)


def cost_of(group: Sequence[Member]) -> float:
    """How long members train that train together; see :attr:`Member.cost`."""
    taught = max((member.planned.settings.budget for member in group if member.needs_teacher), default=0.0)
    return TEACHER_PASS * taught + sum(member.cost for member in group)


def teacher_hash(teacher: Path) -> str | None:
    """The SHA-256 of the teacher's weights."""
    weights = read_sealed_json(teacher, f"{TEACHER}.json", mend="run the stage 'train_teacher' again").get("sha256")
    return None if weights is None else str(weights)


def as_member(planned: PlannedJob, protocol: DistillConfig, data: str, teacher: str | None) -> Member:
    """A job with its identity; see :class:`Identity` for the hashes of the data and of the teacher."""
    kind, methods = parse_methods(planned.experiment, planned.settings)
    identity = Identity(
        data, teacher if kind == "offline" else None, planned.seed, decisive(planned, protocol), code_of_job(methods)
    )  # fmt: skip
    return Member(planned, protocol, [config for _, config in methods], kind == "offline", identity)


def _is_there(students: Path, member: Member) -> bool:
    folder = students / member.planned.experiment
    return member.identity.key in (made_by(folder, TRAINED), made_by(folder, DIVERGED))


def _train(group: Sequence[Member], common: Common, students: Path, tracker: Tracker) -> dict[str, float]:
    """Trains some members on the same batches and writes what they gave; returns seconds by activity."""
    from segdistill.engine.trainer import Ended
    from segdistill.stages._training import write

    def keep(member: Member, training: "Training", outcome: "Result | Ended") -> None:
        output = students / member.planned.experiment
        if isinstance(outcome, Ended):
            _record_divergence(output, member, outcome.iteration, outcome.reason)
        else:
            write(
                output, training.learner, outcome, common.info, identity=member.identity, facts=member.facts,
                trackers=training.trackers,
            )  # fmt: skip

    return train_together(group, common, tracker, keep)


def train_together(
    group: Sequence[Member],
    common: Common,
    tracker: Tracker,
    keep: "Callable[[Member, Training, Result | Ended], None]",
) -> dict[str, float]:
    """Trains some members on the same batches; returns seconds by activity.

    Args:
        group: the members, all of one seed.
        common: what they share.
        tracker: their runs become its children.
        keep: is given, by the main process, each member with what became of it, before its runs are closed.
    """
    from segdistill.engine.cohort import Cohort
    from segdistill.engine.trainer import Diverged

    trackers = {member.name: member.trackers(tracker) for member in group}
    trainings = [_training(member, common, trackers[member.name]) for member in group]
    cohort = Cohort(
        trainings, common.train_set, common.val_set, common.protocol.train, inference=common.protocol.inference,
        seed=group[0].planned.seed, teacher=common.teacher, processes=common.processes,
        unlabelled_set=common.unlabelled_set, advanced=common.advanced,
    )  # fmt: skip
    with _ended(trackers.values()):
        outcomes = cohort.run()
    for member, training in zip(group, trainings, strict=True):
        outcome = outcomes[training.name]
        if not common.processes.is_main:
            continue
        keep(member, training, outcome)
        for child in training.trackers.values():
            child.close("FAILED" if isinstance(outcome, Diverged) else "FINISHED")
    common.processes.barrier()
    return cohort.seconds


@contextlib.contextmanager
def _ended(trackers: Iterable[Mapping[str, Tracker]]) -> Iterator[None]:
    """Ends the runs with what became of them, if the training did not come to its end."""
    status = "FAILED"
    try:
        yield
        status = ""
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        for child in (child for children in trackers for child in children.values() if status):
            child.close(status)


def _training(member: Member, common: Common, trackers: Mapping[str, Tracker]) -> "Training":
    from segdistill.engine.building import build_learner
    from segdistill.engine.trainer import Training

    planned, frozen = member.planned, common.teacher
    students = planned.settings.students
    learner = build_learner(
        {name: student.model for name, student in students.items()}, member.methods, seed=planned.seed,
        num_classes=common.info.num_classes, images=common.info.images,
        teacher=frozen.info if frozen and member.needs_teacher else None,
        supervised=planned.settings.supervised, auxiliary=planned.settings.auxiliary,
        pseudo_labels=planned.settings.pseudo_labels, loss=member.protocol.train.loss,
        class_weights=common.class_weights,
    )  # fmt: skip
    return Training(
        name=member.name,
        learner=learner,
        optimizers={name: student.optimizer for name, student in students.items()},
        fingerprint=member.identity.key,
        work=common.work / member.name,
        trackers=trackers,
        budget=planned.settings.budget,
        judge=member.judge,
    )


def _record_divergence(output: Path, member: Member, iteration: int, reason: str) -> None:
    record = {
        **member.facts, "students": list(member.planned.settings.students), "iteration": iteration, "reason": reason,
    }  # fmt: skip
    with new_folder(output) as partial:
        (partial / DIVERGED).write_text(json.dumps(record, indent=2) + "\n")
        seal(partial)


def _verified_teacher(
    folder: Path, info: "DatasetInfo", val_set: "ShardDataset", config: DistillConfig, processes: "Processes"
) -> "Teacher":
    """The teacher, evaluated before anything is distilled from it.

    Raises:
        UserError: it is damaged or of other classes, or scores below its record by more than the tolerance.
    """
    from segdistill.engine.evaluate import evaluate
    from segdistill.engine.inference import Views
    from segdistill.models.export import load_model
    from segdistill.models.teacher import Teacher

    network, _ = load_model(folder, TEACHER, classes=[item.name for item in info.classes])
    teacher = Teacher(network).to(processes.device)
    facts = read_sealed_json(folder, "metrics.json", mend="run the stage 'train_teacher' again")
    record = facts["students"][TEACHER]["val/miou"]
    views = Views(config.inference)
    miou = evaluate(network, val_set, views, num_classes=network.info.num_classes, processes=processes).miou
    if 100 * (record - miou) > config.teacher_tolerance:
        raise UserError(
            f"{folder}: the teacher scores {100 * miou:.2f} % mIoU on the validation split, its record is "
            f"{100 * record:.2f} %; distill.teacher_tolerance allows a fall of {config.teacher_tolerance} points"
        )
    return teacher


def highlights(paths: Mapping[str, Any]) -> Highlights:
    """The validation scores of all students."""
    networks: dict[str, Any] = {}
    for job, folder in job_folders(paths["students"], AGAIN).items():
        if not diverged(folder):
            scores = read_sealed_json(folder, "metrics.json", mend=AGAIN)["students"]
            networks |= {f"{job.experiment}.{name}": values for name, values in scores.items()}
    return Highlights(scores=scores_of(networks, ("val/miou", "val/pixel_accuracy")))
