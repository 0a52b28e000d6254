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
        students: by name.
        methods: configs; offline ones if there is a teacher.
        seed: of all weights.
        num_classes: of the data set.
        images: likewise.
        teacher: what is known of the teacher's network.
        supervised: weight of what the labels teach.
        auxiliary: weight of what they teach the auxiliary head, times ``supervised``.
        pseudo_labels: how sure who teaches must be to give an unlabelled pixel its class; None gives none.
        loss: what the labels teach; None is the cross-entropy.
        class_weights: how much a pixel of each class counts in it; None counts all alike.

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
