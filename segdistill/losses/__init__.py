"""Losses that several methods share: pure functions, aware of the ignore label, in float32."""

from segdistill.geometry import finest, resize_labels, size_of
from segdistill.losses.align import Projection, projection, resize_features, resize_logits
from segdistill.losses.blocks import (
    align_logits,
    images_in_blocks,
    mean_over_pixels,
    resized_in_one_block,
    sum_over_blocks,
    sum_over_images,
)
from segdistill.losses.divergence import divergence, pixel_divergence, pixel_kl
from segdistill.losses.masks import (
    IGNORE_INDEX,
    LEFT_OUT,
    UNLABELLED,
    class_members,
    counted_mask,
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
    "counted_mask",
    "cross_entropy",
    "dice",
    "divergence",
    "finest",
    "hard_cross_entropy",
    "images_in_blocks",
    "in_float32",
    "label_mass",
    "labelled_mask",
    "labelled_only",
    "lovasz_softmax",
    "masked_mean",
    "mean_over_pixels",
    "pixel_divergence",
    "pixel_kl",
    "projection",
    "resize_features",
    "resize_labels",
    "resize_logits",
    "resized_in_one_block",
    "size_of",
    "sum_over_blocks",
    "sum_over_images",
    "unit",
    "valid_mask",
    "with_pseudo_labels",
]
