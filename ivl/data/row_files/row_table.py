"""Table of a row file: where each row begins, its bytes and its line; of a large file it is kept in the cache.

The file is then not read through at each start, and processes share the table's pages.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ivl.data.cache import optional
from ivl.data.mapped_array import load_mapped
from ivl.storage.files import atomic_file

MOST_BYTES = (1 << 32) - 1
"""Largest size of a row in the table; one of more bytes counts as this, and cannot be read"""
LARGE = 64 << 20
"""Bytes of a file from which its table is kept"""
_SETTLED = 2.0
"""Seconds since its last change after which a file cannot change again with the same time"""


class RowTable(NamedTuple):
    """Table of the rows of a file."""

    starts: np.ndarray
    """(rows,) int64"""
    sizes: np.ndarray
    """(rows,) uint32, bytes of each row"""
    lines: np.ndarray | None
    """(rows,) uint32 number of each row's line; None: each line is a row"""
    digest: str
    """Digest of the file"""


Numbers = Sequence[int] | np.ndarray | array


def row_table(starts: Numbers, ends: Numbers, lines: Numbers | None, digest: str) -> RowTable:
    """Make a table from the start, end and line of each row."""
    first, last = np.array(starts, np.int64), np.array(ends, np.int64)
    sizes = np.minimum(last - first, MOST_BYTES).astype(np.uint32)
    return RowTable(first, sizes, None if lines is None else np.array(lines, np.uint32), digest)


def remembered(path: Path, cache: Path, scan: Callable[[], RowTable]) -> RowTable:
    """Table of a file, from the cache where the file is large and has not changed; else by `scan`.

    A change is seen by the file's size, its number on the disk, and the times of its content and of the file itself,
    which no program can set back.
    """
    before = os.stat(path)
    if before.st_size < LARGE:
        return scan()
    stamp = [str(path.absolute()), before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns]
    key = hashlib.blake2b(json.dumps(stamp).encode(), digest_size=16).hexdigest()
    place = cache / "row_tables" / key
    if (table := _load(place)) is not None:
        return table
    began = time.time()
    table = scan()
    after = os.stat(path)
    same = (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == (*stamp[3:],)
    if same and began - max(before.st_mtime, before.st_ctime) > _SETTLED:
        with optional(place):
            _save(place, table)
            return _load(place) or table
    return table


def _save(place: Path, table: RowTable) -> None:
    for name, values in (("starts", table.starts), ("sizes", table.sizes), ("lines", table.lines)):
        if values is not None:
            with atomic_file(place.with_suffix(f".{name}.npy")) as out:
                np.save(out, values)
    with atomic_file(place.with_suffix(".json")) as out:
        facts = {"digest": table.digest, "rows": len(table.starts), "lines": table.lines is not None}
        out.write(json.dumps(facts).encode())


def _load(place: Path) -> RowTable | None:
    try:
        facts = json.loads(place.with_suffix(".json").read_bytes())
        names = ["starts", "sizes", *(["lines"] if facts["lines"] else [])]
        columns = [load_mapped(place.with_suffix(f".{name}.npy")) for name in names]
        digest, rows = str(facts["digest"]), facts["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if any(len(column) != rows for column in columns):
        return None
    return RowTable(columns[0], columns[1], columns[2] if facts["lines"] else None, digest)
