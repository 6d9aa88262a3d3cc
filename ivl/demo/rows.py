"""The four kinds of rows of the demo, each in the ms-swift format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ivl.demo.scenes import Note, Scans, clip, compose, write_clip

WIDE = 0.1
"""Share of the boards of twice the width, which are cut into tiles"""

Asked = tuple[str, str]
"""Question and answer"""


class Maker:
    """Makes rows of one half of the data and writes their media below `folder`, named by the row's id."""

    def __init__(self, folder: Path, split: str, seed: int) -> None:
        self.folder, self.split, self.rng = folder, split, np.random.default_rng(seed)
        self.scans = Scans(held_out=split != "train")
        self.kinds = {"single": self.single, "turns": self.turns, "grounding": self.grounding, "video": self.video}

    def row(self, kind: str, number: int) -> dict[str, Any]:
        """Row `number` of a kind, its `source`; `id` names it in predictions."""
        name = f"{self.split}-{kind}-{number:05d}"
        return {"id": name, "source": kind, **self.kinds[kind](name)}

    def single(self, name: str) -> dict[str, Any]:
        """One question on one image."""
        image, notes = self.board(name, columns=4 if self.rng.random() < WIDE else 2)
        query, response = self.question(notes)
        return {"query": query, "response": response, "images": [image]}

    def turns(self, name: str) -> dict[str, Any]:
        """Questions that follow one another, on one image or on two that come one after the other."""
        if self.rng.random() < 0.7:
            image, notes = self.board(name)
            asked = [read(notes), *(self.question(notes, reading=0) for _ in range(2))]
            return {**conversation(asked, "<image>"), "images": [image]}
        (first, a), (second, b) = self.board(f"{name}a", most=2), self.board(f"{name}b", most=2)
        asked = [read(a), ("<image>" + read(b)[0], read(b)[1]), self.question(b, reading=0)]
        return {**conversation(asked, "<image>"), "images": [first, second]}

    def grounding(self, name: str) -> dict[str, Any]:
        """From a name to its box, or from a box to what is in it; in training, in several turns."""
        image, notes = self.board(name)
        asked, objects = [], []
        for _ in range(int(self.rng.integers(1, 3)) if self.split == "train" else 1):
            note = notes[self.rng.integers(len(notes))]
            find = self.rng.random() < 0.6
            asked.append(("Find <ref-object>", "<bbox>") if find else ("What is in <bbox>?", "<ref-object>"))
            caption = f"the {note.colour} note" if find else f"{note.colour} {note.value}"
            objects.append({"caption": caption, "bbox": list(note.box), "bbox_type": "real", "image": 0})
        return {**conversation(asked, "<image>"), "images": [image], "objects": objects}

    def video(self, name: str) -> dict[str, Any]:
        """Where a note of a clip moves to, and what is on it."""
        frames, note, direction = clip(self.rng, self.scans)
        path = f"videos/{name}.mp4"
        write_clip(frames, self.folder / path)
        asked = [
            ("In which direction does the note move?", direction),
            ("Which digit is on the note?", str(note.value)),
        ]
        self.rng.shuffle(asked)
        return {**conversation(asked, "<video>"), "videos": [path]}

    def board(self, name: str, columns: int = 2, most: int = 4) -> tuple[str, list[Note]]:
        """Writes a board; its path from the folder, and its notes."""
        image, notes = compose(self.rng, self.scans, int(self.rng.integers(1, most + 1)), columns)
        path = f"images/{name}.jpg"
        image.save(self.folder / path, quality=90)
        return path, notes

    def question(self, notes: list[Note], reading: float | None = None) -> Asked:
        """A question that the board answers, and its answer; `reading`: share of those that ask for all notes.

        Training asks for all notes most often: it is from reading aloud that the model learns to look.
        """
        share = (0.6 if self.split == "train" else 1 / 3) if reading is None else reading
        if self.rng.random() < share:
            return read(notes)
        if self.rng.random() < 0.5:
            return "How many notes are there?", str(len(notes))
        note = notes[self.rng.integers(len(notes))]
        return f"Which digit is on the {note.colour} note?", str(note.value)


def read(notes: list[Note]) -> Asked:
    """All notes in reading order."""
    return "Read the notes.", ", ".join(f"{note.colour} {note.value}" for note in notes)


def conversation(asked: list[Asked], mark: str) -> dict[str, Any]:
    """The last question and its answer, the others as history; the mark stands at the very beginning."""
    turns = [[("" if n else mark) + query, response] for n, (query, response) in enumerate(asked)]
    query, response = turns.pop()
    return {"query": query, "response": response, **({"history": turns} if turns else {})}
