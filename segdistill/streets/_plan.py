"""The plan of a street: where kerbs, pavements and houses are, and what kind of street it is."""

from dataclasses import dataclass

from segdistill.streets._canvas import Camera, Dice

SIDES = ((0, -1.0), (1, 1.0))  # left and right, and the sign of x there


@dataclass(frozen=True)
class Street:
    """Where things are across the street, in metres right of the camera, and what kind of street it is."""

    left: float  # kerbs
    right: float
    pavements: tuple[float, float]  # widths, left and right
    setbacks: tuple[float, float]  # from the pavement to the houses
    density: tuple[float, float]  # share of each side that is built up
    shops: float
    greenery: float
    bare: bool  # winter: trees without leaves
    night: bool
    bustle: float  # how many people and cars

    def house_line(self, side: int) -> float:
        """x of the house fronts; side 0 is left, 1 is right."""
        reach = self.pavements[side] + self.setbacks[side]
        return self.left - reach if side == 0 else self.right + reach

    def kerb(self, side: int) -> float:
        """x of the kerb."""
        return self.left if side == 0 else self.right


def street(dice: Dice, *, night: bool) -> Street:
    """A random street: town, suburb or park road."""
    town = dice.roll()
    lane = dice.between(2.7, 3.5)
    keeps = dice.pick((-1.0, 1.0))  # the side one drives on
    beside, across = lane * dice.between(0.5, 0.7), lane * dice.between(1.3, 1.9)
    wide = dice.between(0.0, 2.2) if dice.chance(0.5) else 0.0  # room to park
    pavements = (dice.between(1.3, 3.4), dice.between(1.3, 3.4))
    if town < 0.45:
        setbacks, density = (dice.between(0, 0.6), dice.between(0, 0.6)), (0.95, 0.92)
    elif town < 0.8:
        setbacks, density = (dice.between(1, 5), dice.between(1, 5)), (dice.between(0.5, 0.9), dice.between(0.5, 0.9))
    else:
        setbacks, density = (dice.between(1, 8), dice.between(0, 5)), (dice.between(0.0, 0.4), dice.between(0.1, 0.9))
    return Street(
        left=-(across if keeps > 0 else beside) - wide,
        right=(beside if keeps > 0 else across) + wide,
        pavements=pavements,
        setbacks=setbacks,
        density=density,
        shops=0.55 if town < 0.45 else 0.1,
        greenery=dice.between(0.1, 0.5) if town < 0.45 else dice.between(0.35, 1.0),
        bare=dice.chance(0.25),
        night=night,
        bustle=dice.between(0.3, 1.0),
    )


def camera(dice: Dice, width: int, height: int) -> Camera:
    """A camera behind the windscreen, for a canvas of this size."""
    return Camera(
        focal=height * dice.between(0.85, 1.15),
        centre=width * dice.around(0.5, 0.16),
        horizon=height * dice.around(0.46, 0.07),
        eye=dice.between(1.25, 1.65),
        bend=dice.around(0.0, 0.0016) if dice.chance(0.5) else 0.0,
    )
