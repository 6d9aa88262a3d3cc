"""Backdrops of the demo's pictures: cork, wood, the belt of a conveyor and plaster, each larger than a picture."""

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
    picture = Image.new("RGB", (WIDTH, HEIGHT), (112, 82, 54))
    draw = ImageDraw.Draw(picture)
    for _ in range(WIDTH * HEIGHT // 12):
        x, y, r = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), rng.uniform(0.6, 2.6)
        shade, flat = float(rng.normal(0, 17)), rng.uniform(0.5, 1)
        brown = (int(112 + shade), int(82 + 0.9 * shade), int(54 + 0.7 * shade))
        draw.ellipse((x - r, y - flat * r, x + r, y + flat * r), fill=brown)
    return picture.filter(ImageFilter.GaussianBlur(0.5))


def _wood(rng: np.random.Generator) -> Image.Image:
    """Draw the top of a table: long, fine veins."""
    shade = np.zeros((HEIGHT, WIDTH))
    for length, strength in ((64, 6), (16, 4)):
        veins = Image.fromarray(rng.normal(0, 1, size=(HEIGHT, WIDTH // length + 2)).astype(np.float32))
        shade += strength * np.asarray(veins.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    pixels = np.array((104, 76, 52)) + shade[..., None] * np.array((1, 0.9, 0.75))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _belt(rng: np.random.Generator) -> Image.Image:
    """Draw the ribbed rubber belt of a conveyor."""
    pitch = CELL // 16
    rib = 70 + 16 * np.sin(2 * np.pi * np.arange(WIDTH) / pitch)
    pixels = np.stack([rib, rib + 2, rib + 6], axis=-1)[None].repeat(HEIGHT, axis=0)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 2, size=(HEIGHT, WIDTH, 1)), 0, 255).astype(np.uint8))


def _plaster(rng: np.random.Generator) -> Image.Image:
    """Draw a wall of rough plaster: grains lit from above, each with its shade below."""
    grains = Image.fromarray(rng.integers(0, 256, size=(HEIGHT, WIDTH), dtype=np.uint8))
    height = np.asarray(grains.filter(ImageFilter.GaussianBlur(1.2)), dtype=float)
    lit = 98 + 1.2 * (height - np.roll(height, 1, axis=0))
    return Image.fromarray(np.clip(lit[..., None] + np.array((4, 0, -6)), 0, 255).astype(np.uint8))


DRAWERS: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "note": _cork, "tag": _wood, "parcel": _belt, "sign": _plaster,
}  # fmt: skip
