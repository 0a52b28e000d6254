"""Pictures that people look at: predictions beside the truth."""

from collections.abc import Sequence

import numpy as np
from PIL import Image


def evenly_spread(length: int, number: int) -> list[int]:
    """At most so many of ``length`` positions, the first and the last among them, in order."""
    positions: list[int] = np.unique(np.linspace(0, length - 1, number).round().astype(int)).tolist()
    return positions


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
        image: [H, W, 3] uint8; truth, prediction: [H, W] uint8.
    """
    panels = [image, colorize(truth, colors), colorize(prediction, colors)]
    gap = np.full((image.shape[0], 4, 3), 255, dtype=np.uint8)
    strip = np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)
    times = max(1, -(-240 // image.shape[0]))
    return Image.fromarray(strip).resize((strip.shape[1] * times, strip.shape[0] * times), Image.Resampling.NEAREST)
