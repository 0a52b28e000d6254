"""The losses against the labels."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from segdistill.geometry import size_of
from segdistill.losses.align import resize_logits
from segdistill.losses.blocks import images_at_once, images_in_blocks, sum_over_images
from segdistill.losses.masks import IGNORE_INDEX, class_members, labelled_mask, labelled_only
from segdistill.losses.precision import in_float32


@in_float32
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    mass: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Cross-entropy at label size: the mean over the labelled pixels of the batch, 0 with a graph if there are none.

    Args:
        mass: what the sum is divided by where this is a part of a larger batch, the :func:`label_mass` of an average
            part: the mean over the parts is then that over all labelled pixels. None is for a batch of its own.
        class_weights: how much a pixel of each class counts; None is alike.

    Shape:
        logits: [B, K, h, w], resized to the labels here.
        target: [B, H, W] int64.
        mass: scalar; class_weights: [K].
    """
    weights = None if class_weights is None else class_weights.to(logits)

    def total(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, weights, ignore_index=IGNORE_INDEX, reduction="sum")

    losses = sum_over_images(total, [logits], [labelled_only(target)], size_of(target), align_corners=align_corners)
    return losses / (above_zero(label_mass(target, class_weights)) if mass is None else mass)


def label_mass(target: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """What a sum over labelled pixels is divided by for their mean: how many there are, or the sum of their weights.

    Shape:
        target: any integers; class_weights: [K]; returns a scalar.
    """
    labelled = labelled_mask(target)
    return labelled.sum() if class_weights is None else _pixel_weights(target, labelled, class_weights).sum()


def above_zero(mass: Tensor) -> Tensor:
    """A mass, or 1 where it is 0, as is then the sum that is divided by it. Nothing waits for the device."""
    return torch.where(mass > 0, mass, 1)


def _pixel_weights(target: Tensor, counted: Tensor, class_weights: Tensor) -> Tensor:
    """The weight of each pixel's class where it is counted, else 0."""
    return torch.where(counted, class_weights[target.long().masked_fill(~counted, 0)], 0)


@in_float32
def hard_cross_entropy(
    logits: Tensor, target: Tensor, *, threshold: float, min_kept: int, class_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy at label size over hard pixels: the mean over them, 0 with a graph if no pixel is labelled.

    A labelled pixel is hard where the probability of its class is below the threshold. If fewer are than ``min_kept``
    an image, the hardest up to as many are taken, and those that are as hard as the last of them.

    Args:
        class_weights: how much a hard pixel of each class counts, not how hard it is; None is alike.

    Shape:
        logits: [B, K, h, w]; target: [B, H, W] int64; class_weights: [K].

    Reference:
        Shrivastava et al., CVPR 2016, arXiv:1604.03540, for regions; pixels of a batch and a threshold as public code
        for segmentation has them.
    """

    def pixel_losses(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")

    labelled = labelled_mask(target)
    losses = torch.cat(images_in_blocks(pixel_losses, [logits], [labelled_only(target)], size_of(target)))  # [B, H, W]
    hardness = losses.detach().masked_fill(~labelled, -1.0)
    count = min(min_kept * len(target), target.numel())
    last = hardness.flatten().topk(count, sorted=False).values.min()  # of the min_kept; -1 if fewer are labelled
    below = -math.log(threshold) if threshold else math.inf
    hard = labelled & ((hardness > below) | (hardness >= last))
    weights = hard.to(losses) if class_weights is None else _pixel_weights(target, hard, class_weights.to(losses))
    return (losses * weights).sum() / above_zero(weights.sum())


@in_float32
def dice(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss at label size, over the labelled pixels of the batch; 0 with a graph if there are none.

        mean over the classes c of the labels of  1 - 2 sum_i p_ic y_ic / (sum_i p_ic + sum_i y_ic)

    with p = softmax over classes and y the labels. Milletari et al. square both terms below the line, which for labels
    of 0 and 1 changes that of p alone; most public code does not. segmentation-models-pytorch's has the same
    formula, but takes the mean over all classes, those of which there is no pixel with 0.

    Shape:
        logits: [B, K, h, w]; target: [B, H, W] int64.

    Reference:
        Milletari et al., 3DV 2016, arXiv:1606.04797.
    """

    def sums(logits: Tensor, target: Tensor) -> Tensor:
        probabilities = logits.softmax(1).flatten(2)  # [B, K, N]
        members = class_members(labelled_only(target), logits.shape[1])
        labelled = labelled_mask(target).flatten(1)[:, None]
        parts = (torch.where(members, probabilities, 0), torch.where(labelled, probabilities, 0), members)
        return torch.stack([part.sum((0, 2)).to(probabilities) for part in parts])

    shared, predicted, labels = sum_over_images(sums, [logits], [target], size_of(target))  # [K] each
    losses = 1 - 2 * shared / (predicted + labels).clamp_min(1)  # of a class that is there at least 1
    return _mean_of_present(losses, labels)


@in_float32
def lovasz_softmax(logits: Tensor, target: Tensor) -> Tensor:
    """Lovasz-softmax at label size, over the labelled pixels of the batch; 0 with a graph if there are none.

    The mean over the classes of the labels of the Lovasz extension of the Jaccard loss at the errors |y - p|, with
    p = softmax over classes: sum_i m_i (J({1..i}) - J({1..i-1})), where m are the errors from the largest on, and
    J(M) = |M| / |pixels of the class or in M| is 1 - IoU if the pixels of M, and no others, are wrong. The differences
    are taken as fractions of counts: differences of fractions near 1 have few digits left in float32 (gradients wrong
    by 2 % at 1024 x 1024 pixels).

    Ours rather than segmentation-models-pytorch's, which takes those differences, gives no scalar for a batch without
    labels, and waits for the device at each class.

    Shape:
        logits: [B, K, h, w]; target: [B, H, W] int64.

    Reference:
        Berman et al., CVPR 2018, arXiv:1705.08790.
    """
    num_classes, size, labels = logits.shape[1], size_of(target), labelled_only(target)
    with torch.no_grad():
        slopes = logits.new_empty(len(logits), num_classes, *size)  # first the probabilities, in whose place they come
        count = images_at_once(logits, size)
        for block, part in zip(slopes.split(count), logits.split(count), strict=True):
            torch.softmax(resize_logits(part, size), 1, out=block)
        labelled = labelled_mask(target).flatten()
        for number in range(num_classes):  # one at a time: sorting needs several times the memory of what it sorts
            errors, members = slopes[:, number].flatten(), (labels == number).flatten()  # [P]
            errors = torch.where(members, 1 - errors, errors)
            slopes[:, number] = _jaccard_steps(errors, members, labelled).view_as(target)

    def sums(logits: Tensor, target: Tensor, slopes: Tensor) -> Tensor:
        probabilities = logits.softmax(1).flatten(2)  # [B, K, N]
        members = class_members(labelled_only(target), num_classes)
        errors = torch.where(members, 1 - probabilities, probabilities)
        losses = torch.where(labelled_mask(target).flatten(1)[:, None], errors * slopes.flatten(2), 0)
        return torch.stack([part.sum((0, 2)).to(losses) for part in (losses, members)])

    return _mean_of_present(*sum_over_images(sums, [logits], [target, slopes], size))


def _jaccard_steps(errors: Tensor, members: Tensor, labelled: Tensor) -> Tensor:
    """By how much the Jaccard loss rises when each pixel, from the largest error on, becomes a wrong one.

    Shape:
        errors, members, labelled: [P]; returns [P], without meaning where there is no label.
    """
    order = errors.masked_fill(~labelled, -1.0).argsort(descending=True)  # those without labels come last
    inside = members[order]
    total = inside.sum()
    intersection, union = total - inside.cumsum(0), (total + (~inside).cumsum(0)).to(errors)
    # A pixel of the class: I falls by one. Another: U rises by one, and I / (U - 1) - I / U = I / U / (U - 1).
    steps = torch.where(inside, 1 / union, intersection / union / (union - 1).clamp_min(1))
    return torch.empty_like(errors).scatter_(0, order, steps)


def _mean_of_present(losses: Tensor, labels: Tensor) -> Tensor:
    """The mean over the classes of which there are labels.

    Shape:
        losses, labels: [K]; returns a scalar.
    """
    present = labels > 0
    return torch.where(present, losses, 0).sum() / above_zero(present.sum())
