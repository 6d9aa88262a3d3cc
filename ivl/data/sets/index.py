"""Index: lengths and facts of every row, from a parallel pass over text and headers, cached on disk.

Packing, checking and planning read it. The cache key of a file's index holds the file's content and everything that
decides lengths, so an index is never older than its file. Sizes and times of pictures and videos are stored with it:
rows of which one changed are read anew, and so are rows with a problem at each start, since a missing picture may have
come back. Results of decoding are not cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

import ivl
from ivl.data.cache import default_cache, optional
from ivl.data.media.source import is_url
from ivl.data.media.tiling import plain_pictures
from ivl.data.processor import TooLong
from ivl.data.sets import facts
from ivl.data.sets import unread_keys as unread
from ivl.data.sets.dataset import RowDataset
from ivl.data.sets.media_stamps import MediaStamps
from ivl.data.truncation import CHANGES, changes
from ivl.data.worker_loader import WorkerLoader
from ivl.storage.files import atomic_file, write_text
from ivl.types import UserError, printable

_FORMAT = 6
_CHUNK = 256
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
turned: True where EXIF turned boxes; those of `ivl.data.sets.facts`; unread: number of the row's set of keys in
`Index.unread`"""

MediaCheck = Literal["header", "decode"]


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
        place = {int(number): at for at, number in enumerate(numbers)} if self.problems or self.dropped else {}
        problems, dropped = (
            {place[n]: t for n, t in texts.items() if n in place} for texts in (self.problems, self.dropped)
        )
        return Index(self.records[numbers], problems, dropped, self.unread)

    def unread_keys(self) -> list[tuple[str, int, int]]:
        """Keys of usable rows that are not read: name, rows that hold it, and the first of them."""
        return unread.counts(self.records["unread"], self.unread)


def concat(indexes: Sequence[Index]) -> Index:
    """Concatenate the indexes of several `RowDataset`, numbered as in a `Mixture`."""
    if len(indexes) == 1:
        return indexes[0]
    total = Index(np.concatenate([index.records for index in indexes]))
    first = 0
    for index in indexes:
        total.problems |= {first + n: text for n, text in index.problems.items()}
        total.dropped |= {first + n: text for n, text in index.dropped.items()}
        numbers = unread.merged(total.unread, index.unread)
        total.records["unread"][first : first + len(index)] = numbers[index.records["unread"]]
        first += len(index)
    total.media = MediaStamps.concat([index.media for index in indexes], [len(index) for index in indexes])
    return total


def answers_needed(rows: RowDataset, index: Index) -> Index:
    """Index for training or scoring: rows without an answer (prompts) become problems."""
    prompts = np.flatnonzero(index.records["usable"] & (index.supervised == 0))
    answered = Index(index.records.copy(), dict(index.problems), index.dropped, index.unread)
    answered.records[prompts] = np.zeros((), RECORD)
    text = "the row has no answer to learn from; add a response, or move it to data.predict"
    answered.problems |= {n: f"{rows.where(n)}: {text}" for n in prompts.tolist()}
    return answered


