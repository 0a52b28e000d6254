"""Houses, blocks, garden walls and fences: what lines the street."""

from dataclasses import dataclass
from functools import partial

from segdistill.streets._canvas import RGB, Canvas, Dice, Label, Surface
from segdistill.streets._panels import Front, Paint, Panel, Wall
from segdistill.streets._people import person
from segdistill.streets._textures import DARKS, EARTHS, FACADES, GREENS, GREYS, PALES, VIVIDS, Texture

SMALLEST = 3.0  # canvas pixels; smaller windows are left out
OF_A_HOUSE, OF_A_FENCE, OF_A_SIGN = (partial(Paint, label) for label in (Label.BUILDING, Label.FENCE, Label.SIGN))
WALLS = (Texture.BRICKS, Texture.ROUGH, Texture.SMOOTH, Texture.SLABS, Texture.PATCHY, Texture.PLANKS)


@dataclass(frozen=True)
class Facade:
    """What the walls of one building share."""

    wall: Paint
    panes: tuple[RGB, ...]
    frame: Paint
    floor: float  # height of a storey, metres
    bay: float  # distance from window to window, metres
    pane: float  # share of a bay that is window
    lit: float  # share of the windows that shine (at night)
    shop: bool


def facade(dice: Dice, *, night: bool, shops: float) -> Facade:
    """A random kind of facade."""
    tall_glass = dice.chance(0.12)
    return Facade(
        wall=OF_A_HOUSE(dice.colour(GREYS + DARKS if tall_glass else (*FACADES, GREENS[4])), dice.pick(WALLS)),
        panes=(dice.colour(DARKS), dice.colour(DARKS), (136.0, 152.0, 172.0), dice.colour(GREYS + GREENS)),
        frame=OF_A_HOUSE(dice.colour(PALES + DARKS)),
        floor=dice.between(2.7, 3.5),
        bay=dice.between(1.6, 3.6),
        pane=0.85 if tall_glass else dice.between(0.35, 0.6),
        lit=dice.between(0.1, 0.5) if night else 0.0,
        shop=dice.chance(shops),
    )


def building(
    canvas: Canvas, dice: Dice, x: float, z0: float, z1: float, height: float, style: Facade, exposed: bool
) -> None:
    """A building whose long side stands along the street at x, from z0 to z1, with its near end and roof.

    The windows of the near end are painted only if it is ``exposed``: no neighbour stands before it.
    """
    side = 1.0 if x > 0 else -1.0
    depth = dice.between(8.0, 12.0)
    pitched = height < 11.0 and dice.chance(0.7)
    ridge = height + dice.between(1.8, 3.2)
    roof = dice.colour(EARTHS + GREYS + DARKS)
    end, long = Front(canvas, x, z0), Wall(canvas, x, z0)
    if dice.chance(0.4):
        _chimney(canvas, dice, x + side * dice.between(1.0, 4.0), z1, ridge if pitched else height)
    if pitched:
        peak, eaves = (x + side * depth / 2, ridge), (x - side * 0.3, height - 0.1)
        slope = [canvas.camera.see(*edge, z) for edge, z in ((eaves, z0), (peak, z0), (peak, z1), (eaves, z1))]
        canvas.fill(slope, Surface(Label.BUILDING, roof, Texture.TILES, long.facing, (0.0, 0.0, 2.0 / (z0 + z1))))
        end.fill([(0, height), (side * depth / 2, ridge), (side * depth, height)], style.wall)
    end.box(0, 0, side * depth, height, style.wall)
    if exposed:
        _windows(end, dice, style, 0.0, side * depth, 0.0, height)
    long.box(0, 0, z1 - z0, height, style.wall)
    if not pitched and dice.chance(0.6):
        parapet = style.wall.shaded(dice.between(0.6, 1.25))._replace(texture=Texture.SMOOTH)
        long.box(0, height - 0.4, z1 - z0, height, parapet)
    _windows(long, dice, style, 0.0, z1 - z0, style.floor if style.shop else 0.0, height)
    if style.shop:
        _shop(long, dice, z1 - z0, style)
    else:
        door = dice.between(0.3, max(z1 - z0 - 1.5, 0.4))
        paint = OF_A_HOUSE(dice.colour(VIVIDS + DARKS + EARTHS + GREENS), Texture.PLANKS)
        long.box(door, 0.0, door + 1.1, 2.2, paint)
    if dice.chance(0.3):
        _mural(long, dice, z1 - z0, height)
    if dice.chance(0.15):  # a drainpipe is part of the building, though it looks like a pole
        at = dice.between(0.0, z1 - z0)
        long.box(at, 0, at + 0.2, height, OF_A_HOUSE(dice.colour(GREYS + DARKS)))


