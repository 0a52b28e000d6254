"""Losses that several methods share: pure functions, aware of the ignore label, in float32."""

from segdistill.geometry import finest, resize_labels, size_of
from segdistill.losses.align import Projection, align_logits, projection, resize_features, resize_logits
from segdistill.losses.blocks import sum_over_blocks
from segdistill.losses.divergence import divergence, pixel_kl
from segdistill.losses.masks import (
    IGNORE_INDEX,
    LEFT_OUT,
    UNLABELLED,
    class_members,
    labelled_mask,
    labelled_only,
    masked_mean,
    valid_mask,
)
from segdistill.losses.precision import in_float32
from segdistill.losses.pseudo_labels import with_pseudo_labels
from segdistill.losses.supervised import (
    above_zero,
    cross_entropy,
    dice,
    hard_cross_entropy,
    label_mass,
    lovasz_softmax,
)
from segdistill.losses.vectors import unit

__all__ = [
    "IGNORE_INDEX",
    "LEFT_OUT",
    "UNLABELLED",
    "Projection",
    "above_zero",
    "align_logits",
    "class_members",
    "cross_entropy",
    "dice",
    "divergence",
    "finest",
    "hard_cross_entropy",
    "in_float32",
    "label_mass",
    "labelled_mask",
    "labelled_only",
    "lovasz_softmax",
    "masked_mean",
    "pixel_kl",
    "projection",
    "resize_features",
    "resize_labels",
    "resize_logits",
    "size_of",
    "sum_over_blocks",
    "unit",
    "valid_mask",
    "with_pseudo_labels",
]
