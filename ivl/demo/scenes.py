"""Pictures and clips of the demo: digits on coloured things, with perspective, uneven light, blur and noise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageChops, ImageFilter

from ivl.demo.backdrops import backdrop
from ivl.demo.digits import INK, Digits
from ivl.demo.things import (
    CELL,
    CENTRE,
    COLOURS,
    HANDWRITTEN,
    NOTE,
    OFFSETS,
    SIZE,
    VARIANTS,
    Thing,
    coefficients,
    thing,
)

FRAMES, RESTS = 8, 3
"""Frames of a clip, and those in which its thing rests, at the beginning and at the end"""
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
INKS = ((28, 30, 38), (24, 34, 84), (60, 26, 30))
LIGHTS = 16
BLURRED, NOISY = 0.3, 0.5
"""Shares of the pictures that are out of focus, and that have the noise of a sensor"""


@dataclass(frozen=True)
class Note:
    """One thing: the digit on it, its colour, and its box (left, top, right, bottom) in pixels."""

    value: int
    colour: str
    box: tuple[int, int, int, int]


Labelled = tuple[Thing, Image.Image, tuple[int, int, int]]
"""A thing, the mask of the digit on it, and the colour of its ink"""


def labelled(rng: np.random.Generator, digits: Digits, subject: str, value: int, colour: str) -> Labelled:
    """Put a digit on a thing of a random shade and perspective."""
    base = thing(subject, colour, int(rng.integers(VARIANTS)))
    ink = digits.written if subject in HANDWRITTEN else digits.printed
    scan, hand = ink(rng, value)
    scale, (x, y) = INK / SIZE, CENTRE
    from_plane = np.array([(scale, 0, INK / 2 - scale * x), (0, scale, INK / 2 - scale * y), (0, 0, 1)])
    shape = (NOTE, NOTE)
    plane = coefficients(hand @ from_plane @ base.plane)
    mask = scan.transform(shape, Image.Transform.PERSPECTIVE, plane, Image.Resampling.BILINEAR)
    return base, mask, INKS[rng.integers(len(INKS))] if subject in HANDWRITTEN else INKS[0]


def place(picture: Image.Image, drawn: Labelled, x: int, y: int) -> None:
    """Paste a thing with its digit and its shadow."""
    base, digit, ink = drawn
    picture.paste(base.picture, (x, y), base.cover)
    picture.paste(ink, (x, y), digit)


def empty(rng: np.random.Generator, subject: str, columns: int) -> Image.Image:
    """Cut a picture without things out of a backdrop."""
    behind, width, height = backdrop(subject), columns * CELL, 2 * CELL
    x, y = int(rng.integers(behind.width - width + 1)), int(rng.integers(behind.height - height + 1))
    return behind.crop((x, y, x + width, y + height))


def photographed(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Light a picture unevenly; some get blur, some noise."""
    blurred, noisy = rng.random(2) < (BLURRED, NOISY)
    if blurred:
        picture = picture.filter(ImageFilter.BoxBlur(float(rng.uniform(0.4, 1.1))))
    picture = ImageChops.multiply(picture, lights(picture.size)[int(rng.integers(LIGHTS))])
    return ImageChops.add(picture, noises(picture.size)[int(rng.integers(LIGHTS))], 1, -128) if noisy else picture


@cache
def lights(size: tuple[int, int]) -> list[Image.Image]:
    """Draw lights: brighter on one side than on the other."""
    rng, pictures = np.random.default_rng(0), []
    x, y = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    for angle in rng.uniform(0, 2 * np.pi, LIGHTS):
        light = 0.9 + rng.uniform(0.02, 0.09) * (np.cos(angle) * x + np.sin(angle) * y)
        pictures.append(Image.fromarray((255 * np.clip(light, 0, 1)).astype(np.uint8)).convert("RGB"))
    return pictures


@cache
def noises(size: tuple[int, int]) -> list[Image.Image]:
    """Draw the noise of a sensor, around 128."""
    rng = np.random.default_rng(1)
    shape = (size[1], size[0], 3)
    return [
        Image.fromarray(np.clip(128 + rng.normal(0, deviation, shape), 0, 255).astype(np.uint8))
        for deviation in rng.uniform(1, 6, LIGHTS)
    ]


def _shifted(rng: np.random.Generator, x: int, y: int) -> tuple[int, int]:
    """Shift a thing within its place, whose corner is (x, y)."""
    right, down = rng.integers(len(OFFSETS), size=2).tolist()
    return x + OFFSETS[right], y + OFFSETS[down]


def edges() -> list[int]:
    """Return the pixels at which a box of a picture of two columns can begin or end."""
    starts = [place * CELL + offset for place in (0, 1) for offset in OFFSETS]
    return sorted({*starts, *(start + NOTE for start in starts)})


def compose(
    rng: np.random.Generator, digits: Digits, subject: str, count: int, columns: int = 2
) -> tuple[Image.Image, list[Note]]:
    """Draw a picture of `count` things (4 at most) of a subject, of different digits and colours, in reading order."""
    picture, notes = empty(rng, subject, columns), []
    places = sorted(rng.permutation(2 * columns)[:count].tolist())
    for number, value, colour in zip(places, rng.permutation(10), rng.permutation(list(COLOURS))):
        x, y = _shifted(rng, number % columns * CELL, number // columns * CELL)
        place(picture, labelled(rng, digits, subject, int(value), str(colour)), x, y)
        notes.append(Note(int(value), str(colour), (x, y, x + NOTE, y + NOTE)))
    return photographed(rng, picture), notes


def clip(rng: np.random.Generator, digits: Digits, subject: str) -> tuple[list[Image.Image], Note, str]:
    """Draw frames of one thing that slides to the next place. Returns them, the thing at its start, its direction."""
    direction = str(rng.choice(list(DIRECTIONS)))
    dx, dy = DIRECTIONS[direction]
    lane = int(rng.integers(2)) * CELL
    x, y = (CELL * (dx < 0), lane) if dx else (lane, CELL * (dy < 0))
    value, colour = int(rng.integers(10)), str(rng.choice(list(COLOURS)))
    drawn, behind = labelled(rng, digits, subject, value, colour), empty(rng, subject, 2)
    light = lights(behind.size)[rng.integers(LIGHTS)]
    x, y = _shifted(rng, x, y)
    frames = []
    for n in range(FRAMES):
        frame = behind.copy()
        moved = round(CELL * min(1, max(0, (n - RESTS + 1) / (FRAMES - 2 * RESTS + 1))))
        place(frame, drawn, x + dx * moved, y + dy * moved)
        frames.append(ImageChops.multiply(frame, light))
    return frames, Note(value, colour, (x, y, x + NOTE, y + NOTE)), direction


def write_clip(frames: list[Image.Image], path: Path) -> None:
    """Write an H.264 mp4 of 8 frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "18", "preset": "ultrafast", "threads": "1"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
