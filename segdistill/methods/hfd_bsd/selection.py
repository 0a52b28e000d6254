"""Transfer from whichever of two peers is the more reliable at a place, a pixel or a region."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from segdistill.geometry import Size, average, size_of
from segdistill.losses.blocks import images_in_blocks
from segdistill.losses.divergence import divergence
from segdistill.losses.fused import fused
from segdistill.losses.masks import IGNORE_INDEX, valid_mask
from segdistill.losses.precision import in_float32
from segdistill.losses.vectors import unit

FeatureDistance = Literal["cosine", "l2", "kl"]


@torch.no_grad()
def pixel_errors(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every pixel, without gradient; 0 where there is no label.

    Shape:
        logits: [B, K, ., .], resized to the labels; labels: [B, h, w]; returns [B, h, w].
    """
    return torch.cat(images_in_blocks(_errors, [logits], [labels], size_of(labels)))


@fused
@in_float32
def _errors(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")


@torch.no_grad()
@in_float32
def region_errors(errors: Tensor, labels: Tensor, grid: Size) -> Tensor:
    """The mean of the errors over each region's labelled pixels, 0 where it has none.

    The regions are the cells of the grid if a stride has as many; else the windows of adaptive pooling, in which
    neighbours overlap where the grid does not divide the map.

    Shape:
        errors, labels: [B, h, w]; returns [B, *grid].
    """
    valid = valid_mask(labels).to(errors.dtype)
    return _regions(errors * valid, grid) / _positive(_regions(valid, grid))


def labelled_regions(labels: Tensor, grid: Size) -> Tensor:
    """Which regions have a labelled pixel: [B, *grid] bool from labels [B, h, w]."""
    return _regions(valid_mask(labels).float(), grid) > 0


def learners(first_errors: Tensor, second_errors: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first peer learns from the second and where the second from the first: from the smaller error.

    Where the errors are equal, nobody learns. Shapes are equal; ``counted`` and the two returned are bool.
    """
    return counted & (second_errors < first_errors), counted & (first_errors < second_errors)


def selected_sum(values: Tensor, selected: Tensor) -> Tensor:
    """The sum of the selected values.

    Shape:
        equal; returns a scalar.
    """
    return torch.where(selected, values, 0.0).sum()


@fused
@in_float32
def mutual_divergences(first_logits: Tensor, second_logits: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 * KL(second || first), to train the first, and the reverse, pixel by pixel; each target is detached.

    Shape:
        logits: [B, K, h, w]; returns two [B, h, w].
    """
    first, second = ((logits / temperature).log_softmax(1) for logits in (first_logits, second_logits))
    to_first, to_second = divergence(first, second.detach(), 1), divergence(second, first.detach(), 1)
    return to_first * temperature**2, to_second * temperature**2


@fused
@in_float32
def feature_distances(features: Tensor, targets: Tensor, *, distance: FeatureDistance) -> Tensor:
    """Distance of every place's vector from its target, which is detached.

    ``cosine`` is 1 - cos, half the squared distance of the unit vectors; ``l2`` the squared distance of the vectors as
    they are; ``kl`` that of KL(softmax(target) || softmax(feature)) over channels.

    Shape:
        features, targets: [B, C, h, w]; returns [B, h, w].
    """
    targets = targets.detach()
    if distance == "kl":
        return divergence(features.log_softmax(1), targets.log_softmax(1), 1)
    if distance == "l2":
        return (features - targets).square().sum(1)
    return 1 - (unit(features, dim=1) * unit(targets, dim=1)).sum(1)


@in_float32
def region_means(features: Tensor, grid: Size, labels: Tensor | None = None) -> Tensor:
    """The mean feature of each region, over all of its cells, or weighted by the labelled share of each cell.

    Shape:
        features: [B, C, h, w]; labels: [B, H, W], of any size; returns [B, C, *grid].
    """
    if labels is None:
        return average(features, grid)
    share = _regions(valid_mask(labels).to(features.dtype), size_of(features))[:, None]  # [B, 1, h, w]
    return average(features * share, grid) / _positive(average(share, grid))


def _regions(maps: Tensor, grid: Size) -> Tensor:
    return average(maps[:, None], grid)[:, 0]


def _positive(shares: Tensor) -> Tensor:
    return torch.where(shares > 0, shares, 1.0)
