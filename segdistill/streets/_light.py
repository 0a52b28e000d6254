"""From surface numbers to a photograph: sun and shade, texture, fog, rain, lamps, lens and sensor."""

from dataclasses import dataclass

import numpy as np

from segdistill.streets._canvas import FAR, RGB, SUPERSAMPLE, Camera, Canvas, Dice, Facing, Label
from segdistill.streets._textures import SCALE, STRENGTH, TEXELS, atlas, value_noise

Array = np.ndarray


@dataclass(frozen=True)
class Weather:
    """Light, air and camera of one scene."""

    light: tuple[RGB, ...]  # what falls on each Facing, as a factor per channel
    zenith: RGB
    skyline: RGB  # colour of the sky at the horizon, and of the fog
    clouds: float  # 0 clear .. 1 overcast
    fog: float  # per metre
    wet: float  # how much of a mirror the ground is, 0..1; puddles are mirrors always
    shadow: float  # how much light a shadow takes, 0..1
    rain: bool
    night: bool
    noise: float  # of the sensor, in grey levels
    blur: int  # 0 sharp, 1 out of focus, 2 moved sideways
    cast: RGB  # colour cast of the camera, as a factor per channel
    contrast: float
    lift: float  # grey levels added


def weather(dice: Dice) -> Weather:
    """Random weather, from a clear noon to a wet night."""
    kind = dice.roll()
    night, dusk, grey = kind < 0.13, 0.13 <= kind < 0.30, 0.30 <= kind < 0.58
    sun_side, sun = dice.pick((-1.0, 1.0)), 0.0
    if night:
        level, tint = dice.between(0.26, 0.45), (0.95, 0.92, 1.1)
        zenith, skyline = (14.0, 16.0, 28.0), (44.0, 42.0, 52.0)
    elif dusk:
        level, sun, tint = dice.between(0.4, 0.65), dice.between(0.1, 0.35), (1.12, 0.95, 0.88)
        zenith = (90.0, 100.0, 140.0)
        skyline = dice.pick(((222.0, 160.0, 118.0), (196.0, 150.0, 150.0), (150.0, 150.0, 165.0)))
    elif grey:
        level, tint = dice.between(0.6, 0.95), (0.98, 1.0, 1.03)
        zenith, skyline = dice.pick(
            (((176.0, 182.0, 190.0), (222.0, 224.0, 226.0)), ((120.0, 126.0, 134.0), (170.0, 172.0, 174.0)))
        )
    else:
        level, sun, tint = dice.between(0.55, 0.75), dice.between(0.35, 0.75), (1.04, 1.0, 0.95)
        zenith, skyline = (92.0, 140.0, 204.0), (206.0, 220.0, 232.0)
    light = [(1.0, 1.0, 1.0)] * len(Facing)
    shares = (0.8, dice.between(0.0, 0.9), max(sun_side, 0.0), max(-sun_side, 0.0))
    for facing, share in zip((Facing.UP, Facing.CAMERA, Facing.RIGHT, Facing.LEFT), shares, strict=True):
        strength = level + sun * share
        light[facing] = (strength * tint[0], strength * tint[1], strength * tint[2])
    rain = dice.chance(0.14)
    return Weather(
        light=tuple(light),
        zenith=zenith,
        skyline=skyline,
        clouds=1.0 if grey else dice.between(0.0, 0.8),
        fog=dice.between(0.012, 0.035) if dice.chance(0.13) else dice.between(0.0005, 0.005),
        wet=dice.between(0.2, 0.5) if rain or dice.chance(0.08) else 0.0,
        shadow=0.0 if night else min(sun + 0.12, 0.6),
        rain=rain,
        night=night,
        noise=dice.between(5.0, 12.0) if night else dice.between(1.5, 6.0),
        blur=dice.pick((0, 0, 0, 0, 1, 2)),
        cast=(dice.around(1.0, 0.12), dice.around(1.0, 0.06), dice.around(1.0, 0.14)),
        contrast=dice.between(0.8, 1.5),
        lift=dice.between(-8.0, 18.0),
    )


