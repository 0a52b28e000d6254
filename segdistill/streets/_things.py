"""What stands and moves in a street, and where: furniture, traffic, people."""

from collections.abc import Callable
from functools import partial

from segdistill.streets import _objects as objects
from segdistill.streets._buildings import barrier
from segdistill.streets._canvas import Canvas, Dice
from segdistill.streets._cars import car, crossing_car
from segdistill.streets._panels import Front
from segdistill.streets._people import bicyclist, person
from segdistill.streets._plan import SIDES, Street

Thing = tuple[float, Callable[[], None]]  # metres ahead, and what paints it


def things(canvas: Canvas, dice: Dice, plan: Street) -> list[Thing]:
    """Everything, in no order."""
    furniture = [thing for side, sign in SIDES for thing in _furniture(canvas, dice, plan, side, sign)]
    return furniture + _traffic(canvas, dice, plan) + _people(canvas, dice, plan)


def _furniture(canvas: Canvas, dice: Dice, plan: Street, side: int, sign: float) -> list[Thing]:
    """Poles, signs, trees, bushes, railings and odd objects on the pavement at one side."""
    furniture: list[Thing] = []
    kerb, width = plan.kerb(side), plan.pavements[side]
    z = dice.between(8.0, 36.0)
    while z < 60.0 and dice.chance(0.85):
        furniture.append((z, partial(objects.pole, canvas, dice, kerb + sign * 0.4, z, night=plan.night)))
        z += dice.between(16.0, 34.0)
    for _ in range(dice.count(0, 2)):
        x, z = kerb + sign * dice.between(0.4, 0.9), dice.between(6.0, 24.0)
        make = dice.pick((objects.sign,) * 6 + (objects.traffic_light,) * 3 + (objects.billboard,))
        furniture.append((z, partial(make, canvas, dice, x, z)))
    z = dice.between(5.0, 13.0)
    while z < 70.0 and dice.chance(0.15 + 0.85 * plan.greenery):
        x = kerb + sign * dice.between(0.6, width)
        furniture.append((z, partial(objects.tree, canvas, dice, x, z, bare=plan.bare)))
        z += dice.between(5.0, 14.0)
    for _ in range(dice.count(0, 3)):
        x, z = kerb + sign * dice.between(0.3, width), dice.between(5.0, 25.0)
        make = dice.pick((objects.unknown, objects.bollard, objects.bollard, objects.bush))
        furniture.append((z, partial(make, canvas, dice, x, z)))
    if dice.chance(0.22):
        z, length = dice.between(3.0, 12.0), dice.between(3.0, 9.0)
        furniture.append((z + length, partial(barrier, canvas, dice, kerb + sign * 0.25, z, z + length)))
    return furniture


def _traffic(canvas: Canvas, dice: Dice, plan: Street) -> list[Thing]:
    """Cars parked at the kerbs, driving ahead, coming, and crossing."""
    cars: list[Thing] = []
    middle = (plan.left + plan.right) / 2
    for side, sign in SIDES:
        if dice.chance(0.3 + 0.5 * plan.bustle):
            z = dice.between(3.2, 12.0)
            while z < 60.0:
                if dice.chance(0.65):
                    away = (sign * middle <= 0) if dice.chance(0.9) else dice.chance(0.5)
                    x = plan.kerb(side) - sign * 1.05
                    cars.append((z, partial(car, canvas, dice, x, z, away=away, night=plan.night)))
                z += dice.between(5.2, 9.0)
        if dice.chance(0.5 * plan.bustle + 0.25):
            ahead = abs(plan.kerb(side)) < abs(plan.kerb(1 - side))
            x, z = (plan.kerb(side) + middle) / 2, dice.between(5.0, 26.0)
            cars.append((z, partial(car, canvas, dice, x, z, away=ahead, night=plan.night)))
    if dice.chance(0.15):
        x, z = dice.between(-9.0, 6.0), dice.between(9.0, 25.0)
        cars.append((z, partial(crossing_car, canvas, dice, x, z)))
    return cars


def _people(canvas: Canvas, dice: Dice, plan: Street) -> list[Thing]:
    """Pedestrians on the pavements, some on the road, and bicyclists on the road, some on the pavement."""
    people: list[Thing] = []

    def walk(x: float, z: float) -> None:
        tall = dice.between(1.0, 1.35) if dice.chance(0.12) else dice.between(1.55, 1.9)
        umbrella = dice.chance(0.06)
        people.append((z, partial(person, Front(canvas, x, z), dice, 0.0, 0.0, tall, umbrella=umbrella)))

    for _ in range(dice.count(1, 1 + int(6 * plan.bustle))):
        side, sign = dice.pick(SIDES)
        x, z = plan.kerb(side) + sign * dice.between(0.3, plan.pavements[side]), dice.between(5.5, 28.0)
        walk(x, z)
        if dice.chance(0.25):
            walk(x + sign * 0.7, z + 0.2)
    if dice.chance(0.25):
        walk(dice.between(plan.left, plan.right), dice.between(8.0, 25.0))
    for _ in range(dice.count(1, 2) if dice.chance(0.5) else 0):
        on_road = dice.chance(0.85)
        x = dice.between(plan.left + 0.6, plan.right - 0.6) if on_road else plan.left - 0.8
        z = dice.between(6.0, 24.0)
        people.append((z, partial(bicyclist, Front(canvas, x, z), dice)))
    return people
