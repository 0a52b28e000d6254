"""Whether the networks and methods of params.yaml can be built, and go together, before anything is trained."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdistill.errors import UserError
from segdistill.images import ImageFormat
from segdistill.models.config import ModelConfig, for_images
from segdistill.plan import ExperimentConfig, TeacherConfig, parse_methods

if TYPE_CHECKING:
    from segdistill.models.segmenter import Segmenter

CLASSES = 19  # any number does: no method and no network depends on it
_KINDS: dict[str, str] = {}
_BUILT: set[str] = set()  # what went together before in this process; a submission looks at the same file twice


def check(teacher: TeacherConfig, experiments: Mapping[str, ExperimentConfig], *, outlines: bool, files: bool) -> None:
    """Raises a UserError for what the first training of its kind would refuse.

    Args:
        teacher: section ``train_teacher``.
        experiments: all that are defined.
        outlines: whether to build networks and methods, without memory for their parameters where the libraries let us.
            A process that does cannot fork any more (engine/parts.py): some compute while they are built.
        files: whether the files that are named must exist; they need not where another machine trains.
    """
    from torch import nn

    from segdistill.models.network import resolve_encoder
    from segdistill.models.teachers import family_of, require_labels
    from segdistill.models.weights import local_weights_path

    models = {"train_teacher": teacher.model}
    for name, settings in experiments.items():
        models |= {f"experiments.{name}.students.{key}": student.model for key, student in settings.students.items()}
        for key in settings.students:
            if hasattr(nn.ModuleDict(), key):
                raise UserError(f"experiments.{name}.students.{key}: the name '{key}' is taken by torch's modules")
    for where, model in models.items():
        with _at(f"{where}."):
            resolve_encoder(model.encoder, model.architecture)
            if files and model.encoder_weights not in ("none", "imagenet"):
                local_weights_path(model.encoder_weights)
    imported = teacher.folders if files else []
    with _at("train_teacher.import_from: "):
        for folder in imported:
            family_of(folder)
    if imported:
        require_labels(imported, teacher.labels)
    for name, settings in experiments.items():
        for index, (_, method) in enumerate(parse_methods(name, settings)[1]):
            for path in _paths(method):
                if files and not path.is_file():
                    raise UserError(f"experiments.{name}.methods.{index}: {path}: no such file")
    asked = repr((teacher.model, imported, experiments))
    if outlines and asked not in _BUILT:
        _build(teacher.model, imported, experiments, models)
        _BUILT.add(asked)


def _paths(config: Any) -> list[Path]:
    values = [getattr(config, field.name) for field in dataclasses.fields(config)]
    return [value for value in values if isinstance(value, Path)]


@contextlib.contextmanager
def _at(where: str) -> Any:
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}{error}") from None


def _build(
    teacher: ModelConfig,
    imported: Sequence[Path],
    experiments: Mapping[str, ExperimentConfig],
    models: Mapping[str, ModelConfig],
) -> None:
    import torch

    from segdistill.methods import build_offline, build_online
    from segdistill.models.teachers import outline as teacher_outline

    built: dict[str, Segmenter] = {}
    for where, model in models.items():
        if repr(model) not in built:
            with _at(f"{where}."):
                built[repr(model)] = outline(model)
    teaching = built[repr(teacher)].info
    if imported:
        with _at("train_teacher.import_from: "):
            teaching = dataclasses.replace(teacher_outline(imported), num_classes=CLASSES)
    for name, settings in experiments.items():
        kind, parsed = parse_methods(name, settings)
        configs = [config for _, config in parsed]
        if any(not path.is_file() for config in configs for path in _paths(config)):
            continue  # on the machine that trains
        students = {key: built[repr(student.model)] for key, student in settings.students.items()}
        infos = {key: student.info for key, student in students.items()}
        with _at(f"experiments.{name}: "), torch.random.fork_rng(devices=[]), torch.device("meta"):
            if kind == "offline":
                methods = build_offline(configs, next(iter(infos.values())), teaching)
            else:
                methods = build_online(configs, infos)
            for method in methods.values():
                method.attach(students)


def kind_of(config: ModelConfig) -> str:
    """Whether it attends; see :class:`segdistill.models.outputs.ModelInfo`."""
    if repr(config) not in _KINDS:
        _KINDS[repr(config)] = outline(config).info.kind
    return _KINDS[repr(config)]


def outline(config: ModelConfig) -> "Segmenter":
    """The network without memory for its parameters; with it where an encoder reads values while it is built."""
    import torch

    from segdistill.models.segmenter import Segmenter

    if config.channels:  # of a data set that is not looked at here
        config = for_images(config, ImageFormat(channels=max(3, *(channel + 1 for channel in config.channels))))
    with contextlib.suppress(UserError), torch.device("meta"):
        return Segmenter(config, CLASSES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a process that has used several cannot fork any more; see engine/parts.py
    try:
        with torch.random.fork_rng(devices=[]):
            return Segmenter(config, CLASSES)
    finally:
        torch.set_num_threads(threads)
