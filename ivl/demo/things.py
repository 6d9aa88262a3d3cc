"""Things of the demo's pictures that bear a digit: sticky notes, price tags, parcels and enamel signs.

Each is drawn once, in some shades and perspectives, and used in many pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUBJECTS = ("note", "tag", "parcel", "sign")
COLOURS = {"red": (236, 112, 102), "green": (122, 205, 124), "blue": (118, 162, 244), "yellow": (248, 220, 96)}
HANDWRITTEN = ("note", "parcel")
"""Subjects whose digits are written by hand; the others' are printed"""
CELL = 80
"""Pixels a side of a place in a picture; a picture is two places high."""
NOTE = 75
"""Pixels a side of a thing"""
OFFSETS = (0, CELL - NOTE)
"""Pixels by which a thing may lie right of, or below, the corner of its place: one pixel of what the model sees"""
VARIANTS = 12
"""Shades and perspectives of each kind and colour"""
FINE = 2
"""Pixels that are drawn for one of a thing, a side"""
SKEW = 0.04
"""Largest shift of a corner by perspective, as a share of a side"""
SHADOW = 3
"""Pixels by which a shadow lies lower and more to the right than its thing"""
DARK = (16, 12, 10)
"""Colour of a shadow"""
CENTRE, SIZE = (0.5, 0.53), 0.8
"""Middle and side of the digit's mask on a thing, as shares of its sides: one place is learnt soonest"""

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Thing:
    """A thing without a digit, its shadow, and the map from its picture's pixels to its plane."""

    picture: Image.Image
    """The thing with its shadow"""
    cover: Image.Image
    """Opacity: 255 on the thing, less than half of it on its shadow alone (mode L)"""
    plane: np.ndarray
    """(3, 3): from pixels of the picture to the thing as drawn from the front, sides from 0 to 1"""


@cache
def thing(subject: str, colour: str, variant: int) -> Thing:
    """Draw a thing in a shade and a perspective."""
    rng = np.random.default_rng([SUBJECTS.index(subject), list(COLOURS).index(colour), variant])
    red, green, blue = (np.array(COLOURS[colour]) + rng.integers(-10, 8, size=3)).tolist()
    paper = (red, green, blue)
    side = FINE * NOTE
    front = Image.new("RGBA", (side, side), (*paper, 0))
    DRAWERS[subject](ImageDraw.Draw(front), side, paper)
    plane = homography(corners(rng))
    fine = plane @ np.diag([1 / FINE, 1 / FINE, 1])  # from fine pixels of the output
    flat = np.diag([side, side, 1]) @ fine
    warped = front.transform(front.size, Image.Transform.PERSPECTIVE, coefficients(flat), Image.Resampling.BICUBIC)
    warped = warped.reduce(FINE)
    mask = warped.getchannel("A")
    picture = Image.new("RGBA", (NOTE + SHADOW, NOTE + SHADOW), (*DARK, 0))
    shadow = mask.filter(ImageFilter.GaussianBlur(NOTE / 40)).point([round(0.45 * v) for v in range(256)])
    picture.paste(Image.merge("RGBA", [*Image.new("RGB", mask.size, DARK).split(), shadow]), (SHADOW, SHADOW))
    picture.alpha_composite(warped)
    return Thing(picture.convert("RGB"), picture.getchannel("A"), plane)


def corners(rng: np.random.Generator) -> np.ndarray:
    """Draw four corners, clockwise from the top left, whose box is that of the thing: (4, 2), in pixels."""
    inward = rng.uniform(0, SKEW * NOTE, size=(4, 2))
    for axis, pairs in ((0, ((0, 3), (1, 2))), (1, ((0, 1), (3, 2)))):
        for pair in pairs:
            inward[list(pair), axis] -= inward[list(pair), axis].min()
    outer = np.array([(0, 0), (NOTE, 0), (NOTE, NOTE), (0, NOTE)], dtype=float)
    return outer + inward * np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)])