def build_index(
    rows: RowDataset,
    workers: int | None = None,
    media: MediaCheck = "header",
    probe_urls: bool = False,
    cache_dir: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Index:
    """Index of `rows`, read from the cache, or made and cached.

    Args:
        workers: processes that make it; None: as many as there are cores.
        media: header: pictures are opened, not decoded; decode: every Example is made with its pixels.
        probe_urls: fetch media behind URLs; otherwise they count with the most tiles they can have.
        cache_dir: folder of the cache; None: `~/.cache/ivl`.
        progress: called with the number of rows done.
    """
    settings = fingerprint(rows.processor)
    folder = Path(cache_dir or default_cache()) / "index"
    indexes, done = [], 0
    for part in rows.per_file():
        digest, root = part.files[0].digest, part.root or part.files[0].path.parent
        parts = [_FORMAT, ivl.__version__, digest, settings, str(Path(root).absolute()), part.as_prompt, part.max_tiles]
        parts += [sorted(part.columns.items())] if part.columns else []
        key = _digest(json.dumps([*parts, probe_urls]).encode())
        probe = _Probe(part, media, probe_urls)
        index = _load(folder / key, len(part)) if media == "header" else None
        if index is None:
            shown = None if progress is None else (lambda n, done=done: progress(done + n))
            index = _probed(probe, _spread(np.arange(len(part))), workers, shown)
            if media == "header":  # results of decoding are not cached
                _save(folder / key, index)
        elif len(stale := np.union1d(sorted(index.problems), index.media.changed()).astype(np.int64)):
            _renew(index, stale, _probed(probe, _spread(stale), workers, None))
            _save(folder / key, index)
        for texts in (index.problems, index.dropped):
            texts.update({n: f"{part.where(n)}: {text}" for n, text in texts.items()})
        indexes.append(index)
        done += len(part)
    total = concat(indexes)
    return total if np.array_equal(rows.numbers, np.arange(len(total))) else total.select(rows.numbers)


def _renew(index: Index, stale: np.ndarray, fresh: Index) -> None:
    """Replace the entries of the rows `stale` in an index by those of the index `fresh`."""
    index.records = index.records.copy()
    fresh.records["unread"] = unread.merged(index.unread, fresh.unread)[fresh.records["unread"]]
    index.records[stale] = fresh.records
    index.problems = {int(stale[n]): text for n, text in fresh.problems.items()}
    index.dropped = {n: text for n, text in index.dropped.items() if n not in set(stale.tolist())}
    index.dropped |= {int(stale[n]): text for n, text in fresh.dropped.items()}
    fresh.media.rows = stale[fresh.media.rows]
    index.media = MediaStamps.concat([index.media.without(stale), fresh.media])


def drop_unusable(
    rows: RowDataset,
    index: Index,
    max_bad: float = 0.05,
    report: str | Path | None = None,
    written: bool = False,
) -> tuple[RowDataset, Index]:
    """Drop rows that cannot be used. Returns the usable rows and their index; Examples must have these lengths later.

    Rows that `on_too_long: drop` leaves out are dropped. A row with a problem raises where `rows.on_error` is error,
    and is dropped where it is skip. `report`: a file that lists the dropped rows; rows that fail later, when their
    pictures are decoded, are added to it. `written`: the report exists already, with the rows of several sources.
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
    usable_rows, usable_index = rows.select(good), index.select(good)
    usable_rows.lengths = np.stack([usable_index.tokens, usable_index.tiles], 1)
    usable_rows.lengths[~usable_index.records["exact"]] = -1
    usable_rows.on_skip = None if report is None else Report(Path(report))
    return usable_rows, usable_index


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


class _Probe(Dataset):
    """Data set of chunks: numbers of rows → their records and problems."""

    def __init__(self, rows: RowDataset, media: MediaCheck, probe_urls: bool) -> None:
        self.rows, self.media, self.probe_urls = rows, media, probe_urls
        self._seen: list[MediaStamps] = []

    def __getitem__(self, numbers: np.ndarray) -> Index:
        index = Index(np.zeros(len(numbers), RECORD))
        self._seen = []
        for at, number in enumerate(numbers):
            try:
                *record, names = self._record(int(number))
                index.records[at] = (*record, unread.number_of(names, index.unread))
            except TooLong as error:
                index.dropped[at] = self._reason(number, error)
            except UserError as error:
                index.problems[at] = self._reason(number, error)
        index.media = MediaStamps.concat(self._seen)
        index.media.rows = np.searchsorted(numbers, index.media.rows)
        return index

    def _reason(self, number: int, error: UserError) -> str:
        return str(error).removeprefix(f"{self.rows.where(int(number))}: ")  # the file may be moved later

    def _record(self, number: int) -> tuple[Any, ...]:
        """Record of a row, with the names of keys that are not read as its last element."""
        rows = self.rows
        conversation = rows.conversation(number)
        beside = (conversation.turned_boxes > 0, *facts.facts_of(conversation), conversation.unread)
        self._seen.append(MediaStamps.of(number, conversation.media))  # before they are looked at
        urls = any(isinstance(m.source, str) and is_url(m.source) for m in conversation.media)
        if self.media == "decode" and (self.probe_urls or not urls):
            example = rows.processor(conversation, max_tiles=rows.max_tiles)
            numbers = (example.num_tokens, example.num_tiles, example.num_supervised)
            plain = min(255, plain_pictures(example.tiles, example.tiles_per_image))
            return *numbers, changes(example.notes), True, True, plain, *beside
        lengths = rows.processor.lengths(conversation, max_tiles=rows.max_tiles, probe_urls=self.probe_urls)
        return *lengths, self.probe_urls or not urls, True, 0, *beside


def cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _spread(numbers: np.ndarray) -> list[np.ndarray]:
    return [numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK)]


def _probed(
    probe: _Probe, chunks: list[np.ndarray], workers: int | None, progress: Callable[[int], None] | None
) -> Index:
    workers = min(cores() if workers is None else workers, len(chunks) // 8)  # a process starts slowly
    indexes, done = [], 0
    generator = torch.Generator()  # a loader draws a seed, which must not come from the run's own generator
    for index in WorkerLoader(probe, batch_size=None, sampler=chunks, num_workers=workers, generator=generator):
        indexes.append(index)
        done += len(index)
        if progress is not None:
            progress(done)
    return concat(indexes)


def _save(path: Path, index: Index) -> None:
    """Save an index, records last: their file shows that the index is complete."""
    with optional(path):
        index.media.save(path.with_suffix(".npz"))
        with atomic_file(path.with_suffix(".json")) as out:
            texts = {"problems": index.problems, "dropped": index.dropped, "unread": index.unread}
            out.write(json.dumps(texts).encode())
        with atomic_file(path.with_suffix(".npy")) as out:
            np.save(out, index.records)


def _load(path: Path, count: int) -> Index | None:
    """Index from the cache, its records mapped from disk; None where it is missing or damaged."""
    try:
        records = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        texts = json.loads(path.with_suffix(".json").read_bytes())
        media = MediaStamps.load(path.with_suffix(".npz"))
    except (OSError, ValueError, EOFError, KeyError, BadZipFile):
        return None
    if records.dtype != RECORD or len(records) != count:
        return None
    problems, dropped = ({int(n): text for n, text in texts[name].items()} for name in ("problems", "dropped"))
    return Index(records, problems, dropped, [tuple(names) for names in texts["unread"]], media)


@contextlib.contextmanager
def progress_bar(text: str, rows: RowDataset) -> Iterator[Callable[[int], None]]:
    """Progress bar on the terminal for work on rows. Yields a function to call with the number of rows done."""
    with tqdm(total=len(rows), desc=printable(text, " "), unit="row", disable=None, leave=False) as bar:

        def advance(done: int) -> None:
            bar.update(done - bar.n)

        yield advance


def fingerprint(processor: Any) -> str:
    """Digest of all settings that an object holds in its public attributes; the same in every process."""
    return _digest("\n".join(_settings(processor)).encode())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _settings(value: Any) -> Iterable[str]:
    if value is None or isinstance(value, (bool, int, float, str, bytes, Path, type)):
        yield repr(value)
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            yield repr(key)
            yield from _settings(value[key])
    elif isinstance(value, (set, frozenset)):
        yield repr(sorted(value, key=repr))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _settings(item)
    elif hasattr(value, "serialized_model_proto"):  # sentencepiece
        yield _digest(value.serialized_model_proto())
    elif hasattr(value, "to_str"):  # tokenizers
        yield _digest(value.to_str().encode())
    else:
        yield type(value).__qualname__
        yield from _settings({k: v for k, v in vars(value).items() if not k.startswith("_")})
