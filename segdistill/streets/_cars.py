"""Cars, vans and buses, along the street and across it."""

from segdistill.streets._canvas import RGB, Canvas, Dice, Label, shade
from segdistill.streets._panels import Front, Panel, Wall
from segdistill.streets._textures import DARKS, PAINTS, PALES, VIVIDS

# Side views in shares of (length, height): the outline of the cabin, and its windows.
CABINS: tuple[tuple[tuple[float, float], ...], ...] = (
    ((0.06, 0.58), (0.16, 1.0), (0.58, 1.0), (0.78, 0.6)),  # hatchback
    ((0.16, 0.6), (0.28, 1.0), (0.58, 1.0), (0.76, 0.6)),  # saloon
    ((0.02, 0.58), (0.05, 1.0), (0.64, 1.0), (0.8, 0.6)),  # estate, van
)


def car(canvas: Canvas, dice: Dice, x: float, z: float, *, away: bool, night: bool) -> None:
    """A car along the street, its near end z metres ahead: its near end and the side that the camera sees."""
    big = dice.chance(0.12)  # a van, lorry or bus
    length, width = (dice.between(5.0, 9.0), 2.2) if big else (dice.between(3.6, 4.7), dice.between(1.65, 1.85))
    height = dice.between(2.1, 3.1) if big else dice.between(1.38, 1.7)
    paint, glass = dice.colour(PAINTS), dice.colour(DARKS, 10.0)
    inner = x - width / 2 if x > 0 else x + width / 2
    near, far = Front(canvas, x, z), Front(canvas, x, z + length)
    if abs(x) > width / 2:
        cabin = tuple((0.06, v) if big and i < 1 else (u, v) for i, (u, v) in enumerate(dice.pick(CABINS)))
        if not away:  # the bonnet is then at the near end
            cabin = tuple((1.0 - u, v) for u, v in cabin)
        side_view(Wall(canvas, inner, z), cabin, 0.0, length, height, paint, glass, box=big)
        far.box(-width / 2, 0.3 * height, width / 2, 0.55 * height, Label.CAR, shade(paint, 0.8))
    half = width / 2
    waist = 0.58 * height
    near.box(-half, 0.0, -half + 0.22, 0.4, Label.CAR, (28.0, 28.0, 30.0))
    near.box(half - 0.22, 0.0, half, 0.4, Label.CAR, (28.0, 28.0, 30.0))
    inset = 0.0 if big else 0.14
    cabin_front = Front(canvas, x, z + (0.0 if big else dice.between(0.1, 0.3) if away else dice.between(0.7, 1.1)))
    cabin_front.fill(
        [(-half, waist - 0.1), (half, waist - 0.1), (half - inset, height), (inset - half, height)], Label.CAR, paint
    )
    cabin_front.fill(
        [
            (0.1 - half, waist),
            (half - 0.1, waist),
            (half - inset - 0.12, 0.93 * height),
            (inset + 0.12 - half, 0.93 * height),
        ],
        Label.CAR,
        glass,
    )
    near.box(-half, 0.22, half, waist, Label.CAR, paint)
    near.box(-half, 0.22, half, 0.36, Label.CAR, shade(paint, 0.55))
    near.box(-0.26, 0.42, 0.26, 0.54, Label.CAR, dice.pick((PALES[5], VIVIDS[2])))
    lamp: RGB = (206.0, 36.0, 28.0) if away else (240.0, 236.0, 214.0)
    shining = night or dice.chance(0.15)
    for side in (-1.0, 1.0):
        near.box(side * half, 0.62 * waist, side * (half - 0.3), 0.92 * waist, Label.CAR, lamp, glow=shining)


def side_view(
    panel: Panel,
    cabin: tuple[tuple[float, float], ...],
    u: float,
    length: float,
    height: float,
    paint: RGB,
    glass: RGB,
    *,
    box: bool,
) -> None:
    """A car from the side, from u to u + length; ``box`` for vans and buses."""
    waist = 0.6 * height
    if box:
        cabin = (
            ((0.0, 0.58), (0.0, 1.0), (0.97, 1.0), (1.0, 0.58))
            if cabin[0][0] < 0.5
            else ((1.0, 0.58), (1.0, 1.0), (0.03, 1.0), (0.0, 0.58))
        )
    panel.fill([(u + length * a, height * b) for a, b in cabin], Label.CAR, paint)
    middle = (min(a for a, _ in cabin) + max(a for a, _ in cabin)) / 2
    pane = [(u + length * (middle + (a - middle) * 0.84), height * (0.95 if b > 0.9 else 0.62)) for a, b in cabin]
    panel.fill(pane, Label.CAR, glass)
    panel.fill(
        [
            (u, 0.25),
            (u + length, 0.25),
            (u + length, waist * 0.92),
            (u + length * 0.8, waist),
            (u + 0.05 * length, waist),
        ],
        Label.CAR,
        paint,
    )
    panel.box(u, 0.25, u + length, 0.36, Label.CAR, shade(paint, 0.55))
    for at in (0.2, 0.8):
        panel.disc(u + length * at, 0.31, 0.33, 0.31, Label.CAR, (26.0, 26.0, 28.0))
        panel.disc(u + length * at, 0.31, 0.18, 0.17, Label.CAR, (130.0, 130.0, 132.0))


def crossing_car(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """A car that crosses the street, seen from its side."""
    cabin = dice.pick(CABINS)
    if dice.chance(0.5):
        cabin = tuple((1.0 - u, v) for u, v in cabin)
    side_view(
        Front(canvas, x, z),
        cabin,
        0.0,
        dice.between(3.7, 4.7),
        dice.between(1.4, 1.7),
        dice.colour(PAINTS),
        dice.colour(DARKS),
        box=False,
    )
