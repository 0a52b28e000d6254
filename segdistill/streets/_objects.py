"""What stands in the street: trees, poles, signs, and things that are no class at all."""

from functools import partial

from segdistill.streets._canvas import Canvas, Dice, Label, Point, shade
from segdistill.streets._panels import CIRCLE, Front, Paint, Panel
from segdistill.streets._textures import DARKS, EARTHS, GREENS, GREYS, PAINTS, PALES, VIVIDS, Texture

OF_A_POLE, OF_A_SIGN, VOID = partial(Paint, Label.POLE), partial(Paint, Label.SIGN), partial(Paint, Label.VOID)


def tree(canvas: Canvas, dice: Dice, x: float, z: float, *, bare: bool) -> None:
    """A tree with a leafy crown, a conifer, or bare branches with the sky between them."""
    panel = Front(canvas, x, z)
    height, wood = dice.between(4.5, 10.0), Paint(Label.TREE, dice.colour(EARTHS + DARKS))
    trunk = dice.between(0.10, 0.24)
    fork = height * dice.between(0.25, 0.4)
    panel.limb((0, 0), trunk, (0, fork * 1.3), trunk * 0.7, wood._replace(texture=Texture.PATCHY))
    if bare:
        _branch(panel, dice, (0.0, fork), (dice.around(0.0, 0.1), 1.0), height - fork, trunk * 0.8, wood, 4)
        return
    green = Paint(Label.TREE, dice.colour(GREENS if dice.chance(0.85) else EARTHS), Texture.LEAVES)  # or autumn
    if dice.chance(0.15):
        for layer in range(4):
            low, half = fork * 0.5 + (height - fork * 0.5) * layer / 4, (1.0 - layer / 4.6) * height * 0.24
            panel.fill([(-half, low), (half, low), (0, low + height * 0.42)], green.shaded(0.7 + 0.08 * layer))
        return
    spread = (height - fork) * dice.between(0.36, 0.55)
    middle = (height + fork) / 2
    for blob in range(7):
        u, v = dice.around(0, spread * 0.75), dice.around(middle, (height - fork) * 0.36)
        _tuft(panel, dice, u, v, dice.between(0.35, 0.62) * spread, green.shaded(0.72 + 0.08 * blob))


def _tuft(panel: Panel, dice: Dice, u: float, v: float, size: float, paint: Paint) -> None:
    reaches = [(size * dice.between(0.7, 1.15), c, s) for c, s in CIRCLE]
    panel.fill([(u + c * reach, v + s * reach) for reach, c, s in reaches], paint)


def _branch(
    panel: Panel, dice: Dice, foot: Point, way: Point, length: float, half: float, wood: Paint, depth: int
) -> None:
    reach = length * dice.between(0.45, 0.62)
    tip = (foot[0] + way[0] * reach, foot[1] + way[1] * reach)
    panel.limb(foot, half, tip, half * 0.6, wood)
    if depth:
        for _ in range(3 if depth > 2 else 2):
            turn = (way[0] + dice.around(0, 0.9), way[1] + dice.around(-0.1, 0.4))
            _branch(panel, dice, tip, turn, length * 0.6, half * 0.65, wood, depth - 1)


