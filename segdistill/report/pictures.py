"""Pictures that people look at: predictions beside the truth."""

from collections.abc import Sequence

import numpy as np
from PIL import Image


def evenly_spread(length: int, number: int) -> list[int]:
    """At most so many of ``length`` positions, the first and the last among them, in order."""
    positions: list[int] = np.unique(np.linspace(0, length - 1, number).round().astype(int)).tolist()
    return positions


def visible(pixels: np.ndarray) -> np.ndarray:
    """An image as people can look at it.

    Photographs stay as they are. Of other images the first three channels are shown as red, green and blue, the first
    alone as grey where there are fewer, each stretched from its 2nd to its 98th percentile.

    Shape:
        pixels: [H, W, C] uint8 or uint16; returns [H, W, 3] uint8.
    """
    if pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return pixels
    shown = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1]
    low, high = np.percentile(shown, (2, 98), axis=(0, 1))  # [1 or 3] each
    stretched = (shown - low) / np.maximum(high - low, 1) * 255
    return np.broadcast_to(stretched.clip(0, 255).astype(np.uint8), (*pixels.shape[:2], 3))


def colorize(labels: np.ndarray, colors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Class ids as colours; what has no class is black.

    Shape:
        labels: [H, W] uint8; returns [H, W, 3] uint8.
    """
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: len(colors)] = np.asarray(colors, dtype=np.uint8)
    return palette[labels]


def overlay(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, colors: Sequence[tuple[int, int, int]]
) -> Image.Image:
    """Image, truth and prediction side by side, at least 240 pixels high.

    Shape:
        image: [H, W, C] uint8 or uint16; truth, prediction: [H, W] uint8.
    """
    panels = [visible(image), colorize(truth, colors), colorize(prediction, colors)]
    gap = np.full((image.shape[0], 4, 3), 255, dtype=np.uint8)
    strip = np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)
    times = max(1, -(-240 // image.shape[0]))
    return Image.fromarray(strip).resize((strip.shape[1] * times, strip.shape[0] * times), Image.Resampling.NEAREST)
