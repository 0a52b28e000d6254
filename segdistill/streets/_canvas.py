"""Dice, camera and canvas: what the street is drawn with.

The bytes of a scene must be the same on every CPU. Numbers that reach a pixel come from integer arithmetic and from
``+ - * /`` and ``sqrt`` of float64, which IEEE 754 rounds in one way only; ``exp``, ``sin`` or BLAS may differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw

T = TypeVar("T")
RGB = tuple[float, float, float]
Point = tuple[float, float]
Points = Sequence[Point]

SUPERSAMPLE = 2  # canvas pixels per picture pixel, along each side
NEAR, FAR = 0.8, 260.0  # metres; nothing is drawn nearer, and depth is clipped to both


class Label(IntEnum):
    """Class index in the mask, CamVid's order."""

    SKY = 0
    BUILDING = 1
    POLE = 2
    ROAD = 3
    PAVEMENT = 4
    TREE = 5
    SIGN = 6
    FENCE = 7
    CAR = 8
    PEDESTRIAN = 9
    BICYCLIST = 10
    VOID = 255


class Facing(IntEnum):
    """Which way a surface looks; light falls on each differently."""

    SKY = 0
    UP = 1  # the ground
    CAMERA = 2
    RIGHT = 3  # walls on the left of the street
    LEFT = 4  # walls on the right of the street
    GLOW = 5  # a lamp or a lit window: shines by itself


class Dice:
    """Random choices from a key of non-negative integers; the same key rolls the same numbers for ever."""

    def __init__(self, *key: int) -> None:
        self.generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
        self._rolls: list[float] = []

    def fork(self) -> "Dice":
        """Dice of their own for something that may need any number of rolls; costs this one a single roll."""
        return Dice(int(self.roll() * 2**53))

    def roll(self) -> float:
        """A float in [0, 1)."""
        if not self._rolls:  # rolling in blocks is ten times faster than one by one
            self._rolls = self.generator.random(512).tolist()
        return self._rolls.pop()

    def between(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * self.roll()

    def around(self, middle: float, spread: float) -> float:
        """A float within ``spread`` of ``middle``, near ``middle`` more often."""
        return middle + spread * (self.roll() + self.roll() - 1.0)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.roll() < probability

    def count(self, low: int, high: int) -> int:
        """An integer in [low, high], both included."""
        return low + int((high - low + 1) * self.roll())

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[int(len(choices) * self.roll())]

    def colour(self, palette: Sequence[RGB], jitter: float = 14.0) -> RGB:
        """A colour of the palette, varied in brightness and a little in hue."""
        red, green, blue = self.pick(palette)
        light = self.between(-jitter, jitter) * 1.5
        return (
            red + light + self.between(-jitter, jitter) * 0.5,
            green + light + self.between(-jitter, jitter) * 0.5,
            blue + light + self.between(-jitter, jitter) * 0.5,
        )


def shade(colour: RGB, factor: float) -> RGB:
    """The colour, darker (factor below 1) or lighter."""
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera; canvas pixels, metres."""

    focal: float
    centre: float  # column of the vanishing point
    horizon: float  # row of the horizon
    eye: float  # height above the ground
    bend: float  # of the road: how far the street drifts sideways, per square metre ahead

    def see(self, x: float, y: float, z: float) -> Point:
        """Where the point x metres right, y above the ground and z ahead is in the picture."""
        scale = self.focal / z
        return self.centre + scale * x + self.focal * self.bend * z, self.horizon + scale * (self.eye - y)


class Surface(NamedTuple):
    """What a polygon is made of. Its inverse depth is ``a * dx + b * dy + c``, dx and dy from the vanishing point."""

    label: int
    colour: RGB
    texture: int
    facing: int
    plane: tuple[float, float, float]


class Canvas:
    """A picture of surface numbers. One polygon sets class, colour, texture and depth together, so they cannot differ.

    ``shadow`` and ``wet`` lie on the ground only, under everything that stands on it.
    """

    def __init__(self, width: int, height: int, camera: Camera) -> None:
        self.camera = camera
        self.size = (width * SUPERSAMPLE, height * SUPERSAMPLE)
        self.numbers = Image.new("I", self.size, 0)
        self.shadow = Image.new("L", self.size, 0)
        self.wet = Image.new("L", self.size, 0)
        self.surfaces: list[Surface] = [Surface(Label.SKY, (0.0, 0.0, 0.0), 0, Facing.SKY, (0.0, 0.0, 0.0))]
        self._numbers_of: dict[Surface, int] = {}
        self._pen = ImageDraw.Draw(self.numbers)
        self._shadow_pen = ImageDraw.Draw(self.shadow)
        self._wet_pen = ImageDraw.Draw(self.wet)

    def fill(self, points: Points, surface: Surface) -> None:
        """Paints a polygon of canvas points over what is there."""
        pixels = self._pixels(points)
        if pixels is None:
            return
        number = self._numbers_of.get(surface)
        if number is None:
            number = self._numbers_of[surface] = len(self.surfaces)
            self.surfaces.append(surface)
        self._pen.polygon(pixels, fill=number)

    def darken(self, points: Points) -> None:
        """Casts a shadow on the ground."""
        if pixels := self._pixels(points):
            self._shadow_pen.polygon(pixels, fill=255)

    def pour(self, points: Points) -> None:
        """Makes a puddle on the ground."""
        if pixels := self._pixels(points):
            self._wet_pen.polygon(pixels, fill=255)

    def _pixels(self, points: Points) -> list[tuple[int, int]] | None:
        """Whole pixels; None when the polygon lies beside the picture."""
        wide, high = self.size
        columns, rows = [x for x, _ in points], [y for _, y in points]
        left, right, top, bottom = min(columns), max(columns), min(rows), max(rows)
        if right < 0 or left > wide or bottom < 0 or top > high:
            return None
        limit = 4 * wide + 4 * high
        if left < -limit or right > limit or top < -limit or bottom > limit:  # too near: Pillow wants no huge numbers
            points = [(min(max(x, -limit), limit), min(max(y, -limit), limit)) for x, y in points]
        offset = limit + 0.5  # int() rounds down where it sees positive numbers only
        return [(int(x + offset) - limit, int(y + offset) - limit) for x, y in points]
