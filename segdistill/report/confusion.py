"""Confusion as a map."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


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
