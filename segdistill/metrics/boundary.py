"""Boundary IoU: the IoU of each class over the pixels near the edge of its region, in truth or prediction.

Near is within 2 % of the image's diagonal, at least a pixel, along rows and columns; the image's border is an edge.
Regions are of whole classes, and counts are summed over images, as for mIoU. A pixel without a label counts nowhere,
but it ends the region beside it.

Reference: Cheng, Girshick, Dollár, Berg, Kirillov, Boundary IoU: Improving Object-Centric Image Segmentation
Evaluation, CVPR 2021, arXiv:2103.16562, with the dilation ratio of its code.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

DILATION_RATIO = 0.02


def boundary_counts(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """What Boundary IoU depends on, as ``iou_counts`` has it for IoU, without waiting for the device.

    Shape:
        prediction, target: [B, H, W] integers, classes below K or ``ignore_index``; result: [3, K] int64, over all
        images the pixels in the intersection, in the truth's boundary, in the prediction's.
    """
    distance = max(1, round(DILATION_RATIO * math.hypot(*target.shape[-2:])))
    labelled = target != ignore_index
    truth, guess = (near_edges(classes, distance) & labelled for classes in (target, prediction))
    counts = torch.zeros((3, num_classes + 1), dtype=torch.int64, device=target.device)  # the last takes all others
    one = torch.ones((), dtype=torch.int64, device=target.device)
    kinds = ((truth & guess & (prediction == target), target), (truth, target), (guess, prediction))
    for count, (where, classes) in zip(counts, kinds, strict=True):
        bins = torch.where(where, classes, num_classes).flatten().long()
        count.scatter_add_(0, bins, one.expand_as(bins))
    return counts[:, :-1]


def near_edges(classes: Tensor, distance: int) -> Tensor:
    """The pixels in whose square of ``2 * distance + 1`` pixels there is another class, or the image ends.

    Shape:
        classes: [B, H, W] integers; result: [B, H, W] bool.
    """
    padded = functional.pad(classes.int(), (distance,) * 4, value=-1)
    side = 2 * distance + 1
    below = _sums(padded[:, 1:] != padded[:, :-1], side - 1, side)
    beside = _sums(padded[:, :, 1:] != padded[:, :, :-1], side, side - 1)
    return below + beside > 0


def _sums(flags: Tensor, height: int, width: int) -> Tensor:
    """How many flags are set in each window, by sums from the corner: the cost is the same for any window."""
    sums = functional.pad(flags.cumsum(-1, dtype=torch.int32).cumsum(-2, dtype=torch.int32), (1, 0, 1, 0))
    rows = sums[:, height:] - sums[:, :-height]
    return rows[:, :, width:] - rows[:, :, :-width]
