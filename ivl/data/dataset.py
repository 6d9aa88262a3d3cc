"""Files of rows, read where they lie: a jsonl file is indexed by byte offsets and never held in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivl.data.processor import Processor
from ivl.types import Conversation, Example, UserError


class RowFile:
    """One file of rows. Raises UserError where there is none, or it holds no row."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file; expected rows as jsonl (one JSON object per line) or json")
        self.lines, self.starts, self.ends = self._jsonl() if self.path.suffix != ".json" else ([], [], [])
        self._whole: list[Any] | None = self._json() if self.path.suffix == ".json" else None
        if not len(self):
            raise UserError(f"{self.path}: no rows; expected at least one JSON object")

    def _jsonl(self) -> tuple[Any, Any, Any]:
        lines, starts, ends, position = [], [], [], 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    lines.append(number)
                    starts.append(position)
                    ends.append(position + len(line))
                position += len(line)
        return np.array(lines), np.array(starts), np.array(ends)

    def _json(self) -> list[Any]:
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{self.path}: not valid JSON ({error}); one object per line belongs in a .jsonl"
            ) from error
        if not isinstance(rows, list):
            raise UserError(f"{self.path}: expected a JSON list of rows, found {type(rows).__name__}")
        return rows

    def __len__(self) -> int:
        return len(self.lines) if self._whole is None else len(self._whole)

    def where(self, index: int) -> str:
        """`file:line` of a row (of a json file: `file:` and the number of the row, from 1)."""
        return f"{self.path}:{index + 1 if self._whole is not None else self.lines[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._whole is not None:
            row = self._whole[index]
        else:
            with self.path.open("rb") as file:
                file.seek(int(self.starts[index]))
                text = file.read(int(self.ends[index] - self.starts[index]))
            try:
                row = json.loads(text)
            except ValueError as error:
                raise UserError(
                    f"{self.where(index)}: not valid JSON ({error}); expected one object per line"
                ) from error
        if not isinstance(row, dict):
            raise UserError(f"{self.where(index)}: expected a JSON object, found {type(row).__name__}")
        return row


class Rows:
    """The rows of several files, one after the other, made into examples by a processor."""

    def __init__(self, files: Sequence[str | Path], processor: Processor, root: str | Path | None = None):
        self.files = [RowFile(file) for file in files]
        self.processor = processor
        self.root = root
        self.ends = np.cumsum([len(file) for file in self.files])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def conversation(self, index: int) -> Conversation:
        """Row `index`, understood. Relative media paths start at `root`, else at the folder of the row's file."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        file = self.files[number]
        local = index - (int(self.ends[number - 1]) if number else 0)
        return self.processor.parse(file[local], file.where(local), self.root or file.path.parent)

    def __getitem__(self, index: int) -> Example:
        return self.processor(self.conversation(index))
