"""A dozen German road signs, drawn by program: test pictures that anyone may have, whatever photographs are at hand.

Each sign is drawn sixteen times too large in front of sky and foliage, turned a little, lit, and then scaled to 32x32
with the blur and the noise of a small camera. Drawing depends on nothing but Pillow and a fixed seed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 32
_OVERSAMPLING = 16
_REACH = 0.8  # of the half side: signs leave a border, as in the crops that the classifier was trained on

Colour = tuple[int, int, int]
Point = tuple[float, float]

RED: Colour = (186, 28, 40)
BLUE: Colour = (16, 78, 156)
YELLOW: Colour = (246, 190, 24)
WHITE: Colour = (240, 240, 238)
BLACK: Colour = (22, 22, 26)


@dataclass(frozen=True)
class Sign:
    """One drawn sign: its name in the recipe ``road-signs``, its class there, and the picture, uint8 (32, 32, 3)."""

    name: str
    label: int
    image: NDArray[np.uint8]


def draw_signs(seed: int = 0) -> list[Sign]:
    """The signs of `SIGNS`, each before a background and in a light of its own; the ``seed`` decides it all."""
    signs = []
    for label, (name, draw) in SIGNS.items():
        random = np.random.default_rng((seed, label))
        pen = _Pen(SIDE * _OVERSAMPLING)
        draw(pen)
        signs.append(Sign(name, label, _photograph(pen.layer, random)))
    return signs


class _Pen:
    """Draws on a transparent square; coordinates run from -1 to 1 over the sign, y downwards."""

    def __init__(self, side: int) -> None:
        self.layer = Image.new("RGBA", (side, side))
        self._draw = ImageDraw.Draw(self.layer)
        self._half = side / 2

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self._draw.polygon([self._pixel(point) for point in points], fill=colour)

    def disc(self, radius: float, colour: Colour, centre: Point = (0.0, 0.0)) -> None:
        self._draw.ellipse(self._box(centre, radius), fill=colour)

    def arc(self, radius: float, start: float, end: float, width: float, colour: Colour) -> None:
        """Angles in degrees, clockwise from three o'clock; ``radius`` is that of the middle of the stroke."""
        box = self._box((0.0, 0.0), radius + width / 2)
        self._draw.arc(box, start, end, fill=colour, width=round(width * self._half * _REACH))

    def bar(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def text(self, text: str, width: float, height: float, weight: float, colour: Colour, y: float = 0.0) -> None:
        """Letters stretched to ``width`` and ``height``, thickened by ``weight`` of their height: as on road signs."""
        size = 200
        font = ImageFont.load_default(size=size)
        stroke = round(weight * size)
        box = font.getbbox(text, stroke_width=stroke)
        letters = Image.new("L", (math.ceil(box[2] - box[0]), math.ceil(box[3] - box[1])))
        ImageDraw.Draw(letters).text((-box[0], -box[1]), text, font=font, fill=255, stroke_width=stroke)
        left, top = self._pixel((-width / 2, y - height / 2))
        right, bottom = self._pixel((width / 2, y + height / 2))
        letters = letters.resize((round(right - left), round(bottom - top)), Image.Resampling.LANCZOS)
        self.layer.paste(colour, (round(left), round(top)), letters)

    def stroke(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """A line of constant ``width`` along ``points``."""
        pixels = [self._pixel(point) for point in points]
        self._draw.line(pixels, fill=colour, width=round(width * self._half * _REACH), joint="curve")

    def _pixel(self, point: Point) -> tuple[float, float]:
        return (1 + point[0] * _REACH) * self._half, (1 + point[1] * _REACH) * self._half

    def _box(self, centre: Point, radius: float) -> tuple[float, float, float, float]:
        left, top = self._pixel((centre[0] - radius, centre[1] - radius))
        right, bottom = self._pixel((centre[0] + radius, centre[1] + radius))
        return left, top, right, bottom


def _regular(corners: int, radius: float, turn: float, centre: Point = (0.0, 0.0)) -> list[Point]:
    """A regular polygon whose first corner lies at ``turn`` degrees, clockwise from three o'clock."""
    angles = [math.radians(turn + 360 * i / corners) for i in range(corners)]
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _arrow(pen: _Pen, tail: Point, tip: Point, width: float, head: float, colour: Colour) -> None:
    """A straight arrow with a head that is ``head`` long and 2 * ``head`` wide."""
    length = math.dist(tail, tip)
    along = ((tip[0] - tail[0]) / length, (tip[1] - tail[1]) / length)
    across = (-along[1], along[0])

    def at(forward: float, sideways: float) -> Point:
        return (
            tail[0] + forward * along[0] + sideways * across[0],
            tail[1] + forward * along[1] + sideways * across[1],
        )

    neck, half = length - head, width / 2
    outline = [at(0, half), at(neck, half), at(neck, head), at(length, 0), at(neck, -head), at(neck, -half)]
    pen.polygon([*outline, at(0, -half)], colour)


def _stop(pen: _Pen) -> None:
    pen.polygon(_regular(8, 1.08, 22.5), WHITE)
    pen.polygon(_regular(8, 1.02, 22.5), RED)
    pen.text("STOP", 1.56, 0.64, 0.035, WHITE)


def _give_way(pen: _Pen) -> None:
    pen.polygon(_regular(3, 1.2, 90, (0.0, -0.22)), RED)
    pen.polygon(_regular(3, 0.68, 90, (0.0, -0.22)), WHITE)


def _priority_road(pen: _Pen) -> None:
    pen.polygon(_regular(4, 1.1, 0), WHITE)
    pen.polygon(_regular(4, 0.72, 0), YELLOW)


def _no_entry(pen: _Pen) -> None:
    pen.disc(1.0, WHITE)
    pen.disc(0.96, RED)
    pen.bar(-0.7, -0.2, 0.7, 0.2, WHITE)


def _prohibition(pen: _Pen) -> None:
    pen.disc(1.0, RED)
    pen.disc(0.78, WHITE)


def _bow(x: float, y: float, radius: float, start: float, end: float, height: float = 1.0) -> list[Point]:
    """Part of an ellipse; angles in degrees, clockwise from three o'clock."""
    angles = [math.radians(start + (end - start) * i / 24) for i in range(25)]
    return [(x + radius * math.cos(a), y + height * radius * math.sin(a)) for a in angles]


# Middle lines of the strokes, in a box 0.5 wide and 1 high: narrow figures of one thickness, as on German signs.
DIGITS: dict[str, list[list[Point]]] = {
    "0": [[*_bow(0.25, 0.25, 0.25, 180, 360), *_bow(0.25, 0.75, 0.25, 0, 180), (0.0, 0.25), (0.0, 0.2)]],
    "1": [[(0.02, 0.2), (0.28, 0.0), (0.28, 1.06)]],
    "2": [[*_bow(0.25, 0.26, 0.25, 190, 395), (0.02, 1.0), (0.54, 1.0)]],
    "3": [_bow(0.24, 0.24, 0.24, 195, 450), _bow(0.24, 0.73, 0.26, 270, 525)],
    "5": [[(0.49, 0.0), (0.05, 0.0), (0.03, 0.48), *_bow(0.23, 0.69, 0.26, 225, 515, height=1.15)]],
    "8": [_bow(0.25, 0.23, 0.22, 0, 375), _bow(0.25, 0.74, 0.26, 0, 375)],
}


def _speed_limit(number: str, width: float, stroke: float) -> Callable[[_Pen], None]:
    """``width`` is that of one figure, from the middle of its left stroke to the middle of its right one."""

    def draw(pen: _Pen) -> None:
        _prohibition(pen)
        height, pitch = 0.72, width + stroke + 0.1
        for place, digit in enumerate(number):
            left = (place - (len(number) - 1) / 2) * pitch - width / 2
            for line in DIGITS[digit]:
                pen.stroke([(left + 2 * width * x, height * (y - 0.5)) for x, y in line], stroke, BLACK)

    return draw


def _car(pen: _Pen, x: float, colour: Colour) -> None:
    """Seen from behind, 0.5 wide."""
    pen.polygon([(x - 0.14, -0.24), (x + 0.14, -0.24), (x + 0.21, 0.0), (x - 0.21, 0.0)], colour)
    pen.bar(x - 0.25, -0.02, x + 0.25, 0.2, colour)
    for side in (-1, 1):
        pen.bar(x + side * 0.17 - 0.07, 0.18, x + side * 0.17 + 0.07, 0.3, colour)
    pen.polygon([(x - 0.1, -0.18), (x + 0.1, -0.18), (x + 0.13, -0.04), (x - 0.13, -0.04)], WHITE)


def _no_overtaking(pen: _Pen) -> None:
    _prohibition(pen)
    _car(pen, -0.32, RED)
    _car(pen, 0.32, BLACK)


def _warning(pen: _Pen) -> None:
    pen.polygon(_regular(3, 1.2, -90, (0.0, 0.22)), RED)
    pen.polygon(_regular(3, 0.82, -90, (0.0, 0.22)), WHITE)


def _danger(pen: _Pen) -> None:
    _warning(pen)
    pen.polygon([(-0.11, -0.32), (0.11, -0.32), (0.08, 0.26), (-0.08, 0.26)], BLACK)
    pen.disc(0.11, BLACK, (0.0, 0.44))


def _priority_at_next_intersection(pen: _Pen) -> None:
    _warning(pen)
    _arrow(pen, (0.0, 0.58), (0.0, -0.36), 0.26, 0.3, BLACK)
    pen.bar(-0.32, 0.12, 0.32, 0.32, BLACK)


def _straight_ahead_only(pen: _Pen) -> None:
    pen.disc(1.0, WHITE)
    pen.disc(0.96, BLUE)
    _arrow(pen, (0.0, 0.72), (0.0, -0.74), 0.24, 0.38, WHITE)


def _keep_right(pen: _Pen) -> None:
    pen.disc(1.0, WHITE)
    pen.disc(0.96, BLUE)
    _arrow(pen, (-0.5, -0.5), (0.52, 0.52), 0.24, 0.38, WHITE)


def _roundabout(pen: _Pen) -> None:
    pen.disc(1.0, WHITE)
    pen.disc(0.96, BLUE)
    for tip in (30, 150, 270):
        pen.arc(0.52, tip + 14, tip + 94, 0.18, WHITE)
        centre = (0.52 * math.cos(math.radians(tip + 14)), 0.52 * math.sin(math.radians(tip + 14)))
        pen.polygon(_regular(3, 0.27, tip - 76, centre), WHITE)


SIGNS: dict[int, tuple[str, Callable[[_Pen], None]]] = {
    14: ("stop", _stop),
    13: ("give way", _give_way),
    12: ("priority road", _priority_road),
    17: ("no entry", _no_entry),
    1: ("speed limit 30", _speed_limit("30", 0.38, 0.11)),
    2: ("speed limit 50", _speed_limit("50", 0.38, 0.11)),
    5: ("speed limit 80", _speed_limit("80", 0.38, 0.11)),
    8: ("speed limit 120", _speed_limit("120", 0.24, 0.1)),
    9: ("no overtaking", _no_overtaking),
    18: ("danger", _danger),
    11: ("priority at next intersection", _priority_at_next_intersection),
    35: ("straight ahead only", _straight_ahead_only),
    38: ("keep right", _keep_right),
    40: ("roundabout", _roundabout),
}
"""Class of the recipe ``road-signs`` -> name and drawing."""


def _photograph(sign: Image.Image, random: np.random.Generator) -> NDArray[np.uint8]:
    """``sign`` in front of a background, turned, lit, scaled down, blurred and noisy: uint8 (32, 32, 3)."""
    side = sign.width
    turned = sign.rotate(random.uniform(-6, 6), Image.Resampling.BICUBIC)
    scene = _background(side, random)
    scene.paste(turned, (0, 0), turned)
    small = scene.resize((SIDE, SIDE), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(random.uniform(0.2, 0.5)))
    light = np.asarray(small, np.float32) * _lighting(random)
    noisy = light + random.normal(0, 2.5, light.shape)
    pixels: NDArray[np.uint8] = np.rint(noisy.clip(0, 255)).astype(np.uint8)
    return pixels


def _background(side: int, random: np.random.Generator) -> Image.Image:
    """Sky above foliage, out of focus."""
    height = np.linspace(0, 1, side)[:, None, None]
    bright, pale = np.array([196, 214, 232.0]), np.array([150, 184, 222.0])
    sky = pale + (bright - pale) * height
    patches = Image.fromarray(random.integers(0, 256, (9, 9), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    shade = np.asarray(patches, np.float32)[:, :, None] / 255
    foliage = np.array([44, 66, 34]) + shade * np.array([62, 66, 40])
    skyline = random.uniform(0.1, 0.9) + 0.25 * (shade - 0.5)
    scene = np.where(height < skyline, sky, foliage)
    return Image.fromarray(scene.astype(np.uint8)).filter(ImageFilter.GaussianBlur(side / 24))


def _lighting(random: np.random.Generator) -> NDArray[np.float32]:
    """Brightness (32, 32, 3) that falls off in one direction, with a tint: late sun or an overcast day."""
    angle, contrast = random.uniform(0, 2 * math.pi), random.uniform(0.05, 0.2)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    slope = 1 + contrast * (x * math.cos(angle) + y * math.sin(angle))
    tint = 1 + random.uniform(-0.05, 0.05) * np.array([1, 0, -1])
    light: NDArray[np.float32] = (random.uniform(0.7, 0.9) * slope[:, :, None] * tint).astype(np.float32)
    return light
