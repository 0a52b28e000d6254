"""Textures (how a surface varies from spot to spot) and palettes, both shared among the classes on purpose.

Pavement may be as grey as the road, a fence as brown as a wall, a coat as green as a hedge: colour alone must not
tell the classes apart.
"""

from enum import IntEnum
from functools import cache

import numpy as np

from segdistill.streets._canvas import RGB, Dice

Palette = tuple[RGB, ...]

TEXELS = 64  # side of a texture, which repeats


class Texture(IntEnum):
    """Which pattern; :data:`SCALE` and :data:`STRENGTH` say how fine and how strong."""

    SMOOTH = 0
    ROUGH = 1  # asphalt, plaster
    SLABS = 2  # paving, concrete panels
    BRICKS = 3
    PLANKS = 4  # upright boards
    LEAVES = 5
    TILES = 6  # roofs
    PATCHY = 7  # dirt, worn paint


SCALE = np.array([4, 12, 16, 16, 12, 11, 10, 3], dtype=np.float32)  # texels per metre
STRENGTH = np.array([0.03, 0.20, 0.16, 0.22, 0.20, 0.55, 0.24, 0.20], dtype=np.float32)

GREYS: Palette = ((92, 92, 96), (118, 116, 114), (140, 138, 132), (104, 108, 116), (72, 72, 78), (160, 156, 150))
EARTHS: Palette = ((138, 92, 70), (160, 118, 88), (112, 78, 60), (176, 146, 112), (96, 74, 58), (188, 166, 136))
PALES: Palette = ((208, 200, 182), (222, 218, 210), (196, 190, 186), (214, 188, 158), (188, 200, 208), (236, 232, 222))
GREENS: Palette = ((70, 96, 48), (92, 116, 60), (54, 78, 46), (112, 124, 70), (78, 92, 70), (128, 118, 60))
VIVIDS: Palette = ((186, 44, 40), (38, 74, 150), (214, 176, 44), (36, 116, 84), (200, 104, 40), (110, 50, 104))
DARKS: Palette = ((36, 38, 44), (50, 46, 44), (30, 34, 52), (58, 60, 62), (44, 52, 44))
SKINS: Palette = ((224, 182, 150), (196, 144, 110), (140, 96, 70), (98, 66, 50))
COATS = DARKS + VIVIDS + GREYS + EARTHS + GREENS[:2]
PAINTS = GREYS + PALES + VIVIDS + DARKS
FACADES = EARTHS + PALES + GREYS[:3]


def value_noise(dice: Dice, width: int, height: int, cell: int) -> np.ndarray:
    """Smooth noise in [0, 1], float32 [height, width], with bumps about ``cell`` pixels wide; it repeats seamlessly."""
    rows, columns = max(height // cell, 1), max(width // cell, 1)
    lattice = dice.generator.random((rows, columns)).astype(np.float32)
    return _stretch(_stretch(lattice, height, 0), width, 1)


def _stretch(lattice: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Interpolates along one axis with the curve 3t^2 - 2t^3, which has no kinks."""
    count = lattice.shape[axis]
    place = np.arange(length, dtype=np.float64) * count / length  # exact enough for any length
    low = place.astype(np.int64)
    t = (place - low).astype(np.float32)
    t = t * t * (3.0 - 2.0 * t)
    t = t[:, None] if axis == 0 else t[None, :]
    start, end = np.take(lattice, low, axis), np.take(lattice, (low + 1) % count, axis)
    return start + (end - start) * t


@cache
def atlas() -> np.ndarray:
    """Every texture, float32 [textures, TEXELS, TEXELS] in about -1..1: row = v (up or ahead), column = u."""
    dice = Dice(2024)
    v, u = np.mgrid[0:TEXELS, 0:TEXELS]
    grain = dice.generator.random((TEXELS, TEXELS)) * 2.0 - 1.0
    clouds = value_noise(dice, TEXELS, TEXELS, 16) * 2.0 - 1.0
    blobs = value_noise(dice, TEXELS, TEXELS, 6) * 2.0 - 1.0
    fine = value_noise(dice, TEXELS, TEXELS, 3) * 2.0 - 1.0

    joints = ((u % 16) < 1) | ((v % 16) < 1)
    course = v // 4  # bricks lie in courses, every other one shifted by half a brick
    mortar = ((v % 4) == 0) | (((u + 4 * (course % 2)) % 8) == 0)
    board = dice.generator.random(TEXELS // 4)[(u // 4) % (TEXELS // 4)] * 2.0 - 1.0
    return np.stack(
        [
            clouds,
            grain * 0.6 + clouds * 0.5,
            np.where(joints, -1.0, grain * 0.3 + blobs * 0.4),
            np.where(mortar, 0.8, fine * 0.5 + grain * 0.2 - 0.3),
            np.where(u % 4 == 0, -1.0, board * 0.5 + fine * 0.3),
            fine * 0.7 + blobs * 0.6 + grain * 0.2,
            np.where(v % 4 == 0, -0.9, grain * 0.4 + fine * 0.3),
            blobs * 0.7 + grain * 0.3,
        ]
    ).astype(np.float32)
