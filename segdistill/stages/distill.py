"""One cell of the matrix: an experiment's student learns from the frozen teacher, or its students from each other."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from segdistill.config import Name, flatten, to_dict
from segdistill.config import config as config_class
from segdistill.engine.settings import InferenceConfig, OptimizerConfig, TrainConfig
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.files import read_sealed_json
from segdistill.identity import Identity, effective
from segdistill.models.config import ModelConfig
from segdistill.report.highlights import Highlights, trained

if TYPE_CHECKING:
    from segdistill.data.shards import DatasetInfo, ShardDataset
    from segdistill.engine.distributed import Processes
    from segdistill.engine.learner import Learner
    from segdistill.methods.method import Method
    from segdistill.models.outputs import ModelInfo
    from segdistill.models.teacher import Teacher


@config_class
class Config:
    """Section ``distill`` of params.yaml: one budget and one protocol for every experiment."""

    train: TrainConfig
    # How students, and the teacher before it teaches, are validated.
    inference: InferenceConfig
    # How far, in points of mIoU, the teacher may fall below its recorded validation score before the run stops.
    teacher_tolerance: Annotated[float, Field(ge=0, le=100)]


@config_class
class StudentConfig:
    """A network and what trains it."""

    model: ModelConfig
    optimizer: OptimizerConfig


@config_class
class ExperimentConfig:
    """One entry of ``experiments`` in params.yaml."""

    # Name -> student; one for offline methods, two or more for online ones.
    students: Annotated[dict[Name, StudentConfig], Field(min_length=1)]
    # The methods, each with its ``name``, ``weight`` and what else its config has; none is the undistilled student.
    methods: list[dict[str, Any]]
    # Weight of the cross-entropy to the labels; the auxiliary head's has ``auxiliary`` times that.
    supervised: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    auxiliary: Annotated[float, Field(ge=0, le=1e6)] = 0.4


def run(
    config: Config,
    *,
    experiment: str,
    settings: ExperimentConfig,
    seed: int,
    prepared: Path,
    teacher: Path,
    students: Path,
    tracker: Tracker,
    device: str = "auto",
    work: Path | None = None,
) -> dict[str, float]:
    """Writes ``students``: each student's weights, ``metrics.json`` and curves; returns seconds by activity."""
    from segdistill.engine.distributed import processes as join
    from segdistill.stages._training import dataset, train_and_save

    _, parsed = parse_methods(experiment, settings)
    children = {name: tracker.child(run_name(experiment, seed, name, settings)) for name in settings.students}
    facts = {"experiment": experiment, "config": to_dict(config), "settings": to_dict(settings)}
    for name, child in children.items():
        # The teacher's names, so that all runs share their columns.
        child.params(flatten({**to_dict(config), **to_dict(settings.students[name]), "seed": seed}))
        child.params(flatten({"methods": [to_dict(item) for _, item in parsed]}))
        child.tags({"experiment": experiment, "student": name, "seed": str(seed), "methods": _method_names(settings)})
    with join(device) as processes:
        info, _, val_set = dataset(prepared)
        frozen, weights = None, None
        if needs_teacher(experiment, settings):
            frozen, weights = _verified_teacher(teacher, info, val_set, config, processes)
        decisive = {
            "students": to_dict(settings.students), "methods": [to_dict(item) for _, item in parsed],
            "supervised": settings.supervised, "auxiliary": settings.auxiliary,
            "inference": to_dict(config.inference), "train": effective(config.train),
        }  # fmt: skip
        teacher_info = frozen.info if frozen else None
        learner = build_learner(experiment, settings, seed=seed, num_classes=info.num_classes, teacher=teacher_info)
        seconds = train_and_save(
            learner, config.train, {name: student.optimizer for name, student in settings.students.items()},
            prepared=prepared, output=students, inference=config.inference,
            identity=Identity(info.content_hash, weights, seed, decisive), facts=facts, trackers=children,
            processes=processes, teacher=frozen, work=work,
        )  # fmt: skip
    for child in children.values():
        child.close()
    return seconds


def needs_teacher(experiment: str, settings: ExperimentConfig) -> bool:
    """Whether the experiment's methods learn from the frozen teacher."""
    return parse_methods(experiment, settings)[0] == "offline"


def build_learner(
    experiment: str, settings: ExperimentConfig, *, seed: int, num_classes: int, teacher: "ModelInfo | None"
) -> "Learner":
    """The experiment's students and methods, drawn from the seed; for a teacher of these channels, if for one."""
    import torch

    from segdistill.engine.learner import Learner
    from segdistill.methods import build_offline, build_online
    from segdistill.models.segmenter import build_segmenter

    configs = [item for _, item in parse_methods(experiment, settings)[1]]
    torch.manual_seed(seed)
    networks = {name: build_segmenter(student.model, num_classes) for name, student in settings.students.items()}
    infos = {name: network.info for name, network in networks.items()}
    if teacher is None:
        methods = build_online(configs, infos)
    else:
        methods = build_offline(configs, infos[next(iter(infos))], teacher)
    return Learner(networks, methods, supervised=settings.supervised, auxiliary=settings.auxiliary)


def run_name(experiment: str, seed: int, student: str, settings: ExperimentConfig) -> str:
    """``kd-s0``, or ``dml.vit-s0`` where an experiment trains several students."""
    return f"{experiment}-s{seed}" if len(settings.students) == 1 else f"{experiment}.{student}-s{seed}"


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
    if not settings.supervised and not any(item.weight for _, item in parsed):
        raise UserError(f"{where}.supervised: 0, and no method has a weight: nothing would train the student")
    return (kinds.pop() if kinds else "none"), parsed


def _method_names(settings: ExperimentConfig) -> str:
    return "+".join(str(method.get("name")) for method in settings.methods) or "none"


def _verified_teacher(
    folder: Path, info: "DatasetInfo", val_set: "ShardDataset", config: Config, processes: "Processes"
) -> "tuple[Teacher, str]":
    """The teacher, evaluated before anything is distilled from it, and the hash of its weights.

    Raises:
        UserError: it is damaged or of other classes, or scores below its record by more than the tolerance.
    """
    from segdistill.engine.evaluate import evaluate
    from segdistill.models.export import load_model
    from segdistill.models.teacher import Teacher
    from segdistill.stages.train_teacher import NAME

    network, document = load_model(folder, NAME, classes=[item.name for item in info.classes])
    teacher = Teacher(network).to(processes.device)
    facts = read_sealed_json(folder, "metrics.json", mend="run the stage 'train_teacher' again")
    record = facts["students"][NAME]["val/miou"]
    found = evaluate(
        network, val_set, config.inference, num_classes=network.info.num_classes, processes=processes
    ).miou  # fmt: skip
    if 100 * (record - found) > config.teacher_tolerance:
        raise UserError(
            f"{folder}: the teacher scores {100 * found:.2f} % mIoU on the validation split, its record is "
            f"{100 * record:.2f} %; distill.teacher_tolerance allows a fall of {config.teacher_tolerance} points"
        )
    return teacher, document["sha256"]


def highlights(paths: Mapping[str, Any]) -> Highlights:
    """The validation scores."""
    return trained(paths["students"])
