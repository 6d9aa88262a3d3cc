"""Stamps of media files: sizes and times, to see that a file is newer than an index."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ivl.data.media.source import is_url
from ivl.storage.files import atomic_file
from ivl.types import Media

Stamp = tuple[int, int, int]
"""Size, and nanoseconds of the last change of the content and of the file"""
MISSING: Stamp = (-1, -1, -1)
_BLOCK = 4096
_THREADS = 16
"""Threads for stats of files; on a network each stat is slow"""


@dataclass
class MediaStamps:
    """Stamps of the media files of rows, one entry for each file; media behind URLs or without a file have none."""

    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """(files,)"""
    stamps: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    """(files, 3)"""
    paths: bytes = b""
    """Paths, a zero byte behind each"""

    @classmethod
    def of(cls, row: int, media: Iterable[Media]) -> MediaStamps:
        """Stamps of the files of a row as they are now."""
        paths = [os.fsencode(path) for medium in media for path in _paths(medium.source)]
        stamps = np.array([stamp(path) for path in paths], np.int64).reshape(-1, 3)
        return cls(np.full(len(paths), row, np.int64), stamps, b"".join(path + b"\0" for path in paths))

    @classmethod
    def concat(cls, parts: Sequence[MediaStamps], counts: Sequence[int] | None = None) -> MediaStamps:
        """Concatenate. `counts`: number of rows of each part; rows of a part are numbered after those before it."""
        if not parts:
            return cls()
        first = np.cumsum([0, *(counts or [0] * len(parts))])
        rows = np.concatenate([part.rows + n for part, n in zip(parts, first)])
        return cls(rows, np.concatenate([part.stamps for part in parts]), b"".join(part.paths for part in parts))

    def changed(self) -> np.ndarray:
        """Rows with a file that has changed, in ascending order."""
        paths = self.paths.split(b"\0")[:-1]
        blocks = [paths[start : start + _BLOCK] for start in range(0, len(paths), _BLOCK)]
        with ThreadPoolExecutor(_THREADS) as pool:
            now = [row for block in pool.map(lambda block: [stamp(path) for path in block], blocks) for row in block]
        return np.unique(self.rows[(np.array(now, np.int64).reshape(-1, 3) != self.stamps).any(1)])

    def without(self, rows: np.ndarray) -> MediaStamps:
        """Stamps of all rows but these."""
        mask = ~np.isin(self.rows, rows)
        paths = self.paths.split(b"\0")[:-1]
        return MediaStamps(self.rows[mask], self.stamps[mask], b"".join(paths[n] + b"\0" for n in np.flatnonzero(mask)))

    def save(self, path: Path) -> None:
        with atomic_file(path) as out:
            np.savez(out, rows=self.rows, stamps=self.stamps, paths=np.frombuffer(self.paths, np.uint8))

    @classmethod
    def load(cls, path: Path) -> MediaStamps:
        """Load a file of `save`. Raises OSError or ValueError where it is missing or damaged."""
        with np.load(path, allow_pickle=False) as file:
            stamps = cls(file["rows"], file["stamps"], file["paths"].tobytes())
        if not len(stamps.rows) == len(stamps.stamps) == stamps.paths.count(b"\0"):
            raise ValueError("not whole")
        return stamps


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
