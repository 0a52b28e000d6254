"""Paints a street, far things first: backdrop, ground, houses, then everything that stands or moves before them."""

from functools import partial

from segdistill.streets import _objects as objects
from segdistill.streets._buildings import barrier, building, facade
from segdistill.streets._canvas import NEAR, Canvas, Dice, Label, Point
from segdistill.streets._panels import CIRCLE, Front, Ground, Paint
from segdistill.streets._plan import SIDES, Street
from segdistill.streets._textures import EARTHS, GREENS, GREYS, PALES, VIVIDS, Texture
from segdistill.streets._things import things

OF_THE_ROAD = partial(Paint, Label.ROAD)
END = 110.0  # metres ahead at which the street is lost in the backdrop


def paint(canvas: Canvas, dice: Dice, plan: Street) -> None:
    """Paints the whole scene."""
    _backdrop(canvas, dice, plan)
    _ground(canvas, dice, plan)
    for side, sign in SIDES:
        _row_of_houses(canvas, dice, plan, side, sign)
    for _, draw in sorted(things(canvas, dice, plan), key=lambda thing: -thing[0]):
        draw()
    if dice.chance(0.3):
        objects.bonnet(canvas, dice)


def _backdrop(canvas: Canvas, dice: Dice, plan: Street) -> None:
    """What closes the view at the end of the street: roofs and tree tops."""
    x = -160.0
    far = Front(canvas, 0.0, 140.0)
    while x < 160.0:
        width, height = dice.between(8, 30), dice.between(4, 20)
        if dice.chance(0.25 + 0.5 * plan.greenery):
            leaves = Paint(Label.TREE, dice.colour(GREENS), Texture.LEAVES)
            far.disc(x + width / 2, 0, width * 0.7, height, leaves)
        else:
            far.box(x, 0, x + width, height, Paint(Label.BUILDING, dice.colour(EARTHS + GREYS + PALES)))
        x += width * 0.8


def _ground(canvas: Canvas, dice: Dice, plan: Street) -> None:
    """Road, pavements and what lies beyond them, with marks, shadows and puddles."""
    ground = Ground(canvas)
    asphalt = OF_THE_ROAD(dice.colour(GREYS[:5]), Texture.ROUGH)
    same = dice.chance(0.4)  # road and pavement of the same grey, told apart by place only
    grey = asphalt.colour if same else dice.colour(GREYS + PALES[2:4] + EARTHS[3:])
    paving = Paint(Label.PAVEMENT, grey, dice.pick((Texture.SLABS, Texture.ROUGH, Texture.BRICKS)))
    for side, sign in SIDES:
        kerb, edge = plan.kerb(side), plan.kerb(side) + sign * plan.pavements[side]
        lawn = plan.setbacks[side] > 0.8 and dice.chance(plan.greenery)
        beyond = Paint(Label.TREE, dice.colour(GREENS), Texture.LEAVES) if lawn else paving
        ground.strip(edge, sign * 220.0, NEAR, 140.0, beyond)
        ground.strip(kerb, edge, NEAR, 140.0, paving)
        kerbstone = paving.shaded(dice.between(0.75, 1.3))._replace(texture=Texture.SMOOTH)
        ground.strip(kerb, kerb + sign * 0.18, NEAR, 140.0, kerbstone)
    ground.strip(plan.left, plan.right, NEAR, 140.0, asphalt)
    if dice.chance(0.35):  # a side street
        z, side = dice.between(5.0, 30.0), dice.count(0, 1)
        ground.box(0.0, z, -120.0 if side == 0 else 120.0, z + 6.0, asphalt)
    for _ in range(dice.count(0, 4)):  # mended asphalt, drains
        x, z = dice.between(plan.left, plan.right - 1.0), dice.between(2.5, 25)
        size = dice.between(0.4, 1.6)
        end = z + size * dice.between(1, 5)
        mended = asphalt.shaded(dice.between(0.65, 1.25))._replace(texture=Texture.PATCHY)
        ground.strip(x, min(x + size, plan.right), z, end, mended)
    _marks(ground, dice, plan)
    _shadows(canvas, ground, dice, plan)


