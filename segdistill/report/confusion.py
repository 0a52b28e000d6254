"""Confusion as a map."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def confusion_map(confusion: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draws row-normalised confusion counts [K, K] (row: truth) into a PNG file."""
    from matplotlib.figure import Figure

    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = 2.4 + 0.42 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    # Squares, not an image: of 150 classes that would be scaled to 6000 x 6000 pixels of floats, in 1.9 GiB.
    places = range(len(names))
    axes.pcolormesh(places, places, share, cmap="Blues", vmin=0, vmax=1)
    axes.set(aspect="equal", xlabel="predicted", ylabel="truth")
    axes.invert_yaxis()
    axes.set_xticks(places, names, rotation=60, ha="right")
    axes.set_yticks(places, names)
    for row in places:
        for column in places:
            if share[row, column] >= 0.005:
                color = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, f"{100 * share[row, column]:.0f}", ha="center", va="center", color=color, size=7)
    figure.savefig(path)
