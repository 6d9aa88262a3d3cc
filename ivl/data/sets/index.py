"""Lengths of every row, found in one parallel pass over text and image headers, and kept on disk.

Packing, checking and planning read it. The key under which a file's index is kept holds the file's whole content and
everything that decides lengths, so an index is never older than its file. Sizes and times of pictures and videos are
kept with it: rows of which one changed are looked at again, and those with a problem at each start, since a missing
picture may have come back. What decoding finds is not kept.
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
from ivl.data.media.tiling import plain_pictures
from ivl.data.processor import TooLong
from ivl.data.rows.formats import is_url
from ivl.data.sets import unread_keys as unread
from ivl.data.sets.dataset import Rows
from ivl.data.sets.media_stamps import MediaStamps
from ivl.data.truncation import CHANGES, changes
from ivl.data.worker_loader import WorkerLoader
from ivl.files import whole_file, write_text
from ivl.types import UserError, printable

_FORMAT = 4
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
        ("unread", "<u2"),
    ]
)
"""One row: tokens (text and image together), tiles, supervised labels; changes: what `on_too_long` did to it, as
`ivl.data.truncation.changes` has it; exact: False where media behind URLs were not
looked at; usable: False where the row is left out, all else then 0; plain: pictures and frames of one colour (at most
255), counted where they are decoded; turned: True where EXIF turned boxes; unread: which of `Index.unread` the row
holds"""

MediaCheck = Literal["header", "decode"]


@dataclass
class Index:
    """Lengths of the rows of a `Rows`, in its order."""

    records: np.ndarray
    """(rows,) of RECORD"""
    problems: dict[int, str] = field(default_factory=dict)
    """Row → what is wrong with it, beginning with `file:line`"""
    dropped: dict[int, str] = field(default_factory=dict)
    """Row → why the limits leave it out, as `on_too_long: drop` asks for"""
    unread: list[tuple[str, ...]] = field(default_factory=lambda: [()])
    """Sets of names of keys that are not read, the empty one first"""
    media: MediaStamps = field(default_factory=MediaStamps)
    """Files of the rows' media, of all rows of whole files"""

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
        """How many rows were changed or left out because of max_length, in words; empty: none."""
        made = self.records["changes"][self.records["usable"]]
        counts = {what: int((made >> n & 1).sum()) for n, what in enumerate(CHANGES.values())}
        counts["left out"] = len(self.dropped)
        return ", ".join(f"{what} {count}" for what, count in counts.items() if count)

    def select(self, numbers: np.ndarray) -> Index:
        """The records of these rows, in this order."""
        place = {int(number): at for at, number in enumerate(numbers)} if self.problems or self.dropped else {}
        problems, dropped = (
            {place[n]: t for n, t in kept.items() if n in place} for kept in (self.problems, self.dropped)
        )
        return Index(self.records[numbers], problems, dropped, self.unread)

    def unread_keys(self) -> list[tuple[str, int, int]]:
        """Keys of usable rows that are not read: name, rows that hold it, and the first of them."""
        return unread.counts(self.records["unread"], self.unread)


def joined(indexes: Sequence[Index]) -> Index:
    """The index of several `Rows` one after the other, as a `Mixture` numbers them."""
    if len(indexes) == 1:
        return indexes[0]
    whole = Index(np.concatenate([index.records for index in indexes]))
    first = 0
    for index in indexes:
        whole.problems |= {first + n: text for n, text in index.problems.items()}
        whole.dropped |= {first + n: text for n, text in index.dropped.items()}
        numbers = unread.merged(whole.unread, index.unread)
        whole.records["unread"][first : first + len(index)] = numbers[index.records["unread"]]
        first += len(index)
    whole.media = MediaStamps.joined([index.media for index in indexes], [len(index) for index in indexes])
    return whole


def answers_needed(rows: Rows, index: Index) -> Index:
    """The index for rows to be learnt from or scored: prompts, which it takes for good rows, are problems there."""
    prompts = np.flatnonzero(index.records["usable"] & (index.supervised == 0))
    found = Index(index.records.copy(), dict(index.problems), index.dropped, index.unread)
    found.records[prompts] = np.zeros((), RECORD)
    text = "the row has no answer to learn from; add a response, or move it to data.predict"
    found.problems |= {n: f"{rows.where(n)}: {text}" for n in prompts.tolist()}
    return found