def _marks(ground: Ground, dice: Dice, plan: Street) -> None:
    """Lane marks and crossings; they are road."""
    white = OF_THE_ROAD(dice.pick(((226.0, 226.0, 220.0), (196.0, 194.0, 188.0), (214.0, 190.0, 90.0))))
    middle = (plan.left + plan.right) / 2
    if dice.chance(0.8):
        z, dash = dice.between(0.5, 4.0), dice.pick((2.0, 3.0, 100.0))
        while z < 60.0:
            ground.strip(middle - 0.08, middle + 0.08, max(z, NEAR), z + dash, white)
            z += 2 * dash
    for kerb, inward in ((plan.left, 1.0), (plan.right, -1.0)):
        if dice.chance(0.5):
            line = dice.pick((white, OF_THE_ROAD(VIVIDS[2])))
            ground.strip(kerb + inward * 0.3, kerb + inward * 0.45, NEAR, 80.0, line)
    if dice.chance(0.2):
        z, x = dice.between(5.0, 22.0), plan.left
        while x + 0.5 < plan.right:
            ground.box(x, z, x + 0.5, z + 2.6, white)
            x += 1.0
    if dice.chance(0.2):
        x, z = (plan.right if middle < 0 else plan.left) / 2, dice.between(4.0, 10.0)
        arrow = [(-0.1, 0), (0.1, 0), (0.1, 2), (0.4, 2), (0, 3.2), (-0.4, 2), (-0.1, 2)]
        ground.fill([(x + u, z + v) for u, v in arrow], white)


def _shadows(canvas: Canvas, ground: Ground, dice: Dice, plan: Street) -> None:
    """Shadows of houses and trees that fall across the street, and puddles."""
    side, sign = SIDES[dice.count(0, 1)]
    reach = dice.between(-2.0, plan.right - plan.left)
    start = plan.house_line(side)
    z = NEAR
    while z < 60.0:
        length = dice.between(4, 14)
        if dice.chance(plan.density[side]):
            tip = start - sign * (plan.pavements[side] + max(reach + dice.around(0, 1.5), 0.2))
            outline = ((start, z), (tip, z + 2), (tip, z + length + 2), (start, z + length))
            canvas.darken([ground.at(*point) for point in outline])
        elif dice.chance(plan.greenery):
            x = start - sign * dice.between(2, 8)
            for _ in range(4):
                canvas.darken(_spot(ground, x + dice.around(0, 2), z + dice.between(0, 4), dice.between(0.4, 1.4)))
        z += length
    for _ in range(dice.count(0, 4) if dice.chance(0.25) else 0):
        x, z = dice.between(plan.left - 1, plan.right + 1), dice.between(2.5, 15)
        canvas.pour(_spot(ground, x, z, dice.between(0.4, 1.5)))


def _spot(ground: Ground, x: float, z: float, radius: float) -> list[Point]:
    return [ground.at(x + radius * c, max(z + radius * s, NEAR)) for c, s in CIRCLE]


def _row_of_houses(canvas: Canvas, dice: Dice, plan: Street, side: int, sign: float) -> None:
    """Houses, gaps, trees behind them, and walls or fences along the front, from far to near."""
    line, edge = plan.house_line(side), plan.kerb(side) + sign * plan.pavements[side]
    tall = dice.between(6.0, 15.0)
    plots: list[tuple[float, float, bool]] = []
    z = dice.between(-6.0, 3.0)
    while z < END:
        length = dice.between(5.0, 15.0)
        if z + length > NEAR + 1.0:
            plots.append((max(z, NEAR), z + length, dice.chance(plan.density[side])))
        z += length + (dice.between(0.5, 4.0) if dice.chance(0.25) else 0.0)
    style = facade(dice, night=plan.night, shops=plan.shops)
    for place in reversed(range(len(plots))):
        z0, z1, built = plots[place]
        exposed = place > 0 and (not plots[place - 1][2] or plots[place - 1][1] < z0)
        if built:
            if dice.chance(0.7):
                style = facade(dice, night=plan.night, shops=plan.shops)
            x, height = line + sign * dice.between(0, 0.8), tall * dice.between(0.65, 1.35)
            building(canvas, dice, x, z0, z1, height, style, exposed)
        elif dice.chance(plan.greenery):
            for _ in range(dice.count(1, 3)):
                x, z = line + sign * dice.between(0, 6), dice.between(max(z0, 4.0), z1 + 4.0)
                objects.tree(canvas, dice, x, z, bare=plan.bare)
        if abs(line - edge) > 0.7 and z1 > 4.0 and dice.chance(0.55):
            barrier(canvas, dice, edge + sign * 0.2, max(z0, 1.5), z1)