def _chimney(canvas: Canvas, dice: Dice, x: float, z: float, top: float) -> None:
    width, height = dice.between(0.6, 1.0), dice.between(0.8, 1.8)
    bricks = OF_A_HOUSE(dice.colour(EARTHS + GREYS), Texture.BRICKS)
    Front(canvas, x, z).box(0, top - 3.0, width, top + height, bricks)


def _windows(panel: Panel, dice: Dice, style: Facade, u0: float, u1: float, v0: float, v1: float) -> None:
    bays, floors = int(abs(u1 - u0) / style.bay), int((v1 - v0) / style.floor)
    if not bays or not floors:
        return
    dice = dice.fork()  # which windows are too small depends on the picture's size; what comes next must not
    step = (u1 - u0) / bays
    width, tall = step * style.pane, style.floor * min(style.pane + 0.12, 0.9)
    for bay in range(bays):
        left = u0 + step * bay + (step - width) / 2
        (x0, y0), (x1, y1) = panel.at(left, v0 + 1.0), panel.at(left + width, v0 + 1.0 + tall)
        if abs(x1 - x0) < SMALLEST or abs(y1 - y0) < SMALLEST:
            continue
        for floor in range(floors):
            bottom = v0 + style.floor * floor + (style.floor - tall) * 0.6
            if abs(x1 - x0) > 6 * SMALLEST:
                panel.box(left - 0.1, bottom - 0.1, left + width + 0.1, bottom + tall + 0.1, style.frame)
            lit = style.lit > 0 and dice.chance(style.lit)
            pane = (236.0, 196.0, 120.0) if lit else dice.pick(style.panes)
            panel.box(left, bottom, left + width, bottom + tall, OF_A_HOUSE(pane, glow=lit))


def _shop(panel: Panel, dice: Dice, length: float, style: Facade) -> None:
    """Shop windows with mannequins; above them a board with letters (a sign) or a plain awning (not a sign)."""
    u = 0.3
    while u + 2.0 < length:
        width = min(dice.between(2.4, 5.0), length - u - 0.2)
        lit = style.lit > 0 and dice.chance(0.6)
        pane = (230.0, 200.0, 140.0) if lit else dice.pick(style.panes)
        panel.box(u, 0.4, u + width, 2.3, OF_A_HOUSE(pane, glow=lit))
        panel.label = Label.BUILDING
        for _ in range(dice.count(0, 2)):
            person(panel, dice, dice.between(u + 0.4, u + width - 0.4), 0.35, dice.between(1.4, 1.7))
        panel.label = None
        band, top = dice.colour(VIVIDS + DARKS + PALES), dice.between(2.9, 3.3)
        if dice.chance(0.5):
            _lettered(panel, dice, u, 2.4, u + width, top, band)
        elif dice.chance(0.7):
            panel.box(u, 2.35, u + width, top, OF_A_HOUSE(band))
        u += width + dice.between(0.2, 1.5)