def bush(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """A low bush."""
    panel, green = Front(canvas, x, z), Paint(Label.TREE, dice.colour(GREENS), Texture.LEAVES)
    for _ in range(3):
        u, v, size = dice.around(0, 0.5), dice.between(0.3, 0.6), dice.between(0.4, 0.8)
        _tuft(panel, dice, u, v, size, green.shaded(dice.between(0.8, 1.1)))


def pole(canvas: Canvas, dice: Dice, x: float, z: float, *, night: bool) -> None:
    """A lamp post or a plain mast."""
    panel, metal = Front(canvas, x, z), OF_A_POLE(dice.colour(GREYS + DARKS + GREENS[4:5] + PALES[2:3]))
    height, half = dice.between(5.0, 8.5), dice.between(0.05, 0.09)
    panel.box(-half, 0, half, height, metal)
    if dice.chance(0.7):
        reach = -dice.between(0.6, 1.6) if x > 0 else dice.between(0.6, 1.6)
        panel.box(0, height - 0.12, reach, height, metal)
        lamp = OF_A_POLE((250.0, 226.0, 170.0), glow=True) if night else metal
        panel.box(reach * 0.6, height - 0.22, reach * 1.2, height - 0.04, lamp)


def bollard(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """A short post."""
    height, metal = dice.between(0.8, 1.1), OF_A_POLE(dice.colour(DARKS + GREYS + VIVIDS[:1]))
    Front(canvas, x, z).box(-0.09, 0, 0.09, height, metal)


def sign(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """A traffic sign: disc, triangle, square or a board with marks, on its pole."""
    panel, size, foot = Front(canvas, x, z), dice.between(0.3, 0.45), dice.between(2.0, 2.7)
    panel.box(-0.05, 0, 0.05, foot + size, OF_A_POLE(dice.colour(GREYS)))
    rim, face = OF_A_SIGN(dice.colour(VIVIDS)), OF_A_SIGN(dice.colour(PALES + VIVIDS))
    kind = dice.count(0, 4)
    if kind == 0:
        panel.disc(0, foot + size, size, size, rim)
        panel.disc(0, foot + size, 0.65 * size, 0.65 * size, face)
    elif kind == 1:
        panel.fill([(-size * 1.1, foot), (size * 1.1, foot), (0, foot + 2 * size)], rim)
        low = foot + 0.25 * size
        panel.fill([(-size * 0.6, low), (size * 0.6, low), (0, foot + 1.45 * size)], face)
    elif kind == 2:
        panel.box(-size, foot, size, foot + 2 * size, rim)
        panel.box(-0.5 * size, foot + 0.4 * size, 0.5 * size, foot + 1.5 * size, face)
    elif kind == 3:
        wide = dice.between(0.6, 1.2)
        panel.box(-wide, foot, wide, foot + 1.2, rim)
        for row in range(3):
            end = wide * dice.between(0.0, 0.8)
            panel.box(-wide * 0.8, foot + 0.15 + 0.36 * row, end, foot + 0.32 + 0.36 * row, face)
    else:
        panel.box(-size, foot + 0.4, size, foot + 0.4 + size, face)


def traffic_light(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """A traffic light; CamVid counts its head as a sign."""
    panel, case = Front(canvas, x, z), OF_A_SIGN(dice.colour(DARKS))
    panel.box(-0.07, 0, 0.07, 2.4, OF_A_POLE(dice.colour(GREYS + DARKS)))
    panel.box(-0.22, 2.3, 0.22, 3.35, case)
    lit = dice.count(0, 2)
    for lamp, colour in enumerate(((70.0, 220.0, 130.0), (240.0, 180.0, 50.0), (240.0, 50.0, 40.0))):
        paint = OF_A_SIGN(colour, glow=True) if lamp == lit else OF_A_SIGN(shade(colour, 0.25))
        panel.disc(0, 2.5 + 0.33 * lamp, 0.13, 0.13, paint)


def billboard(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """A large board on two legs."""
    panel, foot, wide = Front(canvas, x, z), dice.between(1.0, 2.2), dice.between(0.9, 1.6)
    for leg in (-0.7 * wide, 0.7 * wide):
        panel.box(leg - 0.07, 0, leg + 0.07, foot, OF_A_POLE(dice.colour(GREYS)))
    panel.box(-wide, foot, wide, foot + 1.6, OF_A_SIGN(dice.colour(PALES + DARKS)))
    picture = OF_A_SIGN(dice.colour(VIVIDS + PALES + GREENS), Texture.PATCHY)
    panel.box(-0.9 * wide, foot + 0.12, 0.9 * wide, foot + 1.48, picture)
    panel.disc(dice.around(0, 0.5) * wide, foot + 0.8, 0.4, 0.5, OF_A_SIGN(dice.colour(VIVIDS + EARTHS)))


def unknown(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """A bin, crate, pram or heap: nothing that the class list knows, hence void."""
    panel, colour = Front(canvas, x, z), dice.colour(PAINTS + GREENS)
    half, height = dice.between(0.25, 0.7), dice.between(0.6, 1.4)
    if dice.chance(0.5):
        panel.box(-half, 0, half, height, VOID(colour, Texture.PATCHY))
        panel.box(-half * 1.1, height * 0.85, half * 1.1, height, VOID(shade(colour, 0.7)))
    else:
        panel.disc(0, height * 0.5, half, height * 0.5, VOID(colour, Texture.PATCHY))


def bonnet(canvas: Canvas, dice: Dice) -> None:
    """The bonnet of the car that carries the camera; void, as nothing can be learned from it."""
    wide, high = canvas.size
    top, paint = high * dice.between(0.86, 0.95), VOID(dice.colour(DARKS + GREYS + PAINTS[:4]))
    camera, bottom, shoulder = canvas.camera, high + 2.0, top + high * 0.05
    left, right = [(0.0, bottom), (0.0, shoulder), (wide * 0.2, top)], [(wide * 0.8, top), (float(wide), shoulder)]
    points = [
        ((px - camera.centre) / camera.focal - camera.bend, (camera.horizon - py) / camera.focal + camera.eye)
        for px, py in (*left, *right, (float(wide), bottom))
    ]
    Front(canvas, 0.0, 1.0).fill(points, paint)
