"""Pictures that people look at: predictions beside the truth, and confusion as a map."""

from collections.abc import Sequence
from pathlib import Path

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


def confusion_map(confusion: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draws row-normalised confusion counts [K, K] (row: truth) into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = 2.4 + 0.42 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    for row in range(len(names)):
        for column in range(len(names)):
            if share[row, column] >= 0.005:
                color = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, f"{100 * share[row, column]:.0f}", ha="center", va="center", color=color, size=7)
    FigureCanvasAgg(figure).print_png(path)
