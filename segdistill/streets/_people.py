"""Pedestrians and bicyclists, drawn on any panel: also on a poster, where they belong to the wall."""

import math
from functools import partial

from segdistill.streets._canvas import Dice, Label, Point
from segdistill.streets._panels import Paint, Panel
from segdistill.streets._textures import COATS, DARKS, GREYS, SKINS, VIVIDS


def person(panel: Panel, dice: Dice, u: float, v: float, height: float, *, umbrella: bool = False) -> None:
    """A pedestrian whose feet are at (u, v)."""
    paint = partial(Paint, Label.PEDESTRIAN)
    coat, trousers = paint(dice.colour(COATS)), paint(dice.colour(DARKS + GREYS + COATS))
    skin = paint(dice.colour(SKINS, 8.0))
    stride, lean = dice.between(0.02, 0.17) * height, dice.around(0.0, 0.03) * height
    hip, shoulder, half = v + 0.47 * height, v + 0.82 * height, dice.between(0.09, 0.145) * height
    leg = 0.05 * height
    for foot in (-stride, stride):
        panel.limb((u, hip), leg, (u + foot, v), leg, trousers)
    if dice.chance(0.3):  # a long coat or a skirt
        panel.limb((u, hip), half, (u, v + 0.25 * height), 1.2 * half, coat)
    panel.fill([(u - half, hip), (u + half, hip), (u + half + lean, shoulder), (u - half + lean, shoulder)], coat)
    arm, swing = 0.04 * height, dice.between(0.0, 0.1) * height
    for side in (-1.0, 1.0):
        panel.limb((u + lean + side * half, shoulder), arm, (u + side * (half + swing), hip), arm, coat.shaded(0.85))
    if dice.chance(0.3):
        side = dice.pick((-1.0, 1.0)) * (half + 0.05 * height)
        bag = paint(dice.colour(VIVIDS + DARKS))
        panel.box(u + side, hip - 0.1 * height, u + side * 1.9, hip + 0.1 * height, bag)
    head = v + 0.91 * height
    panel.disc(u + lean, head, 0.062 * height, 0.085 * height, skin)
    hair = paint(dice.colour(DARKS + VIVIDS[2:3]))
    panel.disc(u + lean, head + 0.035 * height, 0.062 * height, 0.055 * height, hair)
    if umbrella:
        rim = v + 1.0 * height
        panel.fill([(u - 0.5, rim), (u, v + 1.22 * height), (u + 0.5, rim)], paint(dice.colour(VIVIDS + DARKS)))


def bicyclist(panel: Panel, dice: Dice) -> None:
    """A rider and a bicycle at u = 0, seen from the side or from behind; both are the class bicyclist."""
    paint = partial(Paint, Label.BICYCLIST)
    coat, trousers = paint(dice.colour(COATS)), paint(dice.colour(DARKS + COATS))
    skin = paint(dice.colour(SKINS, 8.0))
    metal, tyre = paint(dice.colour(VIVIDS + GREYS + DARKS)), paint(dice.colour(DARKS))
    sleeve = coat.shaded(0.85)
    if dice.chance(0.5):
        panel.box(-0.05, 0.0, 0.05, 0.9, tyre)
        panel.box(-0.32, 0.95, 0.32, 1.02, paint(dice.colour(GREYS + DARKS)))
        panel.fill([(-0.24, 0.95), (0.24, 0.95), (0.2, 1.5), (-0.2, 1.5)], coat)
        panel.fill([(-0.24, 1.45), (-0.14, 1.45), (-0.3, 1.0), (-0.4, 1.0)], sleeve)
        panel.fill([(0.24, 1.45), (0.14, 1.45), (0.3, 1.0), (0.4, 1.0)], sleeve)
        panel.box(-0.2, 0.35, -0.06, 0.98, trousers)
        panel.box(0.06, 0.5, 0.2, 0.98, trousers)
        lean = 0.0
    else:
        way = dice.pick((-1.0, 1.0))
        for wheel in (-0.52, 0.52):
            panel.disc(wheel, 0.34, 0.36, 0.36, tyre)
            panel.disc(wheel, 0.34, 0.24, 0.24, paint(dice.colour(GREYS)))
        _bar(panel, (-0.52 * way, 0.34), (-0.15 * way, 0.8), 0.05, metal)
        _bar(panel, (-0.15 * way, 0.8), (0.4 * way, 0.85), 0.05, metal)
        _bar(panel, (0.0 * way, 0.34), (0.4 * way, 0.85), 0.05, metal)
        _bar(panel, (0.52 * way, 0.34), (0.4 * way, 0.95), 0.05, metal)
        _bar(panel, (-0.15 * way, 0.95), (0.2 * way, 0.65), 0.09, trousers)
        _bar(panel, (0.2 * way, 0.65), (0.02 * way, 0.25), 0.08, trousers)
        panel.fill([(-0.3 * way, 0.9), (0.02 * way, 0.95), (0.28 * way, 1.4), (0.0, 1.5)], coat)
        _bar(panel, (0.2 * way, 1.38), (0.42 * way, 0.98), 0.06, sleeve)
        lean = 0.22 * way
    panel.disc(lean, 1.64, 0.12, 0.15, skin)
    panel.disc(lean, 1.71, 0.13, 0.1, paint(dice.colour(VIVIDS + DARKS)))


def _bar(panel: Panel, start: Point, end: Point, half: float, paint: Paint) -> None:
    """A limb or a tube between two points, ``half`` thick to each side."""
    (u0, v0), (u1, v1) = start, end
    du, dv = u1 - u0, v1 - v0
    length = math.sqrt(du * du + dv * dv)
    nu, nv = -dv / length * half, du / length * half
    panel.fill([(u0 + nu, v0 + nv), (u1 + nu, v1 + nv), (u1 - nu, v1 - nv), (u0 - nu, v0 - nv)], paint)
