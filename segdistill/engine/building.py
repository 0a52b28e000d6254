"""Students and the methods between them, drawn from a seed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from segdistill.engine.learner import Learner
from segdistill.engine.settings import LossConfig
from segdistill.engine.supervision import Supervision
from segdistill.images import RGB, ImageFormat
from segdistill.methods import build_offline, build_online
from segdistill.models.config import ModelConfig, for_images
from segdistill.models.outputs import ModelInfo
from segdistill.models.segmenter import build_segmenter


def build_learner(
    students: Mapping[str, ModelConfig],
    methods: Sequence[Any] = (),
    *,
    seed: int,
    num_classes: int,
    images: ImageFormat = RGB,
    teacher: ModelInfo | None = None,
    supervised: float = 1.0,
    auxiliary: float = 0.4,
    pseudo_labels: float | None = None,
    loss: LossConfig | None = None,
    class_weights: Sequence[float] | None = None,
) -> Learner:
    """A learner whose weights depend on the seed alone.

    Args:
        methods: configs; offline ones if there is a teacher.
        num_classes, images: of the data set.
        supervised, auxiliary, pseudo_labels: see :class:`Learner`.
        loss, class_weights: see :class:`Supervision`.

    Raises:
        UserError: a network that cannot be built, or methods and networks that do not go together.
    """
    torch.manual_seed(seed)
    networks = {name: build_segmenter(for_images(model, images), num_classes) for name, model in students.items()}
    infos = {name: network.info for name, network in networks.items()}
    if teacher is None:
        built = build_online(methods, infos)
    else:
        built = build_offline(methods, infos[next(iter(infos))], teacher)
    return Learner(
        networks, built, supervised=supervised, auxiliary=auxiliary, pseudo_labels=pseudo_labels,
        supervision=Supervision(loss, class_weights),
    )  # fmt: skip
