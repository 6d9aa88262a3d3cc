"""Building of an index: a pass over text and headers, shared by processes and machines, cached on disk.

The cache key of a file's index holds the file's content and everything that decides lengths, so an index is never older
than its file. Sizes and times of pictures and videos are stored with it: rows of which one changed are read anew, and
so are rows with a problem at each start, since a missing picture may have come back. Results of decoding are not
cached.

Rows are measured in blocks. Each process of a run measures its share of them and writes each as a file; the first
process joins them in the order of the rows, so the index is the same for any number of processes. Machines that share
no folder send one another what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

import ivl
from ivl.data.cache import default_cache
from ivl.data.index import facts, index_file
from ivl.data.index import unread_keys as unread
from ivl.data.index.index import RECORD, Index, concat
from ivl.data.index.index_file import IndexBlocks
from ivl.data.index.media_stamps import MediaStamps, Stamp, seen_files
from ivl.data.media.source import is_url
from ivl.data.media.tiling import plain_pictures
from ivl.data.object_store import absolute
from ivl.data.process_group import ProcessGroup, folder_name
from ivl.data.processor import TooLong
from ivl.data.sets.dataset import RowDataset
from ivl.data.truncation import changes
from ivl.data.worker_loader import WorkerLoader
from ivl.data.workers import cores
from ivl.types import UserError

_FORMAT = 8
_CHUNK = 256
_BLOCK = 64 * _CHUNK
"""Rows of a block: the share of work that a process takes, and that a build that was ended does not repeat"""
_ALL_SETS = 1 << 16
"""Sets of unread keys within a block: all of them, so that their limit is that of the whole index"""

MediaCheck = Literal["header", "decode"]
Progress = Callable[[int], None]


def build_index(
    rows: RowDataset,
    workers: int | None = None,
    media: MediaCheck = "header",
    probe_urls: bool = False,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> Index:
    """Index of `rows`, read from the cache, or made and cached.

    Args:
        workers: processes that make it; None: as many as there are cores, divided among the group's processes.
        media: header: pictures are opened, not decoded; decode: every Example is made with its pixels.
        probe_urls: fetch media behind URLs; otherwise they count with the most tiles they can have.
        cache_dir: folder of the cache; None: `~/.cache/ivl`.
        progress: called with the number of rows done.
        group: processes that share the work, each of which calls this with the same rows; None: this one alone.
    """
    group = group or ProcessGroup()
    workers = max(1, cores() // group.local_size) if workers is None else workers
    settings = fingerprint(rows.processor)
    folder = Path(cache_dir or default_cache()) / "index"
    files = [_File(part, folder / _key(part, settings, probe_urls), media, probe_urls) for part in rows.per_file()]
    if media == "header":
        total_rows = sum(len(file.part) for file in files)
        shown = None if progress is None else (lambda n: progress(min(n, total_rows)))
        _Builder(group, folder, workers).fill(files, shown)
    else:
        done = 0
        for file in files:
            shown = None if progress is None else (lambda n, done=done: progress(done + n))
            file.index = concat([*_measured(file.probe, _chunks(np.arange(len(file.part))), workers, shown)])
            done += len(file.part)
    for file in files:
        for texts in (file.index.problems, file.index.dropped):
            texts.update({n: f"{file.part.where(n)}: {text}" for n, text in texts.items()})
    total = concat([file.index for file in files])
    return total if rows.complete else total.select(rows.numbers)


def _key(part: RowDataset, settings: str, probe_urls: bool) -> str:
    digest, root = part.files[0].digest, part.root or part.files[0].folder
    parts = [_FORMAT, ivl.__version__, digest, settings, absolute(root), part.as_prompt, part.max_tiles]
    parts += [sorted(part.columns.items())] if part.columns else []
    return _digest(json.dumps([*parts, probe_urls]).encode())


class _File:
    """File of rows whose index is built or read."""

    index: Index

    def __init__(self, part: RowDataset, path: Path, media: MediaCheck, probe_urls: bool) -> None:
        self.part, self.path = part, path
        self.probe = _Probe(part, media, probe_urls)
        self.blocks = IndexBlocks(path, len(part), _BLOCK, on_disk=len(part) > _BLOCK)
        self.found: Index | None = None

    def load(self) -> str | None:
        """Load the index from the cache. Returns its digest; None where there is none."""
        self.found = index_file.load(self.path, len(self.part))
        return None if self.found is None else self.found.digest


@dataclass
class _Builder:
    """Building of the indexes of several files by the processes of a group."""

    group: ProcessGroup
    folder: Path
    workers: int

    def __post_init__(self) -> None:
        names = self.group.gather(folder_name(self.folder))
        self.writes = names.index(names[self.group.rank]) == self.group.rank
        """True in one process of each machine and folder"""

    def fill(self, files: list[_File], progress: Progress | None) -> None:
        """Set the index of each file."""
        digests = self.group.gather([file.load() for file in files])
        held = [[rank[n] for rank in digests] for n in range(len(files))]
        missing = [file for file, ranks in zip(files, held) if not any(ranks)]
        resumed = self._measure(missing, progress)
        for file, ranks in zip(files, held):
            if file in missing:
                file.found = self._joined(file)
                ranks = self.group.gather(None if file.found is None else file.found.digest)
            self._agree(file, ranks)
            if file not in missing or resumed:
                self._renew(file)

    def _measure(self, files: list[_File], progress: Progress | None) -> bool:
        """Measure this process's share of blocks. Returns True if some process found blocks of an earlier build."""
        todo = [(file, block) for file in files for block in range(len(file.blocks))]
        resumed, done, error = False, 0, None
        try:
            for file in files:
                mine = [b for at, (of, b) in enumerate(todo) if of is file and at % self.group.size == self.group.rank]
                new = [block for block in mine if file.blocks.read(block) is None]
                resumed = resumed or len(new) < len(mine)
                numbers = [file.blocks.numbers(block) for block in new]
                shown = None if progress is None else (lambda n, done=done: progress((done + n) * self.group.size))
                for block, index in zip(new, _by_block(file.probe, numbers, self.workers, shown)):
                    file.blocks.write(block, index_file.to_bytes(index))
                done += sum(map(len, numbers))
        except UserError as failed:
            error = failed
        self.group.share(error)
        return any(self.group.gather(resumed))

    def _joined(self, file: _File) -> Index | None:
        """Join the blocks of a file in the first process, and save the index. Returns None in the others."""
        first = self.group.rank == 0
        have = self.group.gather([file.blocks.exists(block) for block in range(len(file.blocks))])
        for block in [block for block, here in enumerate(have[0]) if not here]:
            source = next((rank for rank in range(self.group.size) if have[rank][block]), None)
            if source is not None:
                data = self.group.send(file.blocks.read(block) or b"" if self.group.rank == source else None, source)
                if first:
                    file.blocks.write(block, data)
        if not first:
            return None
        index = concat([self._block(file, block) for block in range(len(file.blocks))])
        index_file.save(file.path, index)
        return index_file.load(file.path, len(file.part)) or index

    def _block(self, file: _File, block: int) -> Index:
        """A measured block; measured here where another run, which saved the same index, has removed it."""
        index = file.blocks.index(block, file.blocks.read(block) or b"")
        return index or next(_by_block(file.probe, [file.blocks.numbers(block)], self.workers, None))

    def _agree(self, file: _File, held: Sequence[str | None]) -> None:
        """Give every process the same index, from the first one that has it."""
        self.group.gather(None)  # saved by now
        source = next(rank for rank, digest in enumerate(held) if digest is not None)
        if file.found is None or file.found.digest != held[source]:
            file.load()
        same = self.group.gather(file.found is not None and file.found.digest == held[source])
        if not all(same):
            mine = index_file.to_bytes(file.found) if self.group.rank == source and file.found is not None else None
            data = self.group.send(mine, source)
            self._keep(file, None if same[self.group.rank] else index_file.from_bytes(data, len(file.part)))
        file.blocks.remove()
        assert file.found is not None, "received, if nothing else"
        file.index = file.found

    def _keep(self, file: _File, index: Index | None) -> None:
        """Save a new index once for each folder, and map it in every process; keep it in memory where that fails."""
        if index is not None and self.writes:
            index_file.save(file.path, index)
        self.group.gather(None)
        if index is not None:
            file.load()
            file.found = file.found if file.found is not None and _equal(file.found, index) else index

    def _renew(self, file: _File) -> None:
        """Measure the rows anew that had a problem, and those whose media changed."""
        index, group = file.index, self.group
        changed = np.concatenate(group.gather(index.media.changed(group.rank, group.size)))
        stale = np.union1d(np.array(sorted(index.problems), np.int64), changed)
        if not len(stale):
            return
        mine = np.array_split(stale, group.size)[group.rank]
        measured = concat([*_measured(file.probe, _chunks(mine), self.workers, None)], _ALL_SETS)
        shares = [
            index_file.from_bytes(data, len(part))
            for data, part in zip(group.gather(index_file.to_bytes(measured)), np.array_split(stale, group.size))
        ]
        fresh = concat([share for share in shares if share is not None], _ALL_SETS)
        fresh.media = fresh.media.one_block()
        if not len(changed) and _same_problems(index, stale, fresh):
            return
        _replace(index, stale, fresh)
        self._keep(file, index)
        assert file.found is not None
        file.index = file.found