def _lettered(panel: Panel, dice: Dice, u0: float, v0: float, u1: float, v1: float, colour: RGB) -> None:
    """A board with marks like letters."""
    panel.box(u0, v0, u1, v1, OF_A_SIGN(colour))
    ink = OF_A_SIGN(dice.colour(DARKS if sum(colour) > 380 else PALES))
    u, middle, tall = u0 + 0.15 * (u1 - u0), (v0 + v1) / 2, (v1 - v0) * 0.28
    while u < u0 + 0.85 * (u1 - u0):
        width = dice.between(0.1, 0.35)
        panel.box(u, middle - tall, u + width, middle + tall * dice.between(0.2, 1.0), ink)
        u += width + dice.between(0.12, 0.3)


def _mural(panel: Panel, dice: Dice, length: float, height: float) -> None:
    """Something painted or pasted on the wall: a person, foliage, or the colours of a sign. All of it is building."""
    u, v = dice.between(0.2, max(length - 1.6, 0.3)), dice.between(0.0, 1.2)
    panel.label = Label.BUILDING
    kind = dice.count(0, 2)
    if kind == 0:
        panel.box(u - 0.6, v, u + 0.8, v + 2.0, OF_A_HOUSE(dice.colour(PALES + VIVIDS + GREYS)))
        person(panel, dice, u + 0.1, v + 0.1, 1.7)
    elif kind == 1:
        leaves = OF_A_HOUSE(dice.colour(GREENS), Texture.LEAVES)
        for _ in range(5):
            middle = u + dice.between(0, 3), dice.between(0.5, height)
            panel.disc(*middle, dice.between(0.5, 1.6), dice.between(0.5, 1.6), leaves)
    else:
        v = dice.between(1.5, max(height - 2.0, 1.6))
        panel.disc(u, v, 0.5, 0.5, OF_A_HOUSE(dice.colour(VIVIDS)))
        panel.disc(u, v, 0.3, 0.3, OF_A_HOUSE(dice.colour(PALES)))
    panel.label = None


def barrier(canvas: Canvas, dice: Dice, x: float, z0: float, z1: float) -> None:
    """A garden wall (building), a hedge (tree) or a fence along the street, all about as high."""
    panel, length = Wall(canvas, x, z0), z1 - z0
    height, kind = dice.between(0.9, 2.0), dice.roll()
    if kind < 0.2:
        wall = OF_A_HOUSE(dice.colour(EARTHS + GREYS), dice.pick((Texture.BRICKS, Texture.ROUGH, Texture.SLABS)))
        panel.box(0, 0, length, height, wall)
        panel.box(0, height - 0.15, length, height, wall.shaded(1.2)._replace(texture=Texture.SMOOTH))
    elif kind < 0.4:
        panel.box(0, 0, length, height, Paint(Label.TREE, dice.colour(GREENS), Texture.LEAVES))
    elif kind < 0.65:
        panel.box(0, 0, length, height, OF_A_FENCE(dice.colour(EARTHS + GREYS + PALES + GREENS), Texture.PLANKS))
    elif kind < 0.85:
        _railing(panel, dice, length, min(height, 1.3))
    else:
        _guard_rail(panel, dice, length)


def _railing(panel: Panel, dice: Dice, length: float, height: float) -> None:
    back = OF_A_FENCE(dice.colour(GREYS + GREENS + EARTHS), Texture.PATCHY)
    bar = OF_A_FENCE(dice.colour(DARKS + PALES + GREYS))
    panel.box(0, 0, length, height, back)
    u, step = 0.0, dice.between(0.25, 0.6)
    while u < length:
        panel.box(u, 0, u + step * 0.35, height, bar)
        u += step
    panel.box(0, height - 0.12, length, height, bar)


def _guard_rail(panel: Panel, dice: Dice, length: float) -> None:
    metal = OF_A_FENCE(dice.colour(GREYS + PALES))
    panel.box(0, 0.35, length, 0.85, metal)
    panel.box(0, 0.55, length, 0.63, metal.shaded(0.6))
    u = 0.0
    while u < length:
        panel.box(u, 0, u + 0.2, 0.9, metal.shaded(0.7))
        u += 2.0
