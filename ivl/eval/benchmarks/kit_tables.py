"""Tables of VLMEvalKit → plain records, for the benchmarks that OpenGVLab scores with it.

Each file is a table of tab-separated cells, `LMUData/NAME.tsv` of the data folder as VLMEvalKit downloads it; pictures
are cells. Records as in `ivl.eval.benchmarks.convert`.
"""

from __future__ import annotations

import ast
import base64
import binascii
from collections.abc import Callable, Iterator
from pathlib import Path

from ivl.eval.benchmarks.convert import LETTERS, Record, _table, _uri
from ivl.types import UserError

_REFERENCE_LENGTH = 64
"""Longest image cell that is the index of another row; a longer one is a picture."""


def _strings(cell: str) -> list[str]:
    """Return the strings of a cell: a Python list of them, or the cell itself."""
    if not (len(cell) > 1 and cell[0] == "[" and cell[-1] == "]"):
        return [cell]
    return [str(value) for value in ast.literal_eval(cell)]


def _pictures(cell: str, where: str) -> list[str]:
    try:
        return [_uri(base64.b64decode(text, validate=True)) for text in _strings(cell)]
    except (ValueError, SyntaxError, binascii.Error) as error:
        raise UserError(f"{where}: its image cell cannot be read ({error}); is the download complete?") from error


def _rows(path: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Yield each row that has a picture, and its pictures; a short image cell names the row that holds them."""
    table = [row for row in _table(path) if "image" in row]
    cells = {row["index"]: row["image"] for row in table}
    for row in table:
        where, cell = f"{path}: row with index {row['index']}", row["image"]
        if len(cell) <= _REFERENCE_LENGTH:
            cell = cells.get(cell, "")
            if len(cell) <= _REFERENCE_LENGTH:
                raise UserError(f"{where}: its image is that of index {row['image']}, which has none")
        yield row, _pictures(cell, where)


def _record(row: dict[str, str], pictures: list[str]) -> Record:
    return {
        "id": row["index"],
        "question": row["question"],
        "images": pictures,
        "response": row.get("answer"),
        "category": row.get("category", ""),
    }


def choices(name: str) -> Callable[[Path], Iterator[Record]]:
    """Return the reader of a multiple-choice table."""

    def read(root: Path) -> Iterator[Record]:
        for row, pictures in _rows(root / f"LMUData/{name}.tsv"):
            options = {letter: row[letter] for letter in LETTERS if letter in row}
            yield _record(row, pictures) | {"hint": row.get("hint"), "options": options}

    return read


def hallusionbench(root: Path) -> Iterator[Record]:
    """Read HallusionBench's questions with a picture; `group` is l2-category/set/figure/question."""
    path = root / "LMUData/HallusionBench.tsv"
    for row, pictures in _rows(path):
        parts = row["index"].split("_")
        if len(parts) < 6:
            raise UserError(f"{path}: index {row['index']}: expected six parts or more, joined by _")
        yield _record(row, pictures) | {"group": "/".join([row.get("l2-category", ""), *parts[3:6]])}


def mathvista(root: Path) -> Iterator[Record]:
    """Read MathVista testmini; the question holds the choices already."""
    for row, pictures in _rows(root / "LMUData/MathVista_MINI.tsv"):
        record = _record(row, pictures) | {"category": row.get("task", "")}
        if row["question_type"] == "multi_choice":
            record["response"] = row["answer_option"]
            record["options"] = dict(zip(LETTERS, _strings(row["choices"])))
        yield record
