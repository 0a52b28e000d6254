"""Cars, vans and buses, along the street and across it."""

from functools import partial

from segdistill.streets._canvas import RGB, Canvas, Dice, Label, Point
from segdistill.streets._panels import Front, Paint, Panel, Wall
from segdistill.streets._textures import DARKS, PAINTS, PALES, VIVIDS

Cabin = tuple[Point, ...]  # its outline from the side, in shares of (length, height)

CABINS: tuple[Cabin, ...] = (
    ((0.06, 0.58), (0.16, 1.0), (0.58, 1.0), (0.78, 0.6)),  # hatchback
    ((0.16, 0.6), (0.28, 1.0), (0.58, 1.0), (0.76, 0.6)),  # saloon
    ((0.02, 0.58), (0.05, 1.0), (0.64, 1.0), (0.8, 0.6)),  # estate, van
)
OF_A_CAR = partial(Paint, Label.CAR)


def car(canvas: Canvas, dice: Dice, x: float, z: float, *, away: bool, night: bool) -> None:
    """A car along the street, its near end z metres ahead: its near end and the side that the camera sees."""
    big = dice.chance(0.12)  # a van, lorry or bus
    length, width = (dice.between(5.0, 9.0), 2.2) if big else (dice.between(3.6, 4.7), dice.between(1.65, 1.85))
    height = dice.between(2.1, 3.1) if big else dice.between(1.38, 1.7)
    paint, glass = OF_A_CAR(dice.colour(PAINTS)), OF_A_CAR(dice.colour(DARKS, 10.0))
    half = width / 2
    inner = x - half if x > 0 else x + half
    near, far = Front(canvas, x, z), Front(canvas, x, z + length)
    if abs(x) > half:
        cabin = tuple((0.06, v) if big and i < 1 else (u, v) for i, (u, v) in enumerate(dice.pick(CABINS)))
        if not away:  # the bonnet is then at the near end
            cabin = tuple((1.0 - u, v) for u, v in cabin)
        _side_view(Wall(canvas, inner, z), cabin, length, height, paint, glass, box=big)
        far.box(-half, 0.3 * height, half, 0.55 * height, paint.shaded(0.8))
    waist = 0.58 * height
    near.box(-half, 0.0, -half + 0.22, 0.4, OF_A_CAR((28.0, 28.0, 30.0)))
    near.box(half - 0.22, 0.0, half, 0.4, OF_A_CAR((28.0, 28.0, 30.0)))
    inset = 0.0 if big else 0.14
    front = Front(canvas, x, z + (0.0 if big else dice.between(0.1, 0.3) if away else dice.between(0.7, 1.1)))
    front.limb((0.0, waist - 0.1), half, (0.0, height), half - inset, paint)
    left, right, top = inset + 0.12 - half, half - inset - 0.12, 0.93 * height
    front.fill([(0.1 - half, waist), (half - 0.1, waist), (right, top), (left, top)], glass)
    near.box(-half, 0.22, half, waist, paint)
    near.box(-half, 0.22, half, 0.36, paint.shaded(0.55))
    near.box(-0.26, 0.42, 0.26, 0.54, OF_A_CAR(dice.pick((PALES[5], VIVIDS[2]))))
    colour: RGB = (206.0, 36.0, 28.0) if away else (240.0, 236.0, 214.0)
    lamp = OF_A_CAR(colour, glow=night or dice.chance(0.15))
    for side in (-1.0, 1.0):
        near.box(side * half, 0.62 * waist, side * (half - 0.3), 0.92 * waist, lamp)


def crossing_car(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """A car that crosses the street, seen from its side."""
    cabin = dice.pick(CABINS)
    if dice.chance(0.5):
        cabin = tuple((1.0 - u, v) for u, v in cabin)
    length, height = dice.between(3.7, 4.7), dice.between(1.4, 1.7)
    paint, glass = OF_A_CAR(dice.colour(PAINTS)), OF_A_CAR(dice.colour(DARKS))
    _side_view(Front(canvas, x, z), cabin, length, height, paint, glass, box=False)


def _side_view(
    panel: Panel, cabin: Cabin, length: float, height: float, paint: Paint, glass: Paint, *, box: bool
) -> None:
    """A car from the side, from u = 0 on; ``box`` for vans and buses."""
    waist = 0.6 * height
    if box:
        facing_away = cabin[0][0] < 0.5
        cabin = ((0.0, 0.58), (0.0, 1.0), (0.97, 1.0), (1.0, 0.58))
        if not facing_away:
            cabin = ((1.0, 0.58), (1.0, 1.0), (0.03, 1.0), (0.0, 0.58))
    panel.fill([(length * a, height * b) for a, b in cabin], paint)
    middle = (min(a for a, _ in cabin) + max(a for a, _ in cabin)) / 2
    panel.fill(
        [(length * (middle + (a - middle) * 0.84), height * (0.95 if b > 0.9 else 0.62)) for a, b in cabin], glass
    )
    bonnet = [(length, waist * 0.92), (length * 0.8, waist), (0.05 * length, waist)]
    panel.fill([(0.0, 0.25), (length, 0.25), *bonnet], paint)
    panel.box(0.0, 0.25, length, 0.36, paint.shaded(0.55))
    for at in (0.2, 0.8):
        panel.disc(length * at, 0.31, 0.33, 0.31, OF_A_CAR((26.0, 26.0, 28.0)))
        panel.disc(length * at, 0.31, 0.18, 0.17, OF_A_CAR((130.0, 130.0, 132.0)))
