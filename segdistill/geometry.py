"""The one rule of geometry: which image points a cell of a map stands for, in training, methods and evaluation alike.

Cell i of a map of stride s stands for the pixels from s*i to s*i + s - 1. A map of an image H pixels high therefore has
ceil(H / s) rows, and its last row may reach beyond the image, where the image's edge is repeated. Maps of different
strides reach differently far, so none is ever stretched over another:

    * to a finer map: bilinear between the centres of cells; what reaches beyond the finer map is cut off;
    * to a coarser map: the mean of the cells that lie in each of its cells, so that every cell gets a gradient;
    * labels, a map of stride 1, to a coarser map: the label at the centre of each cell, or the nearest in the image.

Strides are powers of two. So the sizes of two maps of one image tell how many cells of one lie along a cell of the
other (:func:`cells_within`), and nothing has to be said about strides. Where no power of two fits, the maps are of
images of different scales, or a grid has nothing to do with strides: then one is laid over the other, edge to edge.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]
"""Height and width in cells, or in pixels."""


POOLED_BY_SUMS = 8
"""On a GPU pooling gives a thread to each coarse cell; from so many cells along its side on, sums are far faster."""


def size_of(maps: Tensor) -> Size:
    """Height and width, the last two sizes."""
    return int(maps.shape[-2]), int(maps.shape[-1])


def finest(sizes: Iterable[Size]) -> Size:
    """The size with the most cells, the first of them if several have as many."""
    finest_size = (0, 0)
    for size in sizes:  # not max(key=...), at which torch.compile would break off
        if size[0] * size[1] > finest_size[0] * finest_size[1]:
            finest_size = size
    return finest_size


def cells_within(fine: Size, coarse: Size) -> int | None:
    """How many cells of the finer map lie along one of the coarser: a power of two, or None if none fits.

    At most one fits where the coarser map has two cells or more along an axis. Where it has one along both, any number
    that covers the finer map means the same, and the smallest is taken.
    """
    ratio = 1
    while any(-(-many // ratio) > few for many, few in zip(fine, coarse, strict=True)):
        ratio *= 2
    return ratio if all(-(-many // ratio) == few for many, few in zip(fine, coarse, strict=True)) else None


def resize(maps: Tensor, size: Size, *, align_corners: bool = False) -> Tensor:
    """Maps on the grid of another map of the same images, in the precision they have; the same tensor at equal sizes.

    Args:
        align_corners: how a finer map is made: false by the rule; true as public codes have it that interpolate from
            the centres of the first and last cell to those of the finer map, here before what reaches beyond is cut.

    Shape:
        maps: [B, C, h, w]; returns [B, C, *size].
    """
    old = size_of(maps)
    if old == tuple(size):
        return maps
    if old[0] >= size[0] and old[1] >= size[1]:
        return average(maps, size)
    ratio = cells_within(size, old)
    if ratio is None:
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)
    return enlarge(maps, size, ratio, align_corners=align_corners)


def enlarge(maps: Tensor, size: Size, ratio: int, *, align_corners: bool = False) -> Tensor:
    """Maps on a grid that has ``ratio`` cells along each of theirs, bilinear; see :func:`resize`.

    Shape:
        maps: [B, C, h, w]; returns [B, C, *size], size at most ratio * h and ratio * w.
    """
    if maps.is_cuda and not torch.compiler.is_exporting():
        return enlarge_by_products(maps, size, ratio, align_corners=align_corners)
    if align_corners or torch.compiler.is_exporting():  # exporters know the operator below by its sizes alone
        covered = (maps.shape[-2] * ratio, maps.shape[-1] * ratio)
        return crop(F.interpolate(maps, size=covered, mode="bilinear", align_corners=align_corners), *size)
    # F.interpolate takes sizes or factors. With both, what would be cut off is never made.
    return torch.ops.aten.upsample_bilinear2d.default(maps, size, False, float(ratio), float(ratio))  # type: ignore[no-any-return]


def enlarge_by_products(maps: Tensor, size: Size, ratio: int, *, align_corners: bool = False) -> Tensor:
    """What :func:`enlarge` gives, as two matrix products, for which a GPU needs a small part of its kernel's time.

    That kernel goes backward by atomic additions, which are slow and come in any order; products do not. Half precision
    is widened for them, so that it is rounded once, as there.

    Shape:
        maps: [B, C, h, w]; returns [B, C, *size].
    """
    wide = torch.promote_types(maps.dtype, torch.float32)
    rows, columns = (
        _shares(old, new, ratio, align_corners, maps.device, wide) for old, new in zip(size_of(maps), size, strict=True)
    )
    with torch.autocast(maps.device.type, enabled=False):
        if maps.shape[1] % 4 == 0 and maps.is_contiguous(memory_format=torch.channels_last):
            # The same from the other end, which leaves channels last; odd numbers of them are multiplied slowly.
            higher = torch.bmm(rows.expand(len(maps), -1, -1), maps.to(wide).movedim(1, -1).flatten(2))
            higher = higher.unflatten(2, (-1, maps.shape[1])).flatten(0, 1)  # [B * H, w, C]
            whole = torch.bmm(columns.expand(len(higher), -1, -1), higher)
            return whole.unflatten(0, (len(maps), -1)).movedim(-1, 1).to(maps.dtype)
        wider = (maps.to(wide) @ columns.mT).flatten(0, 1)  # [B * C, h, W]
        # Batched by hand: matmul would turn the result over in memory.
        return torch.bmm(rows.expand(len(wider), -1, -1), wider).unflatten(0, maps.shape[:2]).to(maps.dtype)


def _shares(old: int, new: int, ratio: int, align_corners: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The share of each old cell in each new one along an axis: [new, old]."""
    cells, centres = (torch.arange(count, device=device, dtype=dtype) for count in (old, new))
    if align_corners:
        centres = centres * ((old - 1) / max(old * ratio - 1, 1))
    else:
        centres = (centres + 0.5) / ratio - 0.5
    distances = (centres.clamp(0, old - 1)[:, None] - cells).abs()
    return (1 - distances).clamp_min(0)