def _equal(one: Index, other: Index) -> bool:
    return bool((one.records == other.records).all() and np.array_equal(one.media.stamps, other.media.stamps))


def _same_problems(index: Index, stale: np.ndarray, fresh: Index) -> bool:
    """True if the rows `stale` still have the problems that they had."""
    return index.problems == {int(stale[n]): text for n, text in fresh.problems.items()}


def _replace(index: Index, stale: np.ndarray, fresh: Index) -> None:
    """Replace the entries of the rows `stale` in an index by those of the index `fresh`."""
    index.records = np.array(index.records)
    index.unread = list(index.unread)
    fresh.records["unread"] = unread.merged(index.unread, fresh.unread)[fresh.records["unread"]]
    index.records[stale] = fresh.records
    index.problems = {int(stale[n]): text for n, text in fresh.problems.items()}
    gone = set(stale.tolist())
    index.dropped = {n: text for n, text in index.dropped.items() if n not in gone}
    index.dropped |= {int(stale[n]): text for n, text in fresh.dropped.items()}
    fresh.media.uses["row"] = stale[fresh.media.rows]
    index.media = MediaStamps.concat([index.media.without(stale), fresh.media])


# -- measuring ------------------------------------------------------------------------------------------------------


def _by_block(probe: _Probe, blocks: list[np.ndarray], workers: int, progress: Progress | None) -> Iterator[Index]:
    """Index of each block of rows."""
    chunks = [_chunks(numbers) for numbers in blocks]
    measured = _measured(probe, [chunk for block in chunks for chunk in block], workers, progress)
    for block in chunks:
        index = concat([next(measured) for _ in block], _ALL_SETS)
        index.media = index.media.one_block()
        yield index


