"""Rows of the demo, of four kinds, each in the ms-swift format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ivl.demo.scenes import Note, Scans, clip, compose, write_clip

KINDS = ("single", "turns", "grounding", "video")

Row = dict[str, Any]
QuestionAnswer = tuple[str, str]
"""Question and answer."""


@dataclass(frozen=True)
class Boards:
    """Shares of the kinds of boards."""

    notes: tuple[float, ...] = (0.3, 0.3, 0.25, 0.15)
    """Shares of boards with one note, two, three, four."""
    wide: float = 0.1
    """Share, among questions on one image, of boards twice as wide: cut into tiles, or else too small to read"""


def write_rows(folder: Path, split: str, counts: dict[str, int], seed: int, boards: Boards = Boards()) -> Iterator[Row]:
    """Make rows of each kind: media below `folder`, rows in `folder/SPLIT.jsonl`. Yields them one by one.

    Rows of the split `train` are made from the scans for training, those of any other from the held-out ones. Equal
    arguments make equal rows, and of each kind the first n are the same however many follow.
    """
    make_folders(folder)
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
        for kind, count in counts.items():
            for row in rows_of_kind(folder, split, kind, count, seed, boards):
                file.write(json.dumps(row) + "\n")
                yield row


def make_folders(folder: Path) -> None:
    """Make the folders of media below `folder`."""
    for name in ("images", "videos"):
        (folder / name).mkdir(parents=True, exist_ok=True)


def rows_of_kind(
    folder: Path, split: str, kind: str, count: int, seed: int, boards: Boards = Boards()
) -> Iterator[Row]:
    """Make the rows of one kind, one by one, with their media; they do not depend on the other kinds."""
    maker = Maker(folder, split, [seed, KINDS.index(kind)], boards)
    for number in range(count):
        yield maker.row(kind, number)


class Maker:
    """Maker of rows of one half of the data; their media lie below `folder`, named by the row's id."""

    def __init__(self, folder: Path, split: str, seed: int | list[int], boards: Boards = Boards()) -> None:
        self.folder, self.split, self.rng, self.boards = folder, split, np.random.default_rng(seed), boards
        self.scans = Scans(held_out=split != "train")

    def row(self, kind: str, number: int) -> Row:
        """Make row `number` of a kind, its `source`; `id` names it in predictions."""
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
            pairs = [note_of(notes[n]) for n in self.rng.permutation(len(notes))[:2]]
            pairs = pairs if len(pairs) == 2 else [*pairs, count(notes)]
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
            row, caption = {"query": f"Find the {note.colour} note.", "response": "<ref-object><bbox>"}, note.colour
        else:
            row, caption = {"query": "What is in <bbox>?", "response": "<ref-object>"}, f"{note.colour} {note.value}"
        objects = [{"caption": caption, "bbox": list(note.box), "bbox_type": "real", "image": 0}]
        return {**row, "images": [image], "objects": objects}

    def video(self, name: str) -> Row:
        """Question on a clip: the direction of its note, or the digit on it."""
        frames, note, direction = clip(self.rng, self.scans)
        path = f"videos/{name}.mp4"
        write_clip(frames, self.folder / path)
        if self.rng.random() < 0.5:
            return {"query": "Where does the note move?", "response": direction, "videos": [path]}
        return {"query": "What is on the note?", "response": f"{note.colour} {note.value}", "videos": [path]}

    def question(self, notes: list[Note]) -> QuestionAnswer:
        """Question on a board: half of them on one note, the others on all."""
        draw = self.rng.random()
        if draw < 0.5:
            return note_of(notes[self.rng.integers(len(notes))])
        return read(notes) if draw < 0.8 else count(notes)

    def board(self, name: str, columns: int = 2) -> tuple[str, list[Note]]:
        """Write a board. Returns its path from the folder, and its notes."""
        weights = np.array(self.boards.notes)
        many = 1 + int(self.rng.choice(len(weights), p=weights / weights.sum()))
        image, notes = compose(self.rng, self.scans, many, columns)
        path = f"images/{name}.jpg"
        image.save(self.folder / path, quality=90)
        return path, notes


def note_of(note: Note) -> QuestionAnswer:
    """Question on one note. The answer is colour, then digit: after the colour, the digit takes one step, not two."""
    return f"What is on the {note.colour} note?", f"{note.colour} {note.value}"


def read(notes: list[Note]) -> QuestionAnswer:
    """Question for all notes in reading order."""
    return "Read the notes.", ", ".join(f"{note.colour} {note.value}" for note in notes)


def count(notes: list[Note]) -> QuestionAnswer:
    """Question for the number of notes."""
    return "How many notes are there?", str(len(notes))


def conversation(pairs: list[QuestionAnswer], mark: str = "") -> Row:
    """Fields of a row: the last question and its answer, the others as history; `mark` stands at the very beginning."""
    turns = [[("" if n else mark) + query, response] for n, (query, response) in enumerate(pairs)]
    query, response = turns.pop()
    return {"query": query, "response": response, **({"history": turns} if turns else {})}
