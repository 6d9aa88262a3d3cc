"""Pictures and clips of the demo: handwritten digits on coloured notes, on boards.

The handwriting is scikit-learn's bundled `load_digits` (1797 scans of 8x8 pixels). A scan is used either for training
rows or for held-out rows, never for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

CELL = 64
"""Pixels a side of a place on the board; a board is two places high."""
NOTE = 60
STEP = 4
"""Grid of a note within its place, in pixels."""
FRAMES = 8
COLOURS = {"red": (236, 120, 110), "green": (130, 205, 130), "blue": (125, 165, 240), "yellow": (245, 220, 105)}
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
HELD_OUT = 0.15
"""Share of the scans that only held-out rows use."""


@dataclass(frozen=True)
class Note:
    """One note: the digit on it, its colour, and its box (left, top, right, bottom) in pixels."""

    value: int
    colour: str
    box: tuple[int, int, int, int]


class Scans:
    """Handwriting of one half of the data."""

    def __init__(self, held_out: bool) -> None:
        from sklearn.datasets import load_digits  # scikit-learn takes a second to import

        data = load_digits()
        order = np.random.default_rng(0).permutation(len(data.target))
        cut = int(len(order) * HELD_OUT)
        self.ids = order[:cut] if held_out else order[cut:]
        self._varied = not held_out
        self._images = (data.images * (255 / 16)).astype(np.uint8)
        self._values = data.target

    def note(self, rng: np.random.Generator, value: int, colour: str) -> Image.Image:
        """Draw a note with a handwritten digit; in training turned, stretched and moved a little."""
        scan = self._images[rng.choice(self.ids[self._values[self.ids] == value])]
        ink = Image.fromarray(scan).resize((NOTE - 8, NOTE - 8), Image.Resampling.BICUBIC)
        if self._varied:
            ink = _varied(rng, ink)
        paper = tuple(int(c) for c in np.array(COLOURS[colour]) + rng.integers(-12, 13, size=3))
        note = Image.new("RGB", (NOTE, NOTE), paper)
        note.paste((30, 30, 34), (4, 4), ink)
        return note


def _varied(rng: np.random.Generator, ink: Image.Image) -> Image.Image:
    """Vary a digit as another hand might write it: turn by degrees, stretch by per cent, shift by a pixel or two."""
    turn, (wide, high), middle = rng.normal(0, 0.12), rng.normal(1, 0.06, size=2), ink.width / 2
    a, b, d, e = wide * np.cos(turn), wide * np.sin(turn), -high * np.sin(turn), high * np.cos(turn)
    x, y = middle * (1 - a - b) + rng.normal(0, 2), middle * (1 - d - e) + rng.normal(0, 2)
    return ink.transform(ink.size, Image.Transform.AFFINE, (a, b, x, d, e, y), Image.Resampling.BILINEAR)


def board(rng: np.random.Generator, columns: int) -> Image.Image:
    """Draw an empty board: grey cork, a little uneven."""
    grain = 118 + rng.normal(0, 4, size=(2 * CELL // 4, columns * CELL // 4, 1)).repeat(3, axis=2)
    return Image.fromarray(grain.astype(np.uint8)).resize((columns * CELL, 2 * CELL), Image.Resampling.BILINEAR)


def _pinned(rng: np.random.Generator, place: int, columns: int) -> tuple[int, int]:
    x, y = place % columns * CELL, place // columns * CELL
    slack = (CELL - NOTE) // STEP + 1
    return x + STEP * int(rng.integers(slack)), y + STEP * int(rng.integers(slack))


def compose(rng: np.random.Generator, scans: Scans, count: int, columns: int = 2) -> tuple[Image.Image, list[Note]]:
    """Draw a board with `count` notes (4 at most) of different digits and colours, in reading order."""
    picture, notes = board(rng, columns), []
    places = sorted(rng.permutation(2 * columns)[:count].tolist())
    for place, value, colour in zip(places, rng.permutation(10), rng.permutation(list(COLOURS))):
        x, y = _pinned(rng, place, columns)
        picture.paste(scans.note(rng, int(value), str(colour)), (x, y))
        notes.append(Note(int(value), str(colour), (x, y, x + NOTE, y + NOTE)))
    return picture, notes


def clip(rng: np.random.Generator, scans: Scans) -> tuple[list[Image.Image], Note, str]:
    """Draw frames of one note that slides to the next place. Returns them, the note at its start, and its direction."""
    direction = str(rng.choice(list(DIRECTIONS)))
    dx, dy = DIRECTIONS[direction]
    lane = int(rng.integers(2)) * CELL
    x, y = (CELL * (dx < 0), lane) if dx else (lane, CELL * (dy < 0))
    value, colour = int(rng.integers(10)), str(rng.choice(list(COLOURS)))
    note, empty = scans.note(rng, value, colour), board(rng, 2)
    frames = []
    for n in range(FRAMES):
        frame = empty.copy()
        moved = round(CELL * n / (FRAMES - 1))
        frame.paste(note, (x + 2 + dx * moved, y + 2 + dy * moved))
        frames.append(frame)
    return frames, Note(value, colour, (x, y, x + NOTE, y + NOTE)), direction


def write_clip(frames: list[Image.Image], path: Path) -> None:
    """Write an H.264 mp4 of 8 frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "18", "preset": "veryfast", "threads": "1"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
