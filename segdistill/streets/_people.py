"""Pedestrians and bicyclists, drawn on any panel: also on a poster, where they belong to the wall."""

import math

from segdistill.streets._canvas import RGB, Dice, Label, shade
from segdistill.streets._panels import Panel
from segdistill.streets._textures import COATS, DARKS, GREYS, SKINS, VIVIDS, Texture


def person(panel: Panel, dice: Dice, u: float, v: float, height: float, *, umbrella: bool = False) -> None:
    """A pedestrian whose feet are at (u, v)."""
    coat, trousers, skin = dice.colour(COATS), dice.colour(DARKS + GREYS + COATS), dice.colour(SKINS, 8.0)
    stride, lean = dice.between(0.02, 0.17) * height, dice.around(0.0, 0.03) * height
    hip, shoulder, half = v + 0.47 * height, v + 0.82 * height, dice.between(0.09, 0.145) * height
    who = Label.PEDESTRIAN
    leg = 0.05 * height
    for foot in (-stride, stride):
        panel.fill(
            [(u - leg, hip), (u + leg, hip), (u + foot + leg, v), (u + foot - leg, v)], who, trousers, Texture.SMOOTH
        )
    if dice.chance(0.3):  # a long coat or a skirt
        panel.fill(
            [
                (u - half, hip),
                (u + half, hip),
                (u + 1.2 * half, v + 0.25 * height),
                (u - 1.2 * half, v + 0.25 * height),
            ],
            who,
            coat,
        )
    panel.fill([(u - half, hip), (u + half, hip), (u + half + lean, shoulder), (u - half + lean, shoulder)], who, coat)
    arm, swing = 0.04 * height, dice.between(0.0, 0.1) * height
    for side in (-1.0, 1.0):
        top, hand = u + lean + side * half, u + side * (half + swing)
        panel.fill(
            [(top - arm, shoulder), (top + arm, shoulder), (hand + arm, hip), (hand - arm, hip)], who, shade(coat, 0.85)
        )
    if dice.chance(0.3):
        side = dice.pick((-1.0, 1.0)) * (half + 0.05 * height)
        panel.box(u + side, hip - 0.1 * height, u + side * 1.9, hip + 0.1 * height, who, dice.colour(VIVIDS + DARKS))
    head = v + 0.91 * height
    panel.disc(u + lean, head, 0.062 * height, 0.085 * height, who, skin)
    panel.disc(u + lean, head + 0.035 * height, 0.062 * height, 0.055 * height, who, dice.colour(DARKS + VIVIDS[2:3]))
    if umbrella:
        colour = dice.colour(VIVIDS + DARKS)
        panel.fill([(u - 0.5, v + 1.0 * height), (u, v + 1.22 * height), (u + 0.5, v + 1.0 * height)], who, colour)


def bicyclist(panel: Panel, dice: Dice) -> None:
    """A rider and a bicycle at u = 0, seen from the side or from behind; both are the class bicyclist."""
    who = Label.BICYCLIST
    coat, trousers, skin = dice.colour(COATS), dice.colour(DARKS + COATS), dice.colour(SKINS, 8.0)
    metal, tyre = dice.colour(VIVIDS + GREYS + DARKS), dice.colour(DARKS)
    if dice.chance(0.5):
        _rider_behind(panel, dice, tyre)
        panel.fill([(-0.24, 0.95), (0.24, 0.95), (0.2, 1.5), (-0.2, 1.5)], who, coat)
        panel.fill([(-0.24, 1.45), (-0.14, 1.45), (-0.3, 1.0), (-0.4, 1.0)], who, shade(coat, 0.85))
        panel.fill([(0.24, 1.45), (0.14, 1.45), (0.3, 1.0), (0.4, 1.0)], who, shade(coat, 0.85))
        panel.box(-0.2, 0.35, -0.06, 0.98, who, trousers)
        panel.box(0.06, 0.5, 0.2, 0.98, who, trousers)
        lean = 0.0
    else:
        way = dice.pick((-1.0, 1.0))
        for wheel in (-0.52, 0.52):
            panel.disc(wheel, 0.34, 0.36, 0.36, who, tyre)
            panel.disc(wheel, 0.34, 0.24, 0.24, who, dice.colour(GREYS))
        for start, end in (
            ((-0.52, 0.34), (-0.15, 0.8)),
            ((-0.15, 0.8), (0.4, 0.85)),
            ((0.0, 0.34), (0.4, 0.85)),
            ((0.52, 0.34), (0.4, 0.95)),
        ):
            _bar(panel, (start[0] * way, start[1]), (end[0] * way, end[1]), 0.05, metal)
        _bar(panel, (-0.15 * way, 0.95), (0.2 * way, 0.65), 0.09, trousers)
        _bar(panel, (0.2 * way, 0.65), (0.02 * way, 0.25), 0.08, trousers)
        panel.fill([(-0.3 * way, 0.9), (0.02 * way, 0.95), (0.28 * way, 1.4), (0.0, 1.5)], who, coat)
        _bar(panel, (0.2 * way, 1.38), (0.42 * way, 0.98), 0.06, shade(coat, 0.85))
        lean = 0.22 * way
    panel.disc(lean, 1.64, 0.12, 0.15, who, skin)
    panel.disc(lean, 1.71, 0.13, 0.1, who, dice.colour(VIVIDS + DARKS))


def _rider_behind(panel: Panel, dice: Dice, tyre: RGB) -> None:
    panel.box(-0.05, 0.0, 0.05, 0.9, Label.BICYCLIST, tyre)
    panel.box(-0.32, 0.95, 0.32, 1.02, Label.BICYCLIST, dice.colour(GREYS + DARKS))


def _bar(panel: Panel, start: tuple[float, float], end: tuple[float, float], half: float, colour: RGB) -> None:
    """A limb or a tube between two points, ``half`` thick to each side."""
    du, dv = end[0] - start[0], end[1] - start[1]
    length = math.sqrt(du * du + dv * dv)
    nu, nv = -dv / length * half, du / length * half
    corners = [
        (start[0] + nu, start[1] + nv),
        (end[0] + nu, end[1] + nv),
        (end[0] - nu, end[1] - nv),
        (start[0] - nu, start[1] - nv),
    ]
    panel.fill(corners, Label.BICYCLIST, colour)