def homography(quad: np.ndarray) -> np.ndarray:
    """Return the map of the plane (3, 3) that takes four corners (4, 2) to those of the unit square."""
    equations, values = [], []
    for (x, y), (u, v) in zip(quad, ((0, 0), (1, 0), (1, 1), (0, 1)), strict=True):
        equations += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(equations), np.array(values, dtype=float)), 1).reshape(3, 3)


def coefficients(plane: np.ndarray) -> list[float]:
    """Return a map of the plane as Pillow takes it."""
    return (plane / plane[2, 2]).reshape(-1)[:8].tolist()


def _shade(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(255, int(c * factor)) for c in colour)
    return r, g, b


def _note(draw: ImageDraw.ImageDraw, s: int, paper: Colour) -> None:
    """Sticky note: its glued edge, and a corner that curls."""
    for y in range(s):
        draw.line((0, y, s, y), fill=_shade(paper, 0.94 + 0.1 * y / s))
    draw.rectangle((0, 0, s, 0.08 * s), fill=_shade(paper, 0.86))
    curl = 0.16 * s
    draw.polygon([(s - curl, s), (s, s - curl), (s, s)], fill=(*paper, 0))
    draw.polygon([(s - curl, s), (s, s - curl), (s - 0.8 * curl, s - 0.8 * curl)], fill=_shade(paper, 1.16))
    draw.line((s - curl, s, s - 0.8 * curl, s - 0.8 * curl, s, s - curl), fill=_shade(paper, 0.8), width=2)


def _tag(draw: ImageDraw.ImageDraw, s: int, paper: Colour) -> None:
    """Price tag: pointed at the top, with a ringed hole and a string."""
    outline = [(0.3 * s, 0), (0.7 * s, 0), (s, 0.22 * s), (s, s), (0, s), (0, 0.22 * s)]
    draw.polygon(outline, fill=paper)
    draw.line([*outline, outline[0]], fill=_shade(paper, 0.78), width=round(0.02 * s))
    x, y, r = 0.5 * s, 0.1 * s, 0.06 * s
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(240, 238, 230))
    draw.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=(60, 50, 44))
    draw.line((x, y, 0.56 * s, 0), fill=(240, 238, 230), width=round(0.018 * s))


def _parcel(draw: ImageDraw.ImageDraw, s: int, paper: Colour) -> None:
    """Parcel: lid, tape and a label."""
    draw.rectangle((0, 0, s, s), fill=paper)
    draw.rectangle((0, 0, s, 0.12 * s), fill=_shade(paper, 1.14))
    draw.line((0, 0.12 * s, s, 0.12 * s), fill=_shade(paper, 0.7), width=round(0.015 * s))
    draw.rectangle((0.41 * s, 0, 0.59 * s, s), fill=(214, 190, 146))
    draw.rectangle((0, 0.96 * s, s, s), fill=_shade(paper, 0.85))
    draw.rounded_rectangle((0.18 * s, 0.2 * s, 0.82 * s, 0.9 * s), radius=0.03 * s, fill=(250, 249, 244))


def _sign(draw: ImageDraw.ImageDraw, s: int, paper: Colour) -> None:
    """Sign: an enamelled plate with a white line around, and screws."""
    draw.rounded_rectangle((0, 0, s - 1, s - 1), radius=0.17 * s, fill=paper)
    inset, width = 0.05 * s, round(0.03 * s)
    draw.rounded_rectangle((inset, inset, s - inset, s - inset), 0.13 * s, outline=(252, 252, 250), width=width)
    for x in (0.16, 0.84):
        draw.ellipse(((x - 0.022) * s, 0.478 * s, (x + 0.022) * s, 0.522 * s), fill=(96, 96, 100))


DRAWERS: dict[str, Callable[[ImageDraw.ImageDraw, int, Colour], None]] = {
    "note": _note, "tag": _tag, "parcel": _parcel, "sign": _sign,
}  # fmt: skip
