"""Backdrops of the demo's pictures: cork, wood, rollers of a conveyor and bricks, each larger than a picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ivl.demo.things import CELL, SUBJECTS

WIDTH, HEIGHT = 8 * CELL, 4 * CELL
"""Pixels of a backdrop; a picture is cut out of it at random."""


@cache
def backdrop(subject: str) -> Image.Image:
    """Draw what is behind the things of a subject."""
    rng = np.random.default_rng(SUBJECTS.index(subject))
    picture = DRAWERS[subject](rng)
    grain = rng.normal(0, 3, size=(HEIGHT, WIDTH, 1))
    return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))


def _cork(rng: np.random.Generator) -> Image.Image:
    """Draw cork: crumbs of several browns."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), (126, 94, 62))
    draw = ImageDraw.Draw(picture)
    for _ in range(WIDTH * HEIGHT // 12):
        x, y, r = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), rng.uniform(0.6, 2.6)
        shade, flat = float(rng.normal(0, 17)), rng.uniform(0.5, 1)
        brown = (int(126 + shade), int(94 + 0.9 * shade), int(62 + 0.7 * shade))
        draw.ellipse((x - r, y - flat * r, x + r, y + flat * r), fill=brown)
    return picture.filter(ImageFilter.GaussianBlur(0.5))


def _planks(rng: np.random.Generator) -> Image.Image:
    """Draw planks of wood: long veins, and a dark gap below each plank."""
    pixels, high = np.empty((HEIGHT, WIDTH, 3)), CELL // 2
    for top in range(0, HEIGHT, high):
        veins = Image.fromarray(rng.normal(0, 1, size=(high, WIDTH // 64 + 2)).astype(np.float32))
        veins = veins.resize((WIDTH, high), Image.Resampling.BICUBIC)
        shade = rng.normal(0, 7) + 9 * np.asarray(veins)[..., None]
        pixels[top : top + high] = np.array((112, 82, 56)) + shade * np.array((1, 0.9, 0.75))
        pixels[top + high - 2 : top + high] = (66, 48, 34)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _rollers(rng: np.random.Generator) -> Image.Image:
    """Draw the steel rollers of a conveyor, upright, with a gap between two."""
    pitch = CELL // 4
    place = np.arange(WIDTH) % pitch / pitch
    bright = 74 + 44 * np.sin(np.pi * np.clip(place / 0.9, 0, 1)) ** 0.8 * (1 - 0.45 * place)
    bright[place > 0.9] = 58
    pixels = np.stack([bright, bright + 3, bright + 8], axis=-1)[None].repeat(HEIGHT, axis=0)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 2, size=(1, WIDTH, 1)), 0, 255).astype(np.uint8))


def _bricks(rng: np.random.Generator) -> Image.Image:
    """Draw a wall of bricks in mortar."""
    high, wide = CELL // 5, CELL // 2
    picture = Image.new("RGB", (WIDTH, HEIGHT), (116, 106, 100))
    draw = ImageDraw.Draw(picture)
    for row in range(HEIGHT // high + 1):
        for column in range(-1, WIDTH // wide + 1):
            x, y = column * wide + (row % 2) * wide // 2, row * high
            shade, red = int(rng.integers(-7, 8)), int(rng.integers(-4, 6))
            draw.rectangle((x, y, x + wide - 3, y + high - 3), fill=(110 + shade + red, 80 + shade, 70 + shade))
            draw.line((x, y + high - 3, x + wide - 3, y + high - 3), fill=(84 + shade, 54 + shade, 46 + shade))
    return picture.filter(ImageFilter.GaussianBlur(0.4))


DRAWERS: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "note": _cork, "tag": _planks, "parcel": _rollers, "sign": _bricks,
}  # fmt: skip
