"""Random augmentation as a function of (seed, sample number): no thread, process or order changes a pixel.

What happens to a sample is drawn on the CPU, as a few numbers, before its pixels are looked at. Then only the part of
the image that the crop shows is cut out, sent to the device that trains, and scaled, placed, flipped and coloured
there. A device has no say in what is drawn, and nothing waits for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from segdistill.data.settings import AugmentationConfig
from segdistill.losses.masks import IGNORE_INDEX

GREY = (0.299, 0.587, 0.114)  # the shares of red, green and blue in the brightness of a colour (ITU-R BT.601)

Area = tuple[slice, slice]
"""Rows and columns."""


@dataclass(frozen=True)
class Crop:
    """What becomes of one sample."""

    window: Area  # the part of the stored image that is shown
    place: Area  # where in the crop it is shown; around it there is void
    flip: bool
    color: tuple[float, float, float]  # factors of brightness, contrast and saturation


class Augmentation:
    """Random scale, crop, flip and colour of (image, label) pairs."""

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config

    def draw(self, size: Sequence[int], seed: int) -> Crop:
        """What becomes of an image of this height and width."""
        config, generator = self.config, torch.Generator().manual_seed(seed)
        low, high = config.scale
        factor = 1.0
        if (low, high) != (1.0, 1.0):
            factor = low + (high - low) * torch.rand((), generator=generator).item()
        sides = [
            _along_a_side(length, crop, factor, generator) for length, crop in zip(size, config.crop_size, strict=True)
        ]
        window, (rows, columns) = (sides[0][0], sides[1][0]), (sides[0][1], sides[1][1])
        flip = bool(config.flip) and torch.rand((), generator=generator).item() < config.flip
        if flip:
            columns = slice(config.crop_size[1] - columns.stop, config.crop_size[1] - columns.start)
        strength = config.color_jitter
        color = torch.empty(3).uniform_(1 - strength, 1 + strength, generator=generator).tolist() if strength else ()
        return Crop(window, (rows, columns), flip, tuple(color) or (1.0, 1.0, 1.0))

    def __call__(self, samples: Sequence[tuple[Tensor, Crop]], device: torch.device) -> tuple[Tensor, Tensor]:
        """A batch of crops, on the device. Each has the same pixels in whatever batch it is.

        Args:
            samples: the windows of their crops; see :func:`cut`.
            device: where the work is done.

        Shape:
            Windows [C + 1, H, W] uint8 or uint16. Returns [b, C, h, w] float32 in 0..1 and [b, h, w] uint8.
        """
        size, pixels = self.config.crop_size, samples[0][0]
        images = torch.zeros((len(samples), len(pixels) - 1, *size), device=device)
        labels = torch.full((len(samples), *size), IGNORE_INDEX, dtype=torch.uint8, device=device)
        for image, label, (window, crop) in zip(images, labels, samples, strict=True):
            scaled_image, scaled_label = _scaled(window.to(device, non_blocking=True), label[crop.place].shape)
            image[:, *crop.place] = scaled_image.flip(-1) if crop.flip else scaled_image
            label[crop.place] = scaled_label.flip(-1) if crop.flip else scaled_label
        if self.config.color_jitter:
            colors = torch.tensor([crop.color for _, crop in samples], pin_memory=device.type == "cuda")
            colors = colors.to(device, non_blocking=True)
            is_rgb = len(pixels) - 1 == 3 and pixels.dtype == torch.uint8
            images = jitter(images, colors) if is_rgb else jitter_channels(images, colors, white(pixels))
        else:
            images.div_(white(pixels))
        return images, labels


def white(pixels: Tensor) -> float:
    """The largest value that pixels [...] uint8 or uint16 can have."""
    return float(torch.iinfo(pixels.dtype).max)


def unit_range(pixels: Tensor) -> Tensor:
    """Pixels [...] uint8 or uint16 as networks are shown them: float32 in 0..1."""
    return pixels.float() / white(pixels)


def cut(image: np.ndarray, label: np.ndarray, window: Area, *, pinned: bool) -> Tensor:
    """The window of an image and of its label, as one tensor to send to a device.

    Args:
        pinned: in memory from which a GPU copies by itself.

    Shape:
        image: [H, W, C] uint8 or uint16; label: [H, W] uint8. Returns [C + 1, h, w] of the image's type: both.
    """
    part, dtype = label[window], torch.uint8 if image.dtype == np.uint8 else torch.uint16
    pixels = torch.empty((image.shape[2] + 1, *part.shape), dtype=dtype, pin_memory=pinned)
    planes = pixels.numpy()  # which copies without a team of threads of its own for each thread that reads
    planes[:-1] = image[window].transpose(2, 0, 1)
    planes[-1] = part
    return pixels


def jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Other brightness, contrast and saturation, in place.

    Brightness goes against black, contrast against the mean brightness, saturation against the pixel's own grey. Before
    anything is cut off at black and white these are linear, and in whatever order they come the result is the same.

    Shape:
        images: [b, 3, h, w] in 0..255, returned in 0..1; factors: [b, 3] of brightness, contrast and saturation.
    """
    brightness, contrast, saturation = (factor.view(-1, 1, 1, 1) for factor in factors.unbind(1))
    brightness = brightness / 255
    red, green, blue = images.split(1, dim=1)
    grey = (red * GREY[0]).add_(green * GREY[1]).add_(blue * GREY[2])  # [b, 1, h, w]
    constant = brightness * (1 - contrast) * grey.mean((2, 3), keepdim=True)
    grey.mul_(brightness * contrast * (1 - saturation)).add_(constant)
    return images.mul_(brightness * contrast * saturation).add_(grey).clamp_(0, 1)


