"""Losses: pure functions, aware of the ignore label, in float32."""

from segdistill.geometry import finest, resize_labels, size_of
from segdistill.losses.align import Projection, projection, resize_features, resize_logits
from segdistill.losses.blocks import sum_over_blocks
from segdistill.losses.masks import IGNORE_INDEX, masked_mean, valid_mask
from segdistill.losses.memory import ClassQueues, class_means, gather_batches, random_members
from segdistill.losses.pixelwise import pixel_kl
from segdistill.losses.precision import in_float32
from segdistill.losses.prototypes import Perspective, Scope, class_members, local_perspective, present_classes, unit
from segdistill.losses.supervised import cross_entropy

__all__ = [
    "IGNORE_INDEX",
    "ClassQueues",
    "Perspective",
    "Projection",
    "Scope",
    "class_means",
    "class_members",
    "cross_entropy",
    "finest",
    "gather_batches",
    "in_float32",
    "local_perspective",
    "masked_mean",
    "pixel_kl",
    "present_classes",
    "projection",
    "random_members",
    "resize_features",
    "resize_labels",
    "resize_logits",
    "size_of",
    "sum_over_blocks",
    "unit",
    "valid_mask",
]
