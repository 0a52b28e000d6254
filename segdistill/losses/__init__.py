"""Losses: pure functions, aware of the ignore label, in float32."""

from segdistill.losses.align import (
    Projection,
    finest,
    projection,
    resize_features,
    resize_labels,
    resize_logits,
    size_of,
)
from segdistill.losses.blocks import sum_over_blocks
from segdistill.losses.masks import IGNORE_INDEX, masked_mean, valid_mask
from segdistill.losses.pixelwise import pixel_kl
from segdistill.losses.precision import in_float32
from segdistill.losses.prototypes import Perspective, Scope, class_members, local_perspective, present_classes, unit
from segdistill.losses.supervised import cross_entropy

__all__ = [
    "IGNORE_INDEX",
    "Perspective",
    "Projection",
    "Scope",
    "class_members",
    "cross_entropy",
    "finest",
    "in_float32",
    "local_perspective",
    "masked_mean",
    "pixel_kl",
    "present_classes",
    "projection",
    "resize_features",
    "resize_labels",
    "resize_logits",
    "size_of",
    "sum_over_blocks",
    "unit",
    "valid_mask",
]