def jitter_channels(images: Tensor, factors: Tensor, white: float) -> Tensor:
    """Other brightness and contrast, in place, of images whose channels are no colours.

    All channels have the same factors, and contrast goes against each channel's own mean: the brightest channel would
    decide a common one. There is no saturation where there is no grey.

    Shape:
        images: [b, C, h, w] in 0..white, returned in 0..1; factors: as of :func:`jitter`.
    """
    brightness, contrast, _ = (factor.view(-1, 1, 1, 1) for factor in factors.unbind(1))
    brightness = brightness / white
    constant = brightness * (1 - contrast) * images.mean((2, 3), keepdim=True)
    return images.mul_(brightness * contrast).add_(constant).clamp_(0, 1)


def _along_a_side(length: int, crop: int, factor: float, generator: torch.Generator) -> tuple[slice, slice]:
    """The stored pixels that a crop shows along a side, and where it shows them."""
    covered = max(1, round(crop / factor))
    if covered <= length:
        start = _below(length - covered + 1, generator)
        return slice(start, start + covered), slice(0, crop)
    filled = min(crop, max(1, round(length * factor)))
    start = crop - filled - _below(crop - filled + 1, generator)
    return slice(0, length), slice(start, start + filled)


def _below(limit: int, generator: torch.Generator) -> int:
    """Any whole number from 0 to below the limit."""
    return int(torch.randint(limit, (), generator=generator)) if limit > 1 else 0


def _scaled(pixels: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Image and label on one grid: averaged where they get smaller, the label at each centre.

    A CPU resizes bytes several times as fast as floats, and rounds to bytes; a GPU has no code for bytes. For 16 bits
    torch has hardly any code.

    Shape:
        pixels: [C + 1, H, W] uint8 or uint16; returns [C, *size] and [*size], uint8 or float32.
    """
    pixels = pixels if pixels.dtype == torch.uint8 else pixels.float()
    image, label = pixels[None, :-1], pixels[None, -1:]
    if tuple(size) != tuple(pixels.shape[1:]):
        image = F.interpolate(image.float() if image.is_cuda else image, list(size), mode="bilinear", antialias=True)
        # "nearest" takes the pixel at a cell's corner, up to half a pixel beside the image's.
        label = F.interpolate(label, list(size), mode="nearest-exact")
    return image[0], label[0, 0]
