"""A network on images: class scores at the size of the labels, and the classes that they say, a band of rows at a time.

The scores of all classes are by far the largest thing that an evaluation makes: 1.2 GB for one image of 2048 x 1024
pixels and 150 classes. Nobody needs them at once. A row of them depends on a few rows of the network's own, smaller
map, and a pixel's class on that pixel. On a CPU bands give the very bits of the whole where sizes are halves or doubles
of each other; where they have no common raster, the whole is one band.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from segdistill.engine.settings import InferenceConfig
from segdistill.geometry import Size, size_of
from segdistill.models.outputs import Network
from segdistill.models.segmenter import logits_at

BAND = 2**17  # pixels of an image, over all views: half a MiB of scores a class; smaller images are one band
STEP = 32  # rows; so bands begin where a vector of the CPU does, which computes its remainder in another way

Rows = Callable[[int, int], Tensor]
"""The rows of a map from one number up to another: [B, K, rows, W]."""


@dataclass(frozen=True)
class Views:
    """How often and in which ways a network is shown an image; the classes are those of the mean."""

    settings: InferenceConfig
    flip: bool = False  # mirrored, too
    scales: tuple[float, ...] = (1.0,)  # each times that of the settings

    @property
    def several(self) -> bool:
        """Whether there is something to average: then scores are probabilities, else logits."""
        return self.flip or len(self.scales) > 1


@dataclass(frozen=True)
class Prediction:
    """What a network says of some images of one size."""

    classes: Tensor  # [B, H, W] int64, the class with the highest score
    probability: Tensor | None  # [B, H, W] float32, of that class; None where nobody asked for it
    finite: Tensor  # [] bool, whether the scores are numbers, without waiting for the device


def predict(network: Network, images: Tensor, size: Size, views: Views, *, probability: bool = False) -> Prediction:
    """The classes of the pixels of a label of this size; see :func:`class_scores`."""
    classes, probabilities, finite = list[Tensor](), list[Tensor](), list[Tensor]()
    for scores in class_scores(network, images, size, views):
        highest, winners = scores.max(1)
        classes.append(winners)
        finite.append(highest.isfinite().all())  # a NaN among the scores comes out as the highest
        if probability:
            probabilities.append(highest if views.several else (highest - scores.logsumexp(1)).exp())
    return Prediction(
        torch.cat(classes, 1), torch.cat(probabilities, 1) if probability else None, torch.stack(finite).all()
    )


def class_scores(network: Network, images: Tensor, size: Size, views: Views) -> Iterator[Tensor]:
    """Bands of class scores, top to bottom: logits of one view, mean softmax of several (flips, scales).

    Shape:
        images: [B, 3, H, W] float RGB in 0..1; yields [B, K, rows, size[1]] float32.
    """
    settings = views.settings
    sides = [_scaled(size_of(images), settings.input_scale * scale) for scale in views.scales]
    sights = [(side, mirrored) for side in sides for mirrored in ((False, True) if views.flip else (False,))]
    maps = [_view(network, images, size, settings, side, mirrored) for side, mirrored in sights]
    step = math.lcm(STEP, *(size[0] // math.gcd(side[0], size[0]) for side in sides))
    rows = max(1, BAND // (size[1] * len(maps)) // step) * step
    for top in range(0, size[0], rows):
        bottom = min(top + rows, size[0])
        if views.several:
            yield torch.stack([logits(top, bottom).softmax(1) for logits in maps]).mean(0)
        else:
            yield maps[0](top, bottom)


def _scaled(size: Size, scale: float) -> Size:
    height, width = (max(1, round(length * scale)) for length in size)
    return height, width


def _view(network: Network, images: Tensor, size: Size, settings: InferenceConfig, side: Size, mirrored: bool) -> Rows:
    """Logits of the images shown at the size ``side``, at label size."""
    if side != size_of(images):
        # By size, as the logits come back: by factor, the image's edge would be cut off where sizes are rounded.
        smaller = side[0] < images.shape[-2] or side[1] < images.shape[-1]
        images = functional.interpolate(images, size=side, mode="bilinear", antialias=smaller)
    if mirrored:
        images = images.flip(-1)
    logits = _slide(network, images, settings) if settings.window else _full_size(network, images)

    def upright(top: int, bottom: int) -> Tensor:
        rows = logits(top, bottom)
        return rows.flip(-1) if mirrored else rows

    return upright if side == size else _resized(upright, side, size)


def _full_size(network: Network, images: Tensor) -> Rows:
    """Logits at the size of the images."""
    logits, stride = network.logits(images), network.info.logits_stride
    channels_last = logits.is_contiguous(memory_format=torch.channels_last)

    def dense(maps: Tensor) -> Tensor:
        # Where it is, code of its own interpolates maps with channels last, and rounds differently.
        return maps.contiguous(memory_format=torch.channels_last) if channels_last else maps

    def rows(top: int, bottom: int) -> Tensor:
        first = max(0, top // stride - 1)  # one cell more at either end, between whose centres and ours rows lie
        cells = dense(logits[..., first : -(-bottom // stride) + 1, :])
        maps = logits_at(cells, (bottom - first * stride, images.shape[-1]), stride)
        return dense(maps[..., top - first * stride :, :])

    return rows


def _resized(rows: Rows, old: Size, new: Size) -> Rows:
    """A map resized, whose bands begin where a row of one size begins with a row of the other."""
    periods = math.gcd(old[0], new[0])
    before, after = old[0] // periods, new[0] // periods

    def resized(top: int, bottom: int) -> Tensor:
        first, last = max(0, top // after - 1), min(periods, -(-bottom // after) + 1)
        source = rows(first * before, last * before)
        size = ((last - first) * after, new[1])
        whole = functional.interpolate(source, size=size, mode="bilinear", align_corners=False)
        return whole[..., top - first * after : bottom - first * after, :]

    return resized


def _slide(network: Network, images: Tensor, settings: InferenceConfig) -> Rows:
    """Logits of overlapping windows, averaged by how often a pixel was seen."""
    assert settings.window is not None
    height, width = size_of(images)
    window = (min(settings.window[0], height), min(settings.window[1], width))
    windows = [
        (start, left, _full_size(network, images[..., start : start + window[0], left : left + window[1]]))
        for start in _starts(height, window[0], settings.window_stride)
        for left in _starts(width, window[1], settings.window_stride)
    ]

    def rows(top: int, bottom: int) -> Tensor:
        total: Tensor | None = None
        hits = images.new_zeros((1, 1, bottom - top, width))
        for start, left, logits in windows:
            first, last = max(top, start), min(bottom, start + window[0])
            if first >= last:
                continue
            seen = logits(first - start, last - start)
            total = seen.new_zeros((*seen.shape[:2], bottom - top, width)) if total is None else total
            area = (..., slice(first - top, last - top), slice(left, left + window[1]))
            total[area] += seen
            hits[area] += 1
        assert total is not None
        return total / hits

    return rows


def _starts(length: int, window: int, stride: float) -> list[int]:
    """Where windows begin so that they cover the length; the last one ends with it."""
    step = max(1, int(window * stride))
    return sorted({*range(0, length - window, step), length - window})
