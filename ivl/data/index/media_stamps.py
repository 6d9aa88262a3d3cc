"""Stamps of media files: digests of sizes and times, to see that a file is newer than an index."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ivl.data.media.source import is_url
from ivl.data.worker_loader import WorkerLoader, unchanged
from ivl.data.workers import cores
from ivl.types import Media

Stamp = tuple[int, int, int]
"""Size, and nanoseconds of the last change of the content and of the file"""
MISSING: Stamp = (-1, -1, -1)
USE = np.dtype([("row", "<u4"), ("file", "<u4")])
"""Use of a file by a row: its number, and that of the file"""
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
_THREADS = 16
"""Threads for stats of files; on a network each stat is slow"""
_PROCESS_FILES = 200_000
"""Number of files from which several processes look at them"""


@dataclass
class MediaStamps:
    """Stamps of the media files of rows; media behind URLs or without a file have none.

    The files of a block of rows are listed once, however many rows of it use them; their paths are compressed together.
    """

    uses: np.ndarray = field(default_factory=lambda: np.zeros(0, USE))
    """(uses,) of USE"""
    stamps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """(files,) digests of `Stamp`"""
    paths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    """(bytes,) of all blocks: their paths, a zero byte behind each, compressed"""
    blocks: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """(blocks, 2) files and bytes of each block"""

    @classmethod
    def of(cls, seen: Sequence[tuple[int, bytes, Stamp]]) -> MediaStamps:
        """Block of files from their uses: row, path, and stamp before the file was opened."""
        numbers: dict[bytes, int] = {}
        stamps: list[Stamp] = []
        uses = np.zeros(len(seen), USE)
        for at, (row, path, seen_stamp) in enumerate(seen):
            if path not in numbers:
                numbers[path] = len(stamps)
                stamps.append(seen_stamp)
            uses[at] = row, numbers[path]
        return cls(uses, _digests(stamps), *_packed(list(numbers)))

    @classmethod
    def concat(cls, parts: Sequence[MediaStamps], counts: Sequence[int] | None = None) -> MediaStamps:
        """Concatenate. `counts`: number of rows of each part; rows of a part are numbered after those before it."""
        if not parts:
            return cls()
        first = np.cumsum([0, *(counts or [0] * len(parts))])
        first_file = np.cumsum([0] + [len(part.stamps) for part in parts])
        uses = np.concatenate([part.uses for part in parts])
        at = 0
        for part, row, file in zip(parts, first, first_file):
            uses["row"][at : at + len(part.uses)] += np.uint32(row)
            uses["file"][at : at + len(part.uses)] += np.uint32(file)
            at += len(part.uses)
        arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in ("stamps", "paths", "blocks"))
        return cls(uses, *arrays)

    @property
    def rows(self) -> np.ndarray:
        """(uses,) row of each use of a file."""
        return self.uses["row"]

    def one_block(self) -> MediaStamps:
        """The same files as one block, each listed once, with its first stamp."""
        paths = [path for block in range(len(self.blocks)) for path in self.block_paths(block)]
        numbers = {path: n for n, path in enumerate(dict.fromkeys(paths))}
        file = np.array([numbers[path] for path in paths], np.uint32)
        first = np.unique(file, return_index=True)[1] if len(file) else np.zeros(0, np.int64)
        uses = self.uses.copy()
        uses["file"] = file[uses["file"]] if len(file) else uses["file"]
        return MediaStamps(uses, self.stamps[first], *_packed(list(numbers)))

    def block_paths(self, block: int) -> list[bytes]:
        """Paths of a block's files. Raises ValueError where they are damaged."""
        start = int(self.blocks[:block, 1].sum())
        try:
            data = zlib.decompress(self.paths[start : start + int(self.blocks[block, 1])].tobytes())
        except zlib.error as error:
            raise ValueError(f"paths of media: {error}") from None
        return data.split(b"\0")[:-1]

    def changed(self, rank: int = 0, ranks: int = 1) -> np.ndarray:
        """Rows with a file that has changed, in ascending order; of several ranks, each looks at its share of files."""
        share = list(range(rank, len(self.blocks), ranks))
        first = np.cumsum([0, *self.blocks[:, 0]])
        changed = np.zeros(len(self.stamps), bool)
        many = self.blocks[share, 0].sum() > _PROCESS_FILES
        workers = min(cores(), 8, len(share)) if many and cores() > 1 else 0
        options: dict[str, Any] = {"batch_size": None, "generator": torch.Generator(), "collate_fn": unchanged}
        loader = WorkerLoader(_Blocks(self), sampler=share, num_workers=workers, **options)
        for block, digests in zip(share, loader):
            files = slice(first[block], first[block + 1])
            changed[files] = digests != self.stamps[files]
        return np.unique(self.rows[changed[self.uses["file"]]]).astype(np.int64)

    def without(self, rows: np.ndarray) -> MediaStamps:
        """Stamps of all rows but these; their files stay in the list."""
        return MediaStamps(self.uses[~np.isin(self.rows, rows)], self.stamps, self.paths, self.blocks)

    def check(self, rows: int) -> None:
        """Raise ValueError where the arrays do not fit together, as those of a damaged file."""
        fits = self.uses.dtype == USE and self.stamps.dtype == np.uint64 and self.blocks.shape[1:] == (2,)
        fits = fits and self.blocks.sum(0).tolist() == [len(self.stamps), len(self.paths)]
        if not fits or any(len(values) and values.max() >= most for values, most in self._limits(rows)):
            raise ValueError("the arrays of media files do not fit together")

    def _limits(self, rows: int) -> list[tuple[np.ndarray, int]]:
        return [(self.uses["row"], rows), (self.uses["file"], len(self.stamps))]