def average(maps: Tensor, size: Size) -> Tensor:
    """The mean over the cells that lie in each cell of a coarser map, as far as they exist.

    Shape:
        maps: [..., h, w]; returns [..., *size].
    """
    if size_of(maps) == tuple(size):
        return maps
    ratio = cells_within(size_of(maps), size)
    if ratio is None:
        return F.adaptive_avg_pool2d(maps, size)
    if maps.is_cuda and ratio >= POOLED_BY_SUMS and not any(side % ratio for side in size_of(maps)):
        windows = maps.unflatten(-1, (-1, ratio)).unflatten(-3, (-1, ratio))  # [..., h, ratio, w, ratio]
        return windows.mean((-3, -1))
    return F.avg_pool2d(maps, ratio, ceil_mode=True)


def resize_labels(target: Tensor, size: Size) -> Tensor:
    """The label at the centre of each cell; the same tensor at equal sizes.

    Shape:
        target: [B, H, W]; returns [B, *size], same dtype.
    """
    old = size_of(target)
    if old == tuple(size):
        return target
    ratio = cells_within(old, size)
    scale = None if ratio is None else 1 / ratio
    # As in enlarge, an operator that takes size and factor; it keeps within the image.
    taken = torch.ops.aten._upsample_nearest_exact2d.default(target[:, None].float(), size, scale, scale)
    return taken[:, 0].to(target.dtype)


def crop(maps: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns; a view, but for an exporter.

    Shape:
        maps: [..., h, w]; returns [..., height, width].
    """
    if not torch.compiler.is_exporting():
        return maps[..., :height, :width]
    # A slice would tie an exported program to sizes for which, as in the example, it is the whole or a part.
    maps = maps.index_select(-2, torch.arange(height, device=maps.device))
    return maps.index_select(-1, torch.arange(width, device=maps.device))