def build_index(
    rows: Rows,
    workers: int | None = None,
    media: MediaCheck = "header",
    probe_urls: bool = False,
    cache_dir: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Index:
    """The index of `rows`, read from the cache where it is there, made where it is not.

    Args:
        workers: processes that make it; None: as many as there are cores.
        media: header: pictures are opened, not decoded; decode: every row is made in full.
        probe_urls: fetch media behind URLs; otherwise they count with the most tiles they can have.
        cache_dir: folder of the cache; None: `~/.cache/ivl`.
        progress: called with the number of rows done.
    """
    settings = fingerprint(rows.processor)
    folder = Path(cache_dir or default_cache()) / "index"
    made, done = [], 0
    for part in rows.per_file():
        digest, root = part.files[0].digest, part.root or part.files[0].path.parent
        parts = [_FORMAT, ivl.__version__, digest, settings, str(Path(root).absolute()), part.as_prompt, part.max_tiles]
        key = _digest(json.dumps([*parts, probe_urls]).encode())
        probe = _Probe(part, media, probe_urls)
        index = _load(folder / key, len(part)) if media == "header" else None
        if index is None:
            shown = None if progress is None else (lambda n, done=done: progress(done + n))
            index = _probed(probe, _spread(np.arange(len(part))), workers, shown)
            if media == "header":  # what decoding finds is not kept
                _save(folder / key, index)
        elif len(again := np.union1d(sorted(index.problems), index.media.changed()).astype(np.int64)):
            _renew(index, again, _probed(probe, _spread(again), workers, None))
            _save(folder / key, index)
        for texts in (index.problems, index.dropped):
            texts.update({n: f"{part.where(n)}: {text}" for n, text in texts.items()})
        made.append(index)
        done += len(part)
    whole = joined(made)
    return (
        whole
        if len(rows) == len(whole) and (rows.numbers == np.arange(len(whole))).all()
        else whole.select(rows.numbers)
    )


def _renew(index: Index, again: np.ndarray, found: Index) -> None:
    """Put what was `found` for the rows `again` into an index."""
    index.records = index.records.copy()
    found.records["unread"] = unread.merged(index.unread, found.unread)[found.records["unread"]]
    index.records[again] = found.records
    index.problems = {int(again[n]): text for n, text in found.problems.items()}
    index.dropped = {n: text for n, text in index.dropped.items() if n not in set(again.tolist())}
    index.dropped |= {int(again[n]): text for n, text in found.dropped.items()}
    found.media.rows = again[found.media.rows]
    index.media = MediaStamps.joined([index.media.without(again), found.media])


def usable(
    rows: Rows,
    index: Index,
    max_bad: float = 0.05,
    report: str | Path | None = None,
    written: bool = False,
) -> tuple[Rows, Index]:
    """The rows that can be made and their index; each row made later must have these lengths.

    Rows that `on_too_long: drop` leaves out are left out. A row with a problem raises where `rows.on_error` is error,
    and is left out where it is skip. `report`: a file that lists what was left out; rows that fail later, when their
    pictures are decoded, are added to it. `written`: it is there already, with the rows of several sources.
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
        more = f"{len(bad)} of {len(rows)} rows cannot be used ({limit}){where}; by reason:"
        raise UserError(first, more, *counts, "the next of them:", *others)
    good = np.flatnonzero(index.records["usable"])
    if not len(good):
        first = next(iter([*index.dropped.values(), *bad.values()]))
        raise UserError(first, f"none of the {len(rows)} rows can be used{where}")
    kept, part = rows.select(good), index.select(good)
    kept.lengths = np.stack([part.tokens, part.tiles], 1)
    kept.lengths[~part.records["exact"]] = -1
    kept.on_skip = None if report is None else Report(Path(report))
    return kept, part


class Report:
    """Adds lines to a report, from any process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, problem: str) -> None:
        with open(self.path, "a", encoding="utf-8") as out:
            out.write(problem.replace("\n", " ") + "\n")


