"""Sums over huge maps, a block at a time: what would need the whole map keeps one block in memory."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from segdistill.geometry import Size, resize_labels, size_of
from segdistill.losses.align import resize_logits

R = TypeVar("R", Tensor, tuple[Tensor, ...])
"""What a term gives: a tensor, or several, each with a gradient of its own."""
BLOCK = 2**25
"""Elements of logits that are compared at one time, 128 MiB in float32; those of one image where it has more. Batches
of fewer, as tests and small crops have, are one block."""


def in_blocks(term: Callable[..., R], rows: Sequence[Tensor], *whole: Tensor, block: int, dim: int = 0) -> list[R]:
    """``term(*block of rows, *whole)`` for consecutive blocks of rows.

    Each block is computed again in the backward pass, so that the memory of one block bounds the memory of all. Where
    one block holds all rows, nothing is computed twice.

    Args:
        rows: tensors with equally many rows along ``dim``, cut together.
        whole: tensors that every block sees.
        block: rows a block.
    """
    if rows[0].shape[dim] <= block:
        return [term(*rows, *whole)]
    parts = zip(*(tensor.split(block, dim) for tensor in rows), strict=True)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*rows, *whole)):
        return [checkpoint(term, *part, *whole, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return [term(*part, *whole) for part in parts]


def sum_over_blocks(term: Callable[..., R], rows: Sequence[Tensor], *whole: Tensor, block: int, dim: int = 0) -> R:
    """The sum of :func:`in_blocks`: value and gradient are those of ``term(*rows, *whole)`` if that sums over rows."""
    return _sum(in_blocks(term, rows, *whole, block=block, dim=dim))


def images_at_once(logits: Tensor, size: Size) -> int:
    """How many images' logits make up a block at a size."""
    return max(1, BLOCK // (logits.shape[1] * size[0] * size[1]))


def resized_in_one_block(logits: Sequence[Tensor], size: Size, *, align_corners: bool = False) -> list[Tensor]:
    """Logits that several terms compare at a size, in float32: resized here if one block holds all, else as they are.

    Shape:
        logits: [B, K, ., .] each.
    """
    if len(logits[0]) > images_at_once(logits[0], size):
        return list(logits)
    return [resize_logits(each, size, align_corners=align_corners) for each in logits]


def align_logits(
    student: Tensor, teacher: Tensor, target: Tensor, *, upsample: bool, align_corners: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides' logits and the labels for a comparison at the labels' own size (``upsample``) or the teacher's.

    The logits have that size if they fit, see :func:`resized_in_one_block`; else what compares pixels resizes them.

    Shape:
        student, teacher: [B, K, ., .], returned as such or as [B, K, h, w]; target: [B, H, W], as [B, h, w].
    """
    size = size_of(target if upsample else teacher)
    student, teacher = resized_in_one_block([student, teacher], size, align_corners=align_corners)
    return student, teacher, resize_labels(target, size)


def images_in_blocks(
    term: Callable[..., R],
    logits: Sequence[Tensor],
    maps: Sequence[Tensor],
    size: Size,
    *,
    align_corners: bool = False,
) -> list[R]:
    """``term(*logits, *maps)`` for consecutive blocks of images, with the logits of a block resized, in float32.

    Shape:
        logits: [B, K, ., .] each; maps: [B, ...] each.
    """

    def at_size(*tensors: Tensor) -> R:
        resized = [resize_logits(each, size, align_corners=align_corners) for each in tensors[: len(logits)]]
        return term(*resized, *tensors[len(logits) :])

    return in_blocks(at_size, [*logits, *maps], block=images_at_once(logits[0], size))


def sum_over_images(
    term: Callable[..., R],
    logits: Sequence[Tensor],
    maps: Sequence[Tensor],
    size: Size,
    *,
    align_corners: bool = False,
) -> R:
    """The sum of :func:`images_in_blocks`, for a term that sums over images."""
    return _sum(images_in_blocks(term, logits, maps, size, align_corners=align_corners))


def mean_over_pixels(
    values: Callable[..., Tensor],
    logits: Sequence[Tensor],
    maps: Sequence[Tensor],
    mask: Tensor,
    *,
    align_corners: bool = False,
) -> Tensor:
    """The mean of ``values(*logits, *maps)`` where ``mask`` is true, a block of images at a time.

    An empty mask gives a zero that is still joined to the graph; see :func:`segdistill.losses.masks.masked_mean`.

    Args:
        values: of resized logits, [B, h, w].

    Shape:
        logits: [B, K, ., .] each; maps: [B, ...] each; mask: [B, h, w] bool, whose size is compared at.
    """

    def total(*tensors: Tensor) -> Tensor:
        return torch.where(tensors[-1], values(*tensors[:-1]), 0.0).sum()

    size = size_of(mask)
    return sum_over_images(total, logits, [*maps, mask], size, align_corners=align_corners) / mask.sum().clamp_min(1)


def _sum(results: Sequence[R]) -> R:
    first: Any = results[0]
    if isinstance(first, Tensor):
        return functools.reduce(operator.add, results)
    return tuple(map(_sum, zip(*results, strict=True)))  # type: ignore[return-value, call-overload, arg-type]
