"""Reference store: log-probabilities of pairs by the model that training began from, on disk by content.

DIR/MODEL/0123….npy     records of ENTRY, named by the digest of their bytes

MODEL names the weights and all settings that decide the numbers; the key of a pair is a digest of its row and of sizes
and times of its pictures. So no entry is ever older than its row. Files are only added, each complete; one whose name
is not its digest is removed, and its pairs are computed again.
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from ivl.data.cache import default_cache, go_without, optional
from ivl.data.index.index import Index, concat
from ivl.data.index.index_build import build_index
from ivl.data.sets.dataset import RowDataset
from ivl.storage.files import atomic_file

KEY = "S32"
ENTRY = np.dtype([("key", KEY), ("chosen", "<f4"), ("rejected", "<f4")])
"""Key of a pair, and negative log-likelihood of each answer, summed over its tokens"""


class ReferenceStore:
    """Entries of one model. Numbers of pairs that are not there are NaN."""

    def __init__(self, model: str, cache_dir: str | Path | None = None) -> None:
        """`cache_dir`: folder of the cache; None: `~/.cache/ivl`."""
        self.folder = Path(cache_dir or default_cache()) / "reference" / model

    def read(self, keys: np.ndarray) -> np.ndarray:
        """Numbers of pairs, (pairs, 2) float32, by their keys, (pairs,) of KEY."""
        numbers = np.full((len(keys), 2), np.nan, np.float32)
        parts = [part for path in sorted(self.folder.glob("*.npy")) if (part := _part(path)) is not None]
        if not parts or not len(keys):
            return numbers
        entries = np.concatenate(parts)
        entries = entries[np.argsort(entries["key"], kind="stable")]
        at = np.searchsorted(entries["key"], keys).clip(max=len(entries) - 1)
        hit = entries["key"][at] == keys
        numbers[hit] = np.stack([entries["chosen"], entries["rejected"]], 1)[at[hit]]
        return numbers

    def add(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """Add pairs, those with NaN left out. A disk that cannot be written is noted, and does not stop a run."""
        finite = np.isfinite(numbers).all(1)
        entries = np.zeros(int(finite.sum()), ENTRY)
        entries["key"], (entries["chosen"], entries["rejected"]) = keys[finite], numbers[finite].T
        if not len(entries):
            return
        path = self.folder / f"{_digest(entries)}.npy"
        with optional(path), atomic_file(path) as out:
            np.save(out, entries)


def _part(path: Path) -> np.ndarray | None:
    """Entries of a file; None where it cannot be read. A damaged one is removed."""
    try:
        entries = np.load(path, allow_pickle=False)
        if entries.dtype == ENTRY and _digest(entries) == path.stem:
            return entries
    except FileNotFoundError:  # another process removed it
        return None
    except OSError as error:
        go_without(path, error)
        return None
    except (ValueError, EOFError):
        pass
    print(f"note: {path} is damaged; its log-probabilities are computed again", file=sys.stderr, flush=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)
    return None


def _digest(entries: np.ndarray) -> str:
    return hashlib.blake2b(entries.tobytes(), digest_size=16).hexdigest()


def indexed(rows: RowDataset, probe_urls: bool = False) -> tuple[np.ndarray, Index]:
    """Key of each row, (rows,) of KEY, and the index of the rows."""
    index = concat([build_index(part, probe_urls=probe_urls) for part in rows.per_file()])
    order, numbers = np.argsort(index.media.rows, kind="stable"), rows.numbers
    first, last = (np.searchsorted(index.media.rows[order], numbers, side) for side in ("left", "right"))
    settings = repr((rows.max_tiles, sorted(rows.columns.items()))).encode()
    keys = np.empty(len(rows), KEY)
    for n in range(len(rows)):
        digest = hashlib.blake2b(settings, digest_size=16)
        digest.update(rows.raw(n).strip())
        files = index.media.uses["file"][order[first[n] : last[n]]]
        digest.update(index.media.stamps[files].tobytes())
        keys[n] = digest.hexdigest()
    return keys, index.select(numbers)