def _chunks(numbers: np.ndarray) -> list[np.ndarray]:
    return [numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK)]


def _measured(probe: _Probe, chunks: list[np.ndarray], workers: int, progress: Progress | None) -> Iterator[Index]:
    """Index of each chunk, made by several processes."""
    workers = min(workers, len(chunks) // 8)  # a process starts slowly
    done = 0
    generator = torch.Generator()  # a loader draws a seed, which must not come from the run's own generator
    for index in WorkerLoader(probe, batch_size=None, sampler=chunks, num_workers=workers, generator=generator):
        done += len(index)
        if progress is not None:
            progress(done)
        yield index


class _Probe(Dataset):
    """Data set of chunks: numbers of rows → their records and problems."""

    def __init__(self, rows: RowDataset, media: MediaCheck, probe_urls: bool) -> None:
        self.rows, self.media, self.probe_urls = rows, media, probe_urls
        self._seen: list[tuple[int, bytes, Stamp]] = []

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
        index.media = MediaStamps.of(self._seen)
        index.media.uses["row"] = np.searchsorted(numbers, index.media.rows)
        return index

    def _reason(self, number: int, error: UserError) -> str:
        return str(error).removeprefix(f"{self.rows.where(int(number))}: ")  # the file may be moved later

    def _record(self, number: int) -> tuple[Any, ...]:
        """Record of a row, with the names of keys that are not read as its last element."""
        rows = self.rows
        conversation = rows.conversation(number)
        beside = (conversation.turned_boxes > 0, *facts.facts_of(conversation), conversation.unread)
        self._seen += seen_files(number, conversation.media)  # before they are looked at
        urls = any(isinstance(m.source, str) and is_url(m.source) for m in conversation.media)
        if self.media == "decode" and (self.probe_urls or not urls):
            example = rows.processor(conversation, max_tiles=rows.max_tiles)
            numbers = (example.num_tokens, example.num_tiles, example.num_supervised)
            plain = min(255, plain_pictures(example.tiles, example.tiles_per_image))
            return *numbers, changes(example.notes), True, True, plain, *beside
        lengths = rows.processor.lengths(conversation, max_tiles=rows.max_tiles, probe_urls=self.probe_urls)
        return *lengths, self.probe_urls or not urls, True, 0, *beside


# -- settings -------------------------------------------------------------------------------------------------------


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
