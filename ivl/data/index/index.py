"""Index: lengths and facts of every row, and which rows can be used.

Packing, checking and planning read it; `ivl.data.index.index_build` makes it.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ivl.data.index import facts
from ivl.data.index import unread_keys as unread
from ivl.data.index.media_stamps import MediaStamps
from ivl.data.mapped_array import spooled
from ivl.data.sets.dataset import RowDataset
from ivl.data.truncation import CHANGES
from ivl.storage.files import write_text
from ivl.types import UserError, printable

_SHOWN = 10
RECORD = np.dtype(
    [
        ("tokens", "<i4"),
        ("tiles", "<i4"),
        ("supervised", "<i4"),
        ("changes", "u1"),
        ("exact", "?"),
        ("usable", "?"),
        ("plain", "u1"),
        ("turned", "?"),
        *facts.FIELDS,
        ("unread", "<u2"),
    ]
)
"""Record of a row: tokens (text and image together), tiles, supervised labels; changes: bits of `on_too_long`, see
`ivl.data.truncation.changes`; exact: False where media behind URLs were not probed; usable: False where the row is left
out, all other fields then 0; plain: pictures and frames of one colour (at most 255), counted where they are decoded;
turned: True where EXIF turned boxes; those of `ivl.data.index.facts`; unread: number of the row's set of keys in
`Index.unread`"""


@dataclass
class Index:
    """Lengths of the rows of a `RowDataset`, in its order."""

    records: np.ndarray
    """(rows,) of RECORD"""
    problems: dict[int, str] = field(default_factory=dict)
    """Row → its problem, beginning with `file:line`"""
    dropped: dict[int, str] = field(default_factory=dict)
    """Row → reason why `on_too_long: drop` leaves it out"""
    unread: list[tuple[str, ...]] = field(default_factory=lambda: [()])
    """Sets of names of keys that are not read, the empty one first"""
    media: MediaStamps = field(default_factory=MediaStamps)
    """Files of the rows' media, for all rows of the files"""
    digest: str = ""
    """Digest of an index in the cache"""

    def __len__(self) -> int:
        return len(self.records)

    @property
    def tokens(self) -> np.ndarray:
        """(rows,) int32, text and image tokens"""
        return self.records["tokens"]

    @property
    def tiles(self) -> np.ndarray:
        """(rows,) int32"""
        return self.records["tiles"]

    @property
    def supervised(self) -> np.ndarray:
        """(rows,) int32, labels that count for the loss"""
        return self.records["supervised"]

    def describe_changes(self) -> str:
        """Text with the numbers of rows changed or left out because of max_length; empty: none."""
        bits = self.records["changes"][self.records["usable"]]
        counts = {what: int((bits >> n & 1).sum()) for n, what in enumerate(CHANGES.values())}
        counts["left out"] = len(self.dropped)
        return ", ".join(f"{what} {count}" for what, count in counts.items() if count)

    def select(self, numbers: np.ndarray) -> Index:
        """Index of these rows, in this order."""
        if not self.problems and not self.dropped:
            return Index(self.records[numbers], unread=self.unread)
        place = np.full(len(self), -1, np.int64)
        place[numbers] = np.arange(len(numbers))
        problems, dropped = (
            {int(place[n]): t for n, t in texts.items() if place[n] >= 0} for texts in (self.problems, self.dropped)
        )
        return Index(self.records[numbers], problems, dropped, self.unread)

    def share(self, cache: Path | None) -> None:
        """Keep the records of many rows in a file of the cache, which the processes of a machine share."""
        if cache is not None:
            self.records = spooled(self.records, cache)

    def unread_keys(self) -> list[tuple[str, int, int]]:
        """Keys of usable rows that are not read: name, rows that hold it, and the first of them."""
        return unread.counts(self.records["unread"], self.unread)


def concat(indexes: Sequence[Index], most_sets: int = unread.MOST) -> Index:
    """Concatenate the indexes of several `RowDataset`, numbered as in a `Mixture`.

    `most_sets`: number of sets of unread keys from which one stands for all further ones.
    """
    if len(indexes) == 1:
        return indexes[0]
    total = Index(np.concatenate([np.zeros(0, RECORD), *(index.records for index in indexes)]))
    first = 0
    for index in indexes:
        total.problems |= {first + n: text for n, text in index.problems.items()}
        total.dropped |= {first + n: text for n, text in index.dropped.items()}
        numbers = unread.merged(total.unread, index.unread, most_sets)
        total.records["unread"][first : first + len(index)] = numbers[index.records["unread"]]
        first += len(index)
    total.media = MediaStamps.concat([index.media for index in indexes], [len(index) for index in indexes])
    return total


