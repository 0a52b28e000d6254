"""One scene: weather, camera, street, mask, photograph."""

import numpy as np

from segdistill.data.layouts import camvid
from segdistill.streets._canvas import SUPERSAMPLE, Canvas, Dice, Label
from segdistill.streets._light import labels, photograph, weather
from segdistill.streets._plan import camera, street
from segdistill.streets._street import paint

CLASSES = tuple((entry.name, entry.color) for entry in camvid.CLASSES)  # in the order of Label
IGNORE_INDEX = int(Label.VOID)


def scene(seed: int, index: int, size: tuple[int, int] = (128, 96)) -> tuple[np.ndarray, np.ndarray]:
    """One street scene.

    Args:
        seed: of the whole data set.
        size: width and height in pixels; the layout of a scene depends on it only through the frame it is seen in.

    Returns:
        image uint8 [H, W, 3] (RGB) and mask uint8 [H, W] (class index, 255 = void).
    """
    width, height = size
    layout, pixels = Dice(seed, index, 0), Dice(seed, index, 1)
    air = weather(layout)
    canvas = Canvas(width, height, camera(layout, width * SUPERSAMPLE, height * SUPERSAMPLE))
    paint(canvas, layout, street(layout, night=air.night))
    mask = labels(canvas, pixels, ragged=layout.between(0.3, 0.6))
    return photograph(canvas, pixels, air), mask