class _Blocks(Dataset):
    """Data set of the blocks of files: number → (files,) digests of their stamps now."""

    def __init__(self, media: MediaStamps) -> None:
        self.media = media

    def __getitem__(self, block: int) -> np.ndarray:
        paths = self.media.block_paths(block)
        size = -(-len(paths) // _THREADS)
        parts = [paths[start : start + size] for start in range(0, len(paths), max(1, size))]
        if len(paths) < 8 * _THREADS:
            return _digests([stamp(path) for path in paths])
        with ThreadPoolExecutor(_THREADS) as pool:
            return _digests(
                [one for part in pool.map(lambda part: [stamp(path) for path in part], parts) for one in part]
            )


def _digests(stamps: Sequence[Stamp]) -> np.ndarray:
    """(files,) uint64, a number for each stamp; two stamps of a file that differ have different ones in practice."""
    values = np.array(stamps, np.int64).reshape(-1, 3).astype(np.uint64)
    return (values * _FACTORS).sum(1, dtype=np.uint64)


def _packed(paths: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Compressed paths, and the table of their one block."""
    if not paths:
        return np.zeros(0, np.uint8), np.zeros((0, 2), np.int64)
    data = np.frombuffer(zlib.compress(b"".join(path + b"\0" for path in paths)), np.uint8)
    return data, np.array([[len(paths), len(data)]], np.int64)


def seen_files(row: int, media: Iterable[Media]) -> list[tuple[int, bytes, Stamp]]:
    """Row, path and stamp of each file of a row's media, as they are now."""
    paths = (os.fsencode(path) for medium in media for path in _paths(medium.source))
    return [(row, path, stamp(path)) for path in paths]


def stamp(path: bytes) -> Stamp:
    """Size and times of a file, to see that it changed; of a folder of frames, over all its files."""
    try:
        stat = os.stat(path)
        if not os.path.isdir(path):
            return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        inside = [entry.stat() for entry in os.scandir(path)]
    except (OSError, ValueError):
        return MISSING
    inside.append(stat)
    return (
        sum(one.st_size for one in inside),
        max(one.st_mtime_ns for one in inside),
        max(one.st_ctime_ns for one in inside),
    )


def _paths(source: Any) -> list[str | os.PathLike]:
    if isinstance(source, (list, tuple)):
        return [path for one in source for path in _paths(one)]
    if not isinstance(source, (str, os.PathLike)) or "\0" in str(source):
        return []
    return [] if isinstance(source, str) and (is_url(source) or source[:5].lower() == "data:") else [source]
