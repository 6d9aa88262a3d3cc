"""Digits of the demo as masks of ink: handwriting of scikit-learn's scans, and print in a few typefaces.

The handwriting is scikit-learn's bundled `load_digits` (1797 scans of 8x8 pixels), drawn out to smooth strokes. A scan
is used either for training rows or for held-out rows, never for both. The typefaces need no font of the machine:
Aileron, bundled with Pillow, in wide, narrow and slanted cuts, and the dots of a printer, drawn here.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK = 72
"""Pixels a side of a mask"""
HELD_OUT = 0.15
"""Share of the scans that only held-out rows use"""
CUTS = ((2, 1.1, 0.0), (2, 0.8, 0.0), (2, 1.0, 0.2))
"""Added weight, relative width and slant of Aileron"""
DOTS = (
    "01110 10001 10001 10001 10001 10001 01110", "00100 01100 10100 00100 00100 00100 11111",
    "01110 10001 00001 00110 01000 10000 11111", "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 00100 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100",
)  # fmt: skip
"""Dots of a printer with seven pins, by digit, row by row"""


class Digits:
    """Masks of ink of one half of the data; in training each use is turned, stretched and moved a little."""

    def __init__(self, held_out: bool) -> None:
        from sklearn.datasets import load_digits  # scikit-learn takes a second to import

        data = load_digits()
        order = np.random.default_rng(0).permutation(len(data.target))
        cut = int(len(order) * HELD_OUT)
        self.ids = order[:cut] if held_out else order[cut:]
        self._by_value = [self.ids[data.target[self.ids] == value] for value in range(10)]
        self._sharp, self._varied = sharpened(data.images), not held_out
        self._written: dict[int, Image.Image] = {}

    def written(self, rng: np.random.Generator, value: int) -> tuple[Image.Image, np.ndarray]:
        """Return a handwritten digit, 255 where there is ink (mode L, INK pixels a side), and its variation."""
        number = int(rng.choice(self._by_value[value]))
        if number not in self._written:
            self._written[number] = stroke(self._sharp[number])
        return self._written[number], self._variation(rng)

    def printed(self, rng: np.random.Generator, value: int) -> tuple[Image.Image, np.ndarray]:
        """Return a digit in one of the typefaces, and its variation."""
        faces = typefaces()
        return faces[int(rng.integers(len(faces)))][value], self._variation(rng)

    def _variation(self, rng: np.random.Generator) -> np.ndarray:
        return variation(rng) if self._varied else np.eye(3)


def sharpened(scans: np.ndarray) -> np.ndarray:
    """Sharpen scans of 8x8 pixels (N, 8, 8; 0 to 16), with a margin: (N, 12, 12), ink near 1.

    A part of its surroundings is taken off each pixel, which opens loops that ran full.
    """
    grey = np.pad(scans, ((0, 0), (2, 2), (2, 2))).astype(np.float32) / 16
    around = np.mean([np.roll(grey, (x, y), (1, 2)) for x in (-1, 0, 1) for y in (-1, 0, 1)], axis=0)
    return 1.45 * grey - 0.7 * around


def stroke(sharp: np.ndarray) -> Image.Image:
    """Draw a sharpened scan (12, 12) as a smooth stroke of ink."""
    wide, margin = INK * 12 // 8, INK * 2 // 8
    drawn = Image.fromarray(sharp).resize((wide, wide), Image.Resampling.BICUBIC)
    step = np.clip((np.asarray(drawn)[margin:-margin, margin:-margin] - 0.37) / 0.14 + 0.5, 0, 1)
    return Image.fromarray(np.round(255 * step * step * (3 - 2 * step)).astype(np.uint8))


@cache
def typefaces() -> list[list[Image.Image]]:
    """Draw the ten digits of each typeface."""
    faces = [[_aileron(value, *cut) for value in range(10)] for cut in CUTS]
    return [*faces, [_dots(value) for value in range(10)]]


def _aileron(value: int, weight: int, width: float, slant: float) -> Image.Image:
    ink = Image.new("L", (2 * INK, 2 * INK))
    font = ImageFont.load_default(size=72)
    ImageDraw.Draw(ink).text((40, 20), str(value), fill=255, font=font, stroke_width=weight)
    ink = ink.crop(ink.getbbox())
    height = INK - 10
    ink = ink.resize((max(1, round(ink.width * height / ink.height * width)), height), Image.Resampling.LANCZOS)
    mask = Image.new("L", (INK, INK))
    mask.paste(ink, ((INK - ink.width) // 2, 5))
    affine = (1, slant, -slant * INK / 2, 0, 1, 0)
    return mask.transform(mask.size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC) if slant else mask


def _dots(value: int) -> Image.Image:
    mask = Image.new("L", (4 * INK, 4 * INK))
    draw, pitch, radius = ImageDraw.Draw(mask), 9.2 * 4, 6 * 4
    for row, line in enumerate(DOTS[value].split()):
        for column, dot in enumerate(line):
            if dot == "1":
                x, y = 2 * INK + (column - 2) * pitch, 2 * INK + (row - 3) * pitch
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask.reduce(4)


def variation(rng: np.random.Generator) -> np.ndarray:
    """Vary a digit as another hand might write it: turn by degrees, stretch by per cent, shift by a pixel or two.

    Returns the map (3, 3) from pixels of the varied mask to those of the mask.
    """
    turn, wide, high, right, down = (rng.standard_normal(5) * (0.12, 0.06, 0.06, 1.7, 1.7)).tolist()
    wide, high, middle = 1 + wide, 1 + high, INK / 2
    cos, sin = math.cos(turn), math.sin(turn)
    a, b, d, e = wide * cos, wide * sin, -high * sin, high * cos
    x, y = middle * (1 - a - b) + right, middle * (1 - d - e) + down
    return np.array([(a, b, x), (d, e, y), (0, 0, 1)])
