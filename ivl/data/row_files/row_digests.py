"""Digests of rows' texts, kept in the cache: a split asks for all of them at each start, and tables are read slowly."""

from __future__ import annotations

import contextlib
import hashlib

import numpy as np

from ivl.data.cache import default_cache, optional
from ivl.data.mapped_array import load_mapped
from ivl.data.row_files.row_file import RowFile
from ivl.data.row_files.table_file import TableFile
from ivl.storage.files import atomic_file

STORED = 10_000
"""Rows of a file from which its digests are kept"""
_DTYPE = np.dtype(">u8")


def file_digests(file: RowFile | TableFile, seed: int = 0) -> np.ndarray:
    """Digest of the text of each row of a file, (rows,) uint64; of a large file from the cache."""
    if len(file) < STORED:
        return _digests(file, seed)
    path = default_cache() / "row_digests" / f"{file.digest}{file.path.suffix}-{seed}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # missing, or damaged
        stored = load_mapped(path)
        if stored.shape == (len(file),) and stored.dtype == _DTYPE:
            return stored
    digests = _digests(file, seed)
    with optional(path), atomic_file(path) as out:
        np.save(out, digests)
    return digests


def _digests(file: RowFile | TableFile, seed: int) -> np.ndarray:
    salt = str(seed).encode()
    hashes = (hashlib.blake2b(file.raw(i).strip(), digest_size=8, key=salt).digest() for i in range(len(file)))
    return np.frombuffer(b"".join(hashes), dtype=_DTYPE)
