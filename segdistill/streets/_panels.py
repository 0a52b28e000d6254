"""Planes of the street to draw on in metres: house walls, the ground, and whatever faces the camera."""

import math
from typing import NamedTuple

from segdistill.streets._canvas import NEAR, RGB, Canvas, Facing, Point, Points, Surface, shade

STATIONS = (3.0, 6.0, 12.0, 20.0, 30.0, 42.0, 60.0, 90.0, 140.0)  # metres ahead at which long bands may turn


def _circle() -> tuple[Point, ...]:
    eighth = math.sqrt(0.5)
    far, near = math.sqrt((1 + eighth) / 2), math.sqrt((1 - eighth) / 2)  # cosine and sine of 22.5 degrees
    quarter = [(1.0, 0.0), (far, near), (eighth, eighth), (near, far)]
    half = quarter + [(-s, c) for c, s in quarter]
    return tuple(half + [(-c, -s) for c, s in half])


CIRCLE = _circle()  # 16 points


class Paint(NamedTuple):
    """What something drawn on a panel is, and how it looks."""

    label: int
    colour: RGB
    texture: int = 0
    glow: bool = False

    def shaded(self, factor: float) -> "Paint":
        """The paint, darker (factor below 1) or lighter."""
        return self._replace(colour=shade(self.colour, factor))


class Panel:
    """A plane in the street to draw on, in metres: u along it, v up (or ahead, on the ground)."""

    def __init__(self, canvas: Canvas, facing: Facing, plane: tuple[float, float, float]) -> None:
        self.canvas, self.camera, self.facing, self.plane = canvas, canvas.camera, facing, plane
        self.label: int | None = None  # when set, all that is drawn has it: a person on a poster belongs to the wall

    def at(self, u: float, v: float) -> Point:
        """The canvas point of (u, v)."""
        raise NotImplementedError

    def fill(self, points: Points, paint: Paint) -> None:
        """Paints a polygon of (u, v) points."""
        facing = Facing.GLOW if paint.glow else self.facing
        label = paint.label if self.label is None else self.label
        surface = Surface(label, paint.colour, paint.texture, facing, self.plane)
        self.canvas.fill([self.at(u, v) for u, v in points], surface)

    def box(self, u0: float, v0: float, u1: float, v1: float, paint: Paint) -> None:
        """Paints a rectangle with opposite corners (u0, v0) and (u1, v1)."""
        self.fill([(u0, v0), (u1, v0), (u1, v1), (u0, v1)], paint)

    def disc(self, u: float, v: float, radius_u: float, radius_v: float, paint: Paint) -> None:
        """Paints an ellipse."""
        self.fill([(u + radius_u * c, v + radius_v * s) for c, s in CIRCLE], paint)

    def limb(self, start: Point, half: float, end: Point, half_end: float, paint: Paint) -> None:
        """Paints what goes up or down from one point to another, so wide to each side there and there."""
        (u0, v0), (u1, v1) = start, end
        self.fill([(u0 - half, v0), (u0 + half, v0), (u1 + half_end, v1), (u1 - half_end, v1)], paint)


class Front(Panel):
    """A plane that looks at the camera, z metres ahead; u = 0 is x metres to the right."""

    def __init__(self, canvas: Canvas, x: float, z: float) -> None:
        super().__init__(canvas, Facing.CAMERA, (0.0, 0.0, 1.0 / z))
        self.x, self.z = x, z

    def at(self, u: float, v: float) -> Point:
        return self.camera.see(self.x + u, v, self.z)


class Wall(Panel):
    """A plane along the street, x metres to the side; u = 0 is z metres ahead."""

    def __init__(self, canvas: Canvas, x: float, z: float) -> None:
        facing = Facing.RIGHT if x < 0 else Facing.LEFT
        plane = (1.0 / (canvas.camera.focal * x), 0.0, 0.0) if abs(x) > 0.3 else (0.0, 0.0, 1.0 / z)
        super().__init__(canvas, facing, plane)
        self.x, self.z = x, z

    def at(self, u: float, v: float) -> Point:
        return self.camera.see(self.x, v, max(self.z + u, NEAR))


class Ground(Panel):
    """The ground: u = x, v = z."""

    def __init__(self, canvas: Canvas) -> None:
        super().__init__(canvas, Facing.UP, (0.0, 1.0 / (canvas.camera.focal * canvas.camera.eye), 0.0))

    def at(self, u: float, v: float) -> Point:
        return self.camera.see(u, 0.0, max(v, NEAR))

    def strip(self, u0: float, u1: float, z0: float, z1: float, paint: Paint) -> None:
        """Paints the band from u0 to u1 between z0 and z1; it follows the bend of the road."""
        depths = [z0, *(z for z in STATIONS if z0 < z < z1), z1]
        self.fill([(u0, z) for z in depths] + [(u1, z) for z in reversed(depths)], paint)
