"""Rows of the demo, of four kinds, each in the ms-swift format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ivl.demo.digits import Digits
from ivl.demo.scenes import Note, clip, compose, write_clip
from ivl.demo.things import SUBJECTS

KINDS = ("single", "turns", "grounding", "video")

Row = dict[str, Any]
QuestionAnswer = tuple[str, str]
"""Question and answer."""


@dataclass(frozen=True)
class Boards:
    """Shares of the kinds of pictures."""

    notes: tuple[float, ...] = (0.3, 0.3, 0.25, 0.15)
    """Shares of pictures with one thing, two, three, four"""
    wide: float = 0.1
    """Share, among questions on one image, of pictures twice as wide: cut into tiles, or else too small to read"""


TRAIN = Boards(notes=(0.7, 0.12, 0.1, 0.08))
"""Shares of the demo's rows for training: with one thing, digits are learnt soonest"""


def write_rows(folder: Path, split: str, counts: dict[str, int], seed: int, boards: Boards = Boards()) -> Iterator[Row]:
    """Make rows of each kind: media below `folder`, rows in `folder/SPLIT.jsonl`. Yields them one by one.

    Rows of the split `train` are made from the scans for training, those of any other from the held-out ones. Equal
    arguments make equal rows, and no row depends on how many others there are.
    """
    make_folders(folder)
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
        for kind, count in counts.items():
            for row in rows_of_kind(folder, split, kind, range(count), seed, boards):
                file.write(json.dumps(row) + "\n")
                yield row


def make_folders(folder: Path) -> None:
    """Make the folders of media below `folder`."""
    for name in ("images", "videos"):
        (folder / name).mkdir(parents=True, exist_ok=True)


def rows_of_kind(
    folder: Path, split: str, kind: str, numbers: Iterable[int], seed: int, boards: Boards = Boards()
) -> Iterator[Row]:
    """Make rows of one kind by their numbers, one by one, with their media; no row depends on another."""
    maker = Maker(folder, split, [seed, KINDS.index(kind)], boards)
    for number in numbers:
        yield maker.row(kind, number)


class Maker:
    """Maker of rows of one half of the data; their media lie below `folder`, named by the row's id."""

    def __init__(self, folder: Path, split: str, seed: int | list[int], boards: Boards = Boards()) -> None:
        self.folder, self.split, self.boards = folder, split, boards
        self.seed = [seed] if isinstance(seed, int) else seed
        self.digits = Digits(held_out=split != "train")

    def row(self, kind: str, number: int) -> Row:
        """Make row `number` of a kind, its `source`; `id` names it in predictions."""
        self.rng = np.random.default_rng([*self.seed, number])
        self.subject = SUBJECTS[self.rng.integers(len(SUBJECTS))]
        name = f"{self.split}-{kind}-{number:05d}"
        return {"id": name, "source": kind, **getattr(self, kind)(name)}

    def single(self, name: str) -> Row:
        """One question on one image."""
        image, notes = self.board(name, columns=4 if self.rng.random() < self.boards.wide else 2)
        query, response = self.question(notes)
        return {"query": query, "response": response, "images": [image]}

    def turns(self, name: str) -> Row:
        """Questions in several turns, on one image or on two; no answer gives that of a later one away."""
        if self.rng.random() < 0.5:
            image, notes = self.board(name)
            pairs = [self.note_of(notes[n]) for n in self.rng.permutation(len(notes))[:2]]
            pairs = pairs if len(pairs) == 2 else [*pairs, self.count(notes)]
            return {**conversation(pairs, "<image>\n"), "images": [image]}
        boards = [self.board(f"{name}{letter}") for letter in "ab"]
        pairs = [self.question(notes) for _, notes in boards]
        pairs = [(f"<image>\n{query}", response) for query, response in pairs]
        return {**conversation(pairs), "images": [image for image, _ in boards]}

    def grounding(self, name: str) -> Row:
        """Question from a name to its box, or from a box to its content."""
        image, notes = self.board(name)
        note = notes[self.rng.integers(len(notes))]
        if self.rng.random() < 0.5:
            query, response, caption = f"Find the {note.colour} {self.subject}.", "<ref-object><bbox>", note.colour
        else:
            query, response, caption = "What is in <bbox>?", "<ref-object>", f"{note.colour} {note.value}"
        objects = [{"caption": caption, "bbox": list(note.box), "bbox_type": "real", "image": 0}]
        return {"query": query, "response": response, "images": [image], "objects": objects}

    def video(self, name: str) -> Row:
        """Question on a clip: the direction in which its thing moves, or the digit on it."""
        frames, note, direction = clip(self.rng, self.digits, self.subject)
        path = f"videos/{name}.mp4"
        write_clip(frames, self.folder / path)
        if self.rng.random() < 0.5:
            return {"query": f"Where does the {self.subject} move?", "response": direction, "videos": [path]}
        return {"query": f"What is on the {self.subject}?", "response": f"{note.colour} {note.value}", "videos": [path]}

    def question(self, notes: list[Note]) -> QuestionAnswer:
        """Question on a picture: half of them on one thing, the others on all."""
        draw = self.rng.random()
        if draw < 0.5:
            return self.note_of(notes[self.rng.integers(len(notes))])
        return self.read(notes) if draw < 0.8 else self.count(notes)

    def note_of(self, note: Note) -> QuestionAnswer:
        """Question on one thing. The answer is colour, then digit: after the colour, the digit takes one step."""
        return f"What is on the {note.colour} {self.subject}?", f"{note.colour} {note.value}"

    def read(self, notes: list[Note]) -> QuestionAnswer:
        """Question for all things in reading order."""
        return f"Read the {self.subject}s.", ", ".join(f"{note.colour} {note.value}" for note in notes)

    def count(self, notes: list[Note]) -> QuestionAnswer:
        """Question for the number of things."""
        return f"How many {self.subject}s are there?", str(len(notes))

    def board(self, name: str, columns: int = 2) -> tuple[str, list[Note]]:
        """Write a picture. Returns its path from the folder, and its things."""
        weights = np.array(self.boards.notes)
        many = 1 + int(self.rng.choice(len(weights), p=weights / weights.sum()))
        image, notes = compose(self.rng, self.digits, self.subject, many, columns)
        path = f"images/{name}.jpg"
        image.save(self.folder / path, quality=90)
        return path, notes


def conversation(pairs: list[QuestionAnswer], mark: str = "") -> Row:
    """Fields of a row: the last question and its answer, the others as history; `mark` stands at the very beginning."""
    turns = [[("" if n else mark) + query, response] for n, (query, response) in enumerate(pairs)]
    query, response = turns.pop()
    return {"query": query, "response": response, **({"history": turns} if turns else {})}