def write_report(path: str | Path, index: Index) -> None:
    """What an index leaves out: counts by reason, then each row with `file:line`."""
    lines = []
    for name, texts in (("problem", index.problems), ("left out by max_length", index.dropped)):
        lines.append(f"# {name}: {len(texts)} of {len(index)} rows")
        lines += [f"# {count:8} {reason}" for reason, count in reasons(texts.values()).most_common()]
        lines += [text.replace("\n", " ") for _, text in sorted(texts.items())]
    write_text(path, "\n".join(lines) + "\n")


def reasons(problems: Iterable[str]) -> Counter[str]:
    """How often each kind of problem occurs: the messages without file, line, names and numbers."""
    return Counter(map(_reason, problems))


def _reason(problem: str) -> str:
    text = re.sub(r"^.*?:\d+: ", "", problem.split("; ")[0])
    text = re.sub(r"(\S*/\S+|'[^']*'|\"[^\"]*\")", "…", text)
    return re.sub(r"\d+(\.\d+)?", "N", text)[:120]


class _Probe(Dataset):
    """Rows' numbers → their records and problems."""

    def __init__(self, rows: Rows, media: MediaCheck, probe_urls: bool) -> None:
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
        index.media = MediaStamps.joined(self._seen)
        index.media.rows = np.searchsorted(numbers, index.media.rows)
        return index

    def _reason(self, number: int, error: UserError) -> str:
        return str(error).removeprefix(f"{self.rows.where(int(number))}: ")  # the file may be kept elsewhere tomorrow

    def _record(self, number: int) -> tuple[Any, ...]:
        """A record, but for the names of keys that are not read, which stand last."""
        rows = self.rows
        conversation = rows.conversation(number)
        turned = conversation.turned_boxes > 0
        self._seen.append(MediaStamps.of(number, conversation.media))  # before they are looked at
        urls = any(isinstance(m.source, str) and is_url(m.source) for m in conversation.media)
        if self.media == "decode" and (self.probe_urls or not urls):
            example = rows.processor(conversation, max_tiles=rows.max_tiles)
            numbers = (len(example.input_ids), len(example.tiles), example.num_supervised)
            plain = min(255, plain_pictures(example.tiles, example.tiles_per_image))
            return *numbers, changes(example.notes), True, True, plain, turned, conversation.unread
        found = rows.processor.lengths(conversation, max_tiles=rows.max_tiles, probe_urls=self.probe_urls)
        return *found, self.probe_urls or not urls, True, 0, turned, conversation.unread


def cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _spread(numbers: np.ndarray) -> list[np.ndarray]:
    return [numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK)]


def _probed(
    probe: _Probe, chunks: list[np.ndarray], workers: int | None, progress: Callable[[int], None] | None
) -> Index:
    workers = min(cores() if workers is None else workers, len(chunks) // 8)  # a process starts slowly
    found, done = [], 0
    draw = torch.Generator()  # a loader draws a seed, which must not come from the run's own generator
    for index in WorkerLoader(probe, batch_size=None, sampler=chunks, num_workers=workers, generator=draw):
        found.append(index)
        done += len(index)
        if progress is not None:
            progress(done)
    return joined(found)


def _save(path: Path, index: Index) -> None:
    """Texts first: records are what says that an index is complete."""
    with optional(path):
        index.media.save(path.with_suffix(".npz"))
        with whole_file(path.with_suffix(".json")) as out:
            texts = {"problems": index.problems, "dropped": index.dropped, "unread": index.unread}
            out.write(json.dumps(texts).encode())
        with whole_file(path.with_suffix(".npy")) as out:
            np.save(out, index.records)


def _load(path: Path, count: int) -> Index | None:
    """An index from the cache, its records mapped from disk; None where it is not there or not whole."""
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
def progress_bar(text: str, rows: Rows) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal for work on rows; to be called with how many are done."""
    with tqdm(total=len(rows), desc=printable(text, " "), unit="row", disable=None, leave=False) as bar:

        def advance(done: int) -> None:
            bar.update(done - bar.n)

        yield advance


def fingerprint(processor: Any) -> str:
    """A digest of all settings that an object holds in its public attributes; the same in every process."""
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