def answers_needed(rows: RowDataset, index: Index) -> Index:
    """Index for training or scoring: rows without an answer (prompts) become problems."""
    prompts = np.flatnonzero(index.records["usable"] & (index.supervised == 0))
    if not len(prompts):
        return index
    answered = Index(np.array(index.records), dict(index.problems), index.dropped, index.unread)
    answered.records[prompts] = np.zeros((), RECORD)
    text = "the row has no answer to learn from; add a response, or move it to data.predict"
    answered.problems |= {n: f"{rows.where(n)}: {text}" for n in prompts.tolist()}
    return answered


def drop_unusable(
    rows: RowDataset,
    index: Index,
    max_bad: float = 0.05,
    report: str | Path | None = None,
    written: bool = False,
    cache: Path | None = None,
) -> tuple[RowDataset, Index]:
    """Drop rows that cannot be used. Returns the usable rows and their index; Examples must have these lengths later.

    Rows that `on_too_long: drop` leaves out are dropped. A row with a problem raises where `rows.on_error` is error,
    and is dropped where it is skip. `report`: a file that lists the dropped rows; rows that fail later, when their
    pictures are decoded, are added to it. `written`: the report exists already, with the rows of several sources.
    `cache`: folder for arrays of many rows, which the processes of a machine then share.
    Raises UserError where more than a share `max_bad` of rows has problems, or no row is left.
    """
    bad = index.problems
    if report is not None and not written:
        write_report(report, index)
    where = f"; all are listed in {report}" if report is not None else ""
    if bad and (rows.on_error == "error" or len(bad) > max_bad * len(rows)):
        first, *others = [text for _, text in sorted(bad.items())[:_SHOWN]]
        if len(bad) == 1:
            raise UserError(first + where)
        limit = "on_error is error" if rows.on_error == "error" else f"more than max_bad = {max_bad:.1%}"
        counts = [f"{count:8} {reason}" for reason, count in reasons(bad.values()).most_common(_SHOWN)]
        summary = f"{len(bad)} of {len(rows)} rows cannot be used ({limit}){where}; by reason:"
        raise UserError(first, summary, *counts, "the next of them:", *others)
    good = np.flatnonzero(index.records["usable"])
    if not len(good):
        first = next(iter([*index.dropped.values(), *bad.values()]))
        raise UserError(first, f"none of the {len(rows)} rows can be used{where}")
    if len(good) == len(rows):
        usable_rows, usable_index = rows.select(None), replace(index, media=MediaStamps())
    else:
        good = good if cache is None else spooled(good, cache)
        usable_rows, usable_index = rows.select(good), index.select(good)
        usable_index.share(cache)
    usable_rows.lengths = _lengths(usable_index.records)
    usable_rows.on_skip = None if report is None else Report(Path(report))
    return usable_rows, usable_index


def _lengths(records: np.ndarray) -> np.ndarray:
    """(rows, 2) int32 tokens and tiles, without a copy; -1 where they are not known."""
    pair = np.lib.stride_tricks.as_strided(
        records["tokens"], (len(records), 2), (records.strides[0], 4), subok=True, writeable=False
    )
    if records["exact"].all():
        return pair
    lengths = np.array(pair)
    lengths[~records["exact"]] = -1
    return lengths


class Report:
    """Add lines to a report, from any process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, problem: str) -> None:
        with open(self.path, "a", encoding="utf-8") as out:
            out.write(problem.replace("\n", " ") + "\n")


def write_report(path: str | Path, index: Index) -> None:
    """Write the rows that an index leaves out: counts by reason, then each row with `file:line`."""
    lines = []
    for name, texts in (("problem", index.problems), ("left out by max_length", index.dropped)):
        lines.append(f"# {name}: {len(texts)} of {len(index)} rows")
        lines += [f"# {count:8} {reason}" for reason, count in reasons(texts.values()).most_common()]
        lines += [text.replace("\n", " ") for _, text in sorted(texts.items())]
    write_text(path, "\n".join(lines) + "\n")


def reasons(problems: Iterable[str]) -> Counter[str]:
    """Count problems by reason: messages without file, line, names and numbers."""
    return Counter(map(_reason, problems))


def _reason(problem: str) -> str:
    text = re.sub(r"^.*?:\d+: ", "", problem.split("; ")[0])
    text = re.sub(r"(\S*/\S+|'[^']*'|\"[^\"]*\")", "…", text)
    return re.sub(r"\d+(\.\d+)?", "N", text)[:120]


@contextlib.contextmanager
def progress_bar(text: str, rows: RowDataset) -> Iterator[Callable[[int], None]]:
    """Progress bar on the terminal for work on rows. Yields a function to call with the number of rows done."""
    with tqdm(total=len(rows), desc=printable(text, " "), unit="row", disable=None, leave=False) as bar:

        def advance(done: int) -> None:
            bar.update(done - bar.n)

        yield advance
