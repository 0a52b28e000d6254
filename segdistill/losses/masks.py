"""Which pixels count, which class each has, and the mean over them, without asking the device how many there are."""

import torch
from torch import Tensor

IGNORE_INDEX = 255
"""The label of a pixel that does not count at all: void, padding."""
UNLABELLED = 254
"""The label of a pixel that counts, but for which nobody drew a class."""
LEFT_OUT = -1e9
"""The logit of what is left out of a softmax. Finite, because 0 * inf is not 0; exp of it is exactly 0."""


def valid_mask(target: Tensor) -> Tensor:
    """True where a pixel counts, labelled or not: for what compares networks; any shape, bool."""
    return target != IGNORE_INDEX


def counted_mask(target: Tensor, *, mask_ignore: bool) -> Tensor:
    """:func:`valid_mask`, or true everywhere for a method that takes ignored pixels too."""
    return valid_mask(target) if mask_ignore else torch.ones_like(target, dtype=torch.bool)


def labelled_mask(target: Tensor) -> Tensor:
    """True where a pixel has a class: for what needs to know it; any shape, bool."""
    return target < UNLABELLED


def labelled_only(target: Tensor) -> Tensor:
    """The labels, with unlabelled pixels left out like void."""
    return target.masked_fill(target == UNLABELLED, IGNORE_INDEX)


def class_members(labels: Tensor, num_classes: int) -> Tensor:
    """Which pixel belongs to which class, and one without a class to none.

    Shape:
        labels: [B, h, w]; returns [B, K, h * w] bool.
    """
    classes = torch.arange(num_classes, device=labels.device)
    return labels.flatten(1)[:, None] == classes[:, None]


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of ``values`` where ``mask`` is true; over everything if it is None.

    An empty mask gives a zero that is still joined to the graph. The count is clamped rather than tested: a test would
    make the host wait for the device, and under DDP a rank that leaves the graph out hangs the others.

    Shape:
        values, mask: equal shapes; returns a scalar.
    """
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)
