"""One cohort of the matrix: students that learn from the frozen teacher, or from each other, on the same batches."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdistill.config import flatten, to_dict
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
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
    from segdistill.engine.trainer import Training
    from segdistill.models.teacher import Teacher

AGAIN = "run the stage 'distill' again"


@dataclass(frozen=True)
class Member:
    """A job of the cohort with what decides its students."""

    planned: PlannedJob
    protocol: DistillConfig
    methods: Sequence[Any]  # their configs
    needs_teacher: bool
    identity: Identity

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
            child = tracker.child(run_name(planned.experiment, planned.seed, name, settings.students))
            # The teacher's names, so that all runs share their columns.
            child.params(flatten({**to_dict(self.protocol), **to_dict(student), "seed": planned.seed}))
            child.params(flatten({"methods": settings.methods}))
            child.tags({
                "experiment": planned.experiment, "student": name, "seed": str(planned.seed),
                "methods": method_names(settings.methods), **self.identity.facts(),
            })  # fmt: skip
            children[name] = child
        return children


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
    from segdistill.data.memory import Memory
    from segdistill.engine.distributed import processes as join
    from segdistill.stages._training import dataset, forget

    cohort: CohortPlan = read_plan(CohortPlan, plan)
    protocol, work = cohort.protocol, work or students.with_name(students.name + ".work")
    spent = {"data": 0.0, "training": 0.0, "evaluation": 0.0}
    with join(device) as processes:
        info, train_set, val_set = dataset(prepared, Memory(protocol.train.cache_gib))
        members = _members(cohort, info, teacher)
        waiting = [member for member in members if not _is_there(students, member)]
        processes.barrier()  # all have seen what is there
        if processes.is_main:
            students.mkdir(parents=True, exist_ok=True)
            (students / RECORD).unlink(missing_ok=True)
            remove_others(students, {member.planned.experiment for member in members})
        frozen = None
        if any(member.needs_teacher for member in waiting):
            frozen = _verified_teacher(teacher, info, val_set, protocol, processes)
        # A clock that several trainings share is not the clock of one.
        for group in [waiting] if protocol.train.iterations else [[member] for member in waiting]:
            if group:
                seconds = _train(group, protocol, info, train_set, val_set, frozen, students, work, tracker, processes)
                spent = {activity: spent[activity] + seconds[activity] for activity in spent}
        if processes.is_main:
            write_record(students, [member.planned.job for member in members])
            forget(work)
        processes.barrier()
    return spent


def _members(cohort: CohortPlan, info: "DatasetInfo", teacher: Path) -> list[Member]:
    weights = read_sealed_json(teacher, f"{TEACHER}.json", mend="run the stage 'train_teacher' again").get("sha256")
    members = []
    for planned in cohort.jobs:
        kind, methods = parse_methods(planned.experiment, planned.settings)
        identity = Identity(
            info.content_hash, weights if kind == "offline" else None, planned.seed,
            decisive(planned, cohort.protocol), code_of_job(methods),
        )  # fmt: skip
        configs = [config for _, config in methods]
        members.append(Member(planned, cohort.protocol, configs, kind == "offline", identity))
    return members


def _is_there(students: Path, member: Member) -> bool:
    folder = students / member.planned.experiment
    return member.identity.key in (made_by(folder, TRAINED), made_by(folder, DIVERGED))


def _train(
    group: Sequence[Member],
    protocol: DistillConfig,
    info: "DatasetInfo",
    train_set: "ShardDataset",
    val_set: "ShardDataset",
    frozen: "Teacher | None",
    students: Path,
    work: Path,
    tracker: Tracker,
    processes: "Processes",
) -> dict[str, float]:
    """Trains some members on the same batches and writes what they gave; returns seconds by activity."""
    from segdistill.engine.cohort import Cohort
    from segdistill.engine.trainer import Diverged
    from segdistill.stages._training import write

    trackers = {member.planned.experiment: member.trackers(tracker) for member in group}
    trainings = [_training(member, info, frozen, work, trackers[member.planned.experiment]) for member in group]
    cohort = Cohort(
        trainings, train_set, val_set, protocol.train, inference=protocol.inference, seed=group[0].planned.seed,
        teacher=frozen, processes=processes,
    )  # fmt: skip
    outcomes = cohort.run()
    for member, training in zip(group, trainings, strict=True):
        outcome, output = outcomes[training.name], students / member.planned.experiment
        if not processes.is_main:
            continue
        if isinstance(outcome, Diverged):
            _record_divergence(output, member, outcome.iteration, outcome.reason)
        else:
            write(
                output, training.learner, outcome, info, identity=member.identity, facts=member.facts,
                trackers=training.trackers,
            )  # fmt: skip
        for child in training.trackers.values():
            if isinstance(outcome, Diverged):
                child.tags({"diverged": f"at iteration {outcome.iteration}: {outcome.reason}"})
            child.close("FAILED" if isinstance(outcome, Diverged) else "FINISHED")
    processes.barrier()
    return cohort.seconds


def _training(
    member: Member, info: "DatasetInfo", frozen: "Teacher | None", work: Path, trackers: Mapping[str, Tracker]
) -> "Training":
    from segdistill.engine.building import build_learner
    from segdistill.engine.trainer import Training

    planned = member.planned
    students = planned.settings.students
    learner = build_learner(
        {name: student.model for name, student in students.items()}, member.methods, seed=planned.seed,
        num_classes=info.num_classes, teacher=frozen.info if frozen and member.needs_teacher else None,
        supervised=planned.settings.supervised, auxiliary=planned.settings.auxiliary,
    )  # fmt: skip
    return Training(
        name=planned.experiment,
        learner=learner,
        optimizers={name: student.optimizer for name, student in students.items()},
        fingerprint=member.identity.key,
        work=work / planned.experiment,
        trackers=trackers,
        budget=planned.settings.budget,
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
    from segdistill.models.export import load_model
    from segdistill.models.teacher import Teacher

    network, _ = load_model(folder, TEACHER, classes=[item.name for item in info.classes])
    teacher = Teacher(network).to(processes.device)
    facts = read_sealed_json(folder, "metrics.json", mend="run the stage 'train_teacher' again")
    record = facts["students"][TEACHER]["val/miou"]
    miou = evaluate(
        network, val_set, config.inference, num_classes=network.info.num_classes, processes=processes
    ).miou  # fmt: skip
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