def labels(canvas: Canvas, dice: Dice, ragged: float) -> Array:
    """The mask, uint8 [H, W]. Where samples of a pixel disagree it is void, in a share ``ragged`` of the picture."""
    table = np.array([surface.label for surface in canvas.surfaces], dtype=np.uint8)
    dense = table[np.asarray(canvas.numbers)]
    a, b, c, d = dense[0::2, 0::2], dense[0::2, 1::2], dense[1::2, 0::2], dense[1::2, 1::2]
    mask = np.where((a == b) | (a == c) | (a == d), a, np.where((b == c) | (b == d), b, np.where(c == d, c, a)))
    mixed = (a != b) | (a != c) | (a != d)
    height, width = mask.shape
    mixed &= value_noise(dice, width, height, max(height // 6, 1)) < ragged
    thin = np.zeros_like(mixed)
    # Of these two samples of four suffice.
    for label in (Label.FENCE, Label.PEDESTRIAN, Label.BICYCLIST, Label.SIGN, Label.POLE):
        votes = (a == label).astype(np.uint8) + (b == label) + (c == label) + (d == label)
        mask = np.where(votes >= 2, np.uint8(label), mask)
        thin |= (votes >= 1) & (label in (Label.SIGN, Label.POLE, Label.BICYCLIST))
    return np.where(mixed & ~thin, np.uint8(Label.VOID), mask)


def photograph(canvas: Canvas, dice: Dice, sky: Weather) -> Array:
    """The picture, uint8 [H, W, 3]."""
    numbers = np.asarray(canvas.numbers)
    facing = np.array([surface.facing for surface in canvas.surfaces], dtype=np.int64)[numbers]
    depth, texture = _textured(canvas, numbers, facing)
    lit = [  # colour of each surface in this light
        tuple(value * factor for value, factor in zip(surface.colour, sky.light[surface.facing], strict=True))
        for surface in canvas.surfaces
    ]
    picture = _float(lit)[numbers] * texture[:, :, None]
    ground = facing == Facing.UP
    picture *= (1.0 - np.float32(sky.shadow / 255.0) * np.where(ground, np.asarray(canvas.shadow), 0))[:, :, None]
    above = facing == Facing.SKY
    rows = int(above.any(axis=1).nonzero()[0].max(initial=0)) + 1  # below these there is no sky
    picture[:rows] = np.where(above[:rows, :, None], _sky(canvas, dice, sky)[:rows], picture[:rows])
    clear = 1.0 + sky.fog * depth
    haze = 1.0 - 1.0 / (clear * clear)
    haze = np.where(facing == Facing.GLOW, haze * np.float32(0.5), haze)
    haze = np.where(above, np.float32(min(sky.fog * 18.0, 0.9)), haze)[:, :, None]
    picture += (_float(sky.skyline) - picture) * haze
    picture = _mirror(canvas, dice, sky, picture, ground)
    picture = (picture[0::2, 0::2] + picture[0::2, 1::2]) + (picture[1::2, 0::2] + picture[1::2, 1::2])
    return _expose(dice, sky, picture * (1.0 / SUPERSAMPLE**2), _lamps(canvas, dice, sky))


def _float(values: object) -> Array:
    """float32: its + - * / round in one way only, vectorised or not, and it is twice as fast as float64."""
    return np.array(values, dtype=np.float32)


def _textured(canvas: Canvas, numbers: Array, facing: Array) -> tuple[Array, Array]:
    """Depth in metres and the texture's factor, both [2H, 2W]: patterns lie on their surfaces in perspective."""
    camera: Camera = canvas.camera
    height, width = numbers.shape
    dx: Array = (np.arange(width, dtype=np.float32) + 0.5 - camera.centre)[None, :]
    dy = (np.arange(height, dtype=np.float32) + 0.5 - camera.horizon)[:, None]
    plane = np.array([surface.plane for surface in canvas.surfaces], dtype=np.float32)
    nearness: Array = plane[:, 0][numbers] * dx + plane[:, 1][numbers] * dy + plane[:, 2][numbers]
    nearness = np.clip(nearness, 1.0 / FAR, 1.0)
    depth = 1.0 / nearness
    metres = depth / camera.focal
    wall, ground = (facing == Facing.RIGHT) | (facing == Facing.LEFT), facing == Facing.UP
    u, v = np.where(wall, depth, metres * dx), np.where(ground, depth, metres * dy)
    kinds = np.array([surface.texture for surface in canvas.surfaces], dtype=np.int64)
    scale = SCALE[kinds][numbers]
    shift = 13 * numbers.astype(np.int64)  # two houses of the same brick do not show the same brick
    row, column = (v * scale + 4096.0).astype(np.int64) + shift, (u * scale + 4096.0).astype(np.int64) + shift
    pattern = atlas()[kinds[numbers], row % TEXELS, column % TEXELS]
    strength = STRENGTH[kinds][numbers] * np.clip(nearness * 14.0, 0.35, 1.0)  # it averages out far away
    return depth, 1.0 + strength * pattern


def _sky(canvas: Canvas, dice: Dice, sky: Weather) -> Array:
    """The sky with its clouds, [2H, 2W, 3]; soft, hence painted at half the size."""
    width, height = canvas.size[0] // SUPERSAMPLE, canvas.size[1] // SUPERSAMPLE
    horizon = max(canvas.camera.horizon / SUPERSAMPLE, 1.0)
    fall = np.clip(np.arange(height, dtype=np.float32) / np.float32(horizon), 0.0, 1.0)[:, None, None]
    colour = _float(sky.zenith) + (_float(sky.skyline) - _float(sky.zenith)) * fall
    drift = value_noise(dice, width, height, max(height // 5, 1)) * 0.6
    drift = drift + value_noise(dice, width, height, max(height // 14, 1)) * 0.4
    cover = np.clip((drift - 0.75 + 0.55 * sky.clouds) * 4.0, 0.0, 1.0)[:, :, None] * 0.8
    white = _float(sky.skyline) * (0.72 + 0.5 * drift[:, :, None])
    return (colour + (white - colour) * cover).repeat(SUPERSAMPLE, axis=0).repeat(SUPERSAMPLE, axis=1)


def _mirror(canvas: Canvas, dice: Dice, sky: Weather, picture: Array, ground: Array) -> Array:
    """Wet ground shows what stands above the horizon, upside down."""
    mirror = np.maximum(np.asarray(canvas.wet) * np.float32(0.55 / 255.0), np.float32(sky.wet))
    strength = np.where(ground, mirror, np.float32(0.0))
    if not strength.any():
        return picture
    height = picture.shape[0]
    rows = np.arange(height)
    flipped = np.clip(2 * int(canvas.camera.horizon) - rows, 0, height - 1)
    ripple = (dice.generator.random((height,)) * 3.0).astype(np.int64)
    reflected = picture[np.clip(flipped + ripple, 0, height - 1)]
    return picture + (reflected - picture) * strength[:, :, None]


def _lamps(canvas: Canvas, dice: Dice, sky: Weather) -> Array | None:
    """Pools of light at night, float32 [H, W, 1], as a factor to add."""
    if not sky.night:
        return None
    width, height = canvas.size[0] // SUPERSAMPLE, canvas.size[1] // SUPERSAMPLE
    x, y = np.arange(width, dtype=np.float32)[None, :], np.arange(height, dtype=np.float32)[:, None]
    glow: Array = np.zeros((height, width), np.float32)
    for _ in range(dice.count(2, 5)):
        dx = (x - dice.between(0.0, 1.0) * width) / (height * dice.between(0.1, 0.3))
        dy = (y - dice.between(0.3, 1.0) * height) / (height * dice.between(0.08, 0.2))
        glow = glow + dice.between(0.4, 1.3) / (1.0 + dx * dx + dy * dy)
    return glow[:, :, None]


def _expose(dice: Dice, sky: Weather, picture: Array, lamps: Array | None) -> Array:
    height, width, _ = picture.shape
    if lamps is not None:
        picture = picture * (1.0 + lamps * _float((1.0, 0.85, 0.6)))
    if sky.rain:
        streaks = dice.generator.random((height, width)) < 0.012
        streaks |= np.roll(streaks, 1, 0) | np.roll(streaks, 2, 0)
        picture = picture + streaks[:, :, None] * 26.0
    if sky.blur:
        picture = _smooth(picture, 1)
        picture = _smooth(picture, 0) if sky.blur == 1 else _smooth(picture, 1)
    x = (np.arange(width, dtype=np.float32) * 2 - width) / width
    y = (np.arange(height, dtype=np.float32) * 2 - height) / height
    corner = 1.0 - 0.09 * (x * x)[None, :, None] - 0.09 * (y * y)[:, None, None]
    patches = 0.88 + 0.24 * value_noise(dice, width, height, max(height // 2, 1))[:, :, None]
    picture = picture * corner * patches * _float(sky.cast)
    picture = (picture - 110.0) * sky.contrast + (110.0 + sky.lift)
    grain: Array = np.zeros(picture.shape, np.float32)
    for _ in range(3):  # three dice are near enough to a normal distribution
        grain = grain + dice.generator.integers(0, 256, picture.shape, dtype=np.uint8)
    picture = picture + (grain - 382.5) * (sky.noise / 128.0)  # the sum's standard deviation is 128
    return (np.clip(picture, 0.0, 255.0) + 0.5).astype(np.uint8)


def _smooth(picture: Array, axis: int) -> Array:
    """A 1-2-1 blur along one axis; edges keep their value."""
    last = picture.shape[axis] - 1
    place = np.arange(last + 1)
    before, after = (np.take(picture, np.clip(place + step, 0, last), axis) for step in (-1, 1))
    return (before + picture * 2.0 + after) * 0.25
