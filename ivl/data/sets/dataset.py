"""Data sets: rows of files → Examples; mixtures of sources, and held-out rows.

The key of a row is its number over all files of a `RowDataset`, or over all parts of a `Mixture`. With the key
`(epoch, number)` random choices inside a row differ from epoch to epoch, in any process alike.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from ivl.data.processor import Processor
from ivl.data.row_files.open_file import open_file
from ivl.data.row_files.row_digests import file_digests
from ivl.data.row_files.row_file import RowFile
from ivl.data.row_files.table_file import TableFile, with_lists
from ivl.options import FileLimits
from ivl.types import Conversation, Example, UserError

Key = int | tuple[int, int]
"""A row's number, or (epoch, number)"""


class RowDataset(Dataset[Example]):
    """Data set of the rows of one or more files. Picklable for loader workers."""

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        processor: Processor,
        root: str | Path | None = None,
        as_prompt: bool = False,
        on_error: Literal["error", "skip"] = "error",
        source: str = "",
        max_tiles: int | None = None,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        limits: FileLimits | None = None,
        columns: dict[str, str] | None = None,
        loss_weight: float = 1.0,
    ) -> None:
        """
        Args:
            paths: files of rows: jsonl or a JSON list (`RowFile`), or parquet, csv, tsv (`TableFile`).
            root: folder that relative media paths start from; None: the folder of the file of rows.
            as_prompt: leave out the last answer, for generation.
            on_error: error: a bad row raises UserError; skip: `__getitems__`, which a DataLoader calls with the
                rows of a batch, leaves it out and calls `on_skip`. Rows known to be bad are left out before batches
                are made, by `ivl.data.index.index`.
            source: name of this data set in scores and losses per source; a row's key `source` goes before it.
            max_tiles: most tiles of an image of these rows; None: the processor's limit.
            seed: seed of random choices inside rows, together with epoch and number.
            cache_dir, limits: see `RowFile` and `TableFile`.
            columns: key of our formats → key that the files have instead, such as query → question.
            loss_weight: weight of these rows in the loss, times that of each row.
        """
        paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        if not paths:
            raise UserError("rows: no files; expected one or more (jsonl or json)")
        self.files = [open_file(path, cache_dir, limits) for path in paths]
        self.columns = columns or {}
        for table in self.files:
            if isinstance(table, TableFile):
                _check_columns(table, self.columns)
        self.processor = processor
        self.root, self.as_prompt, self.source = root, as_prompt, source
        self.on_error, self.max_tiles, self.seed = on_error, max_tiles, seed
        self.loss_weight = loss_weight
        if not 0 < loss_weight < 1e6:
            raise UserError(
                f"{source or paths[0]}: loss_weight: expected above 0, found {loss_weight}; leave the source out to "
                "learn nothing from it"
            )
        self.on_skip: Callable[[str], None] | None = None
        self.lengths: np.ndarray | None = None
        """(rows, 2) tokens and tiles that each Example must have by the index; -1: any; None: no index"""
        self.references: np.ndarray | None = None
        """(rows, 2) negative log-likelihoods of a pair's answers by the reference; NaN: unknown; None: none stored"""
        self._first = np.cumsum([0] + [len(file) for file in self.files])
        self._selection: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self._first[-1]) if self._selection is None else len(self._selection)

    def select(self, numbers: np.ndarray | None) -> RowDataset:
        """Rows of these numbers, in this order; None: the same rows."""
        part = object.__new__(type(self))
        part.__dict__ = dict(self.__dict__)
        if numbers is None:
            return part
        part._selection = numbers if self._selection is None else self._selection[numbers]
        part.lengths = None if self.lengths is None else self.lengths[numbers]
        part.references = None if self.references is None else self.references[numbers]
        return part

    def per_file(self) -> list[RowDataset]:
        """Rows of each file, all of them, selected or not."""
        parts = []
        for file in self.files:
            part = self.select(np.arange(0))
            part.files, part._selection, part.lengths, part.references = [file], None, None, None
            part._first = np.array([0, len(file)])
            parts.append(part)
        return parts

    @property
    def complete(self) -> bool:
        """True where these are all rows of the files, in their order."""
        every = int(self._first[-1])
        return self._selection is None or (
            len(self._selection) == every and np.array_equal(self._selection, np.arange(every))
        )

    @property
    def numbers(self) -> np.ndarray:
        """(rows,) number of each row over all rows of the files."""
        return np.arange(int(self._first[-1])) if self._selection is None else self._selection

    def _number(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return int(i if self._selection is None else self._selection[i])

    def _at(self, i: int) -> tuple[RowFile | TableFile, int]:
        number = self._number(i)
        file = int(np.searchsorted(self._first, number, side="right")) - 1
        return self.files[file], number - int(self._first[file])

    def where(self, i: int) -> str:
        """`file:line` of a row."""
        file, at = self._at(i)
        return file.where(at)

    def raw(self, i: int) -> bytes:
        """Bytes of a row in its file."""
        file, at = self._at(i)
        return file.raw(at)

    def row(self, i: int) -> Any:
        """Row as parsed JSON, its keys renamed by `columns`. Raises UserError with `file:line`."""
        file, at = self._at(i)
        row = _renamed(file[at], self.columns, file.where(at))
        return with_lists(row) if isinstance(file, TableFile) else row

    def conversation(self, i: int) -> Conversation:
        """Row as a Conversation. Raises UserError with `file:line`."""
        file, at = self._at(i)
        root = file.folder if self.root is None else self.root
        conversation = self.processor.parse(self.row(i), file.where(at), root)
        if self.source and not conversation.source:
            conversation = replace(conversation, source=self.source)
        if conversation.prefix and not self.as_prompt:
            raise UserError(
                f"{conversation.where}: prefix: true marks the beginning of an answer that is asked for, no answer to "
                "learn from; write the whole answer and remove the key, or move the row to data.predict"
            )
        return conversation.as_prompt() if self.as_prompt else conversation

    def __getitem__(self, key: Key) -> Example:
        """Example of a row. Raises UserError with `file:line`, also where its lengths are not those of the index."""
        epoch, i = key if isinstance(key, tuple) else (0, key)
        generator = torch.Generator().manual_seed(_seed(self.seed, epoch, self._number(i)))
        conversation = self.conversation(i)
        if self.loss_weight != 1:
            conversation = replace(conversation, weight=conversation.weight * self.loss_weight)
        example = self.processor(conversation, max_tiles=self.max_tiles, generator=generator)
        if self.lengths is not None:
            tokens, tiles = (int(n) for n in self.lengths[i])
            if tokens >= 0 and (tokens, tiles) != (example.num_tokens, example.num_tiles):
                raise UserError(
                    f"{self.where(i)}: {example.num_tokens} tokens and {example.num_tiles} tiles, but its index "
                    f"says {tokens} and {tiles}; a picture changed since then; start again"
                )
        example.reference = self.reference(i)
        return example

    def reference(self, i: int) -> tuple[float, float] | None:
        """Numbers of a pair by the reference, None where none are stored. Raises UserError for a pair without them."""
        if self.references is None:
            return None
        chosen, rejected = (float(number) for number in self.references[i])
        if not math.isfinite(chosen + rejected):
            raise UserError(
                f"{self.where(i)}: the reference has no finite log-probabilities for this pair, or the row could not "
                "be read when they were made; leave it out, or start again"
            )
        return chosen, rejected

    def __getitems__(self, keys: Sequence[Key]) -> list[Example]:
        """Examples of a batch; where `on_error` is skip, rows with an error are left out."""
        return _gather(self, keys)


def _check_columns(table: TableFile, columns: dict[str, str]) -> None:
    for key, name in columns.items():
        if name not in table.columns and key not in table.columns:
            raise UserError(f"{table.name}: columns: no column {name!r}; it has {', '.join(table.columns)}")


def _renamed(row: Any, columns: dict[str, str], where: str) -> Any:
    """Row with each key that `columns` names under our name. Raises UserError for a row that has none of them."""
    if not columns or not isinstance(row, dict):
        return row
    there = {key: row[name] for key, name in columns.items() if name in row}
    if not there:
        if row.keys() & columns.keys():
            return row  # of a file that has our names already
        raise UserError(
            f"{where}: columns: expected {', '.join(columns.values())}; the row has {', '.join(map(str, row))}"
        )
    rest = {key: value for key, value in row.items() if key not in columns.values()}
    if taken := sorted(rest.keys() & there.keys()):
        raise UserError(f"{where}: columns: the row has a key {taken[0]!r} of its own beside {columns[taken[0]]!r}")
    return rest | there


def _gather(dataset: RowDataset | Mixture, keys: Sequence[Key]) -> list[Example]:
    examples, reasons = [], []
    for key in keys:
        rows, inner = (dataset, key) if isinstance(dataset, RowDataset) else dataset.at(key)
        try:
            examples.append(rows[inner])
        except UserError as error:
            if rows.on_error == "error":
                raise
            reasons.append(str(error))
            if rows.on_skip is not None:
                rows.on_skip(str(error))
    if not examples:
        raise UserError(f"{reasons[0]} (no row of this batch of {len(keys)} could be made)")
    return examples


def _seed(*numbers: int | str) -> int:
    """Seed below 2**63 from numbers, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def permutation(count: int, *seed: int | str) -> np.ndarray:
    """Random order of `count` rows, (count,) int64; the same on every machine for the same seed."""
    return np.random.Generator(np.random.PCG64(_seed(*seed))).permutation(count)


def digests(rows: RowDataset, seed: int = 0) -> np.ndarray:
    """Digest of each row's text, (rows,) uint64."""
    return np.concatenate([file_digests(file, seed) for file in rows.files])[rows.numbers]


def split(rows: RowDataset, fraction: float, seed: int = 0) -> tuple[RowDataset, RowDataset]:
    """Split into (training rows, held-out rows): `fraction` of the rows, at least one, is held out.

    The choice depends on the rows' text and `seed`, not on their order or on other rows of the file. Rows of equal text
    stay together, except where that would hold out more than `fraction`.
    """
    if not 0 < fraction < 1:
        raise UserError(f"val_fraction: expected a share between 0 and 1, found {fraction}")
    if len(rows) < 2:
        raise UserError(f"val_fraction: {len(rows)} row cannot be split; give a file of held-out rows")
    ranks = digests(rows, seed)
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    held = np.zeros(len(rows), bool)
    held[np.argsort(ranks, kind="stable")[:count]] = True
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture. Give `repeat` or `ratio` to all parts of a mixture, or neither."""

    rows: RowDataset
    name: str = ""
    repeat: float | None = None
    """Times that each row is seen in an epoch: 2 is twice, 0.1 a tenth of the rows, another tenth each epoch"""
    ratio: float | None = None
    """Share of the epoch's rows, relative to the other parts'; the epoch has as many rows as all parts together"""


class Mixture(Dataset[Example]):
    """Mixture of several sources, each with its exact share of every epoch. Row numbers run over the parts in order.

    A part's rows are drawn from an endless series of their shuffles. Each epoch goes on where the last ended, so no row
    comes a third time before every row came twice.
    """

    def __init__(
        self, parts: Sequence[MixtureSource | RowDataset], seed: int = 0, epoch_rows: int | None = None
    ) -> None:
        """`epoch_rows`: rows of an epoch where parts have ratios."""
        self.parts = [part if isinstance(part, MixtureSource) else MixtureSource(part) for part in parts]
        if not self.parts:
            raise UserError("mixture: no sources; expected at least one")
        self.seed = seed
        self.first = np.cumsum([0] + [len(part.rows) for part in self.parts])
        self.counts = self._counts(epoch_rows)

    def __len__(self) -> int:
        """Number of different rows; an epoch has `sum(counts)`."""
        return int(self.first[-1])

    def at(self, key: Key) -> tuple[RowDataset, Any]:
        """Rows of the part that a row belongs to, and its key there."""
        epoch, i = key if isinstance(key, tuple) else (None, key)
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        part = int(np.searchsorted(self.first, i, side="right")) - 1
        inner = int(i - self.first[part])
        return self.parts[part].rows, inner if epoch is None else (epoch, inner)

    def where(self, i: int) -> str:
        """`file:line` of a row."""
        rows, inner = self.at(i)
        return rows.where(inner)

    def __getitem__(self, key: Key) -> Example:
        rows, inner = self.at(key)
        return rows[inner]

    def __getitems__(self, keys: Sequence[Key]) -> list[Example]:
        return _gather(self, keys)

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers of an epoch, shuffled, (sum of counts,) int64; the same for the same seed on every machine."""
        drawn = [self._draw(n, epoch) for n in range(len(self.parts))]
        numbers = np.concatenate(drawn)
        return numbers[permutation(len(numbers), self.seed, "order", epoch)]

    @property
    def same_rows(self) -> bool:
        """True where each epoch has the same rows, in another order."""
        return all(count % len(part.rows) == 0 for part, count in zip(self.parts, self.counts))

    def _draw(self, part: int, epoch: int) -> np.ndarray:
        rows, count = len(self.parts[part].rows), self.counts[part]
        start, end = epoch * count, (epoch + 1) * count
        passes = range(start // rows, -(-end // rows))
        stream = [permutation(rows, self.seed, "pass", part, n) for n in passes]
        skipped = start - passes.start * rows if len(passes) else 0
        return np.concatenate([np.empty(0, np.int64), *stream])[skipped : skipped + count] + self.first[part]

    def _counts(self, epoch_rows: int | None) -> list[int]:
        sizes = [len(part.rows) for part in self.parts]
        for part in self.parts:
            values = [v for v in (part.repeat, part.ratio) if v is not None]
            if len(values) > 1 or any(not 0 < v < 1e6 for v in values):
                raise UserError(f"mixture: {part.name or 'source'}: expected repeat or ratio above 0, found {values}")
        ratios = [float(part.ratio) for part in self.parts if part.ratio is not None]
        if not ratios:
            counts = [round(n * (1.0 if p.repeat is None else p.repeat)) for n, p in zip(sizes, self.parts)]
        elif len(ratios) < len(self.parts):
            raise UserError("mixture: some sources have a ratio and some have none; give it to all, or repeat instead")
        else:
            counts = _apportioned(epoch_rows or sum(sizes), ratios)
        for part, count in zip(self.parts, counts):
            if not count:
                raise UserError(f"mixture: {part.name or 'source'}: its share is less than one row of an epoch")
        return counts

    def describe(self) -> str:
        """Table of rows, repeats and effective share of each part."""
        total = sum(self.counts)
        weighed = any(part.rows.loss_weight != 1 for part in self.parts)
        columns = ["source", "rows", "rows an epoch", "times", "share", *["weight in the loss"] * weighed]
        lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        for n, (part, count) in enumerate(zip(self.parts, self.counts)):
            name, rows = part.name or part.rows.source or f"source {n}", len(part.rows)
            weight = f" {part.rows.loss_weight:g} |" * weighed
            lines.append(f"| {name} | {rows} | {count} | {count / rows:.3g} | {count / total:.1%} |{weight}")
        return "\n".join(lines)


def _apportioned(total: int, weights: list[float]) -> list[int]:
    """Whole numbers that sum to `total`, in the proportions of `weights`: the largest remainders are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    largest = sorted(range(len(exact)), key=lambda n: counts[n] - exact[n])
    for n in largest[: total - sum(counts)]:
        counts[n] += 1
    return counts
