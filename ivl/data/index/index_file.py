"""Files of an index in the cache: arrays that processes map from disk, and a small JSON file that names them.

The JSON file is written last. Names of arrays hold their digest, so an index that is replaced stays whole for the
processes that read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ivl.data.cache import optional
from ivl.data.index.index import RECORD, Index
from ivl.data.index.media_stamps import MediaStamps
from ivl.data.mapped_array import load_mapped
from ivl.storage.files import atomic_file

_DAMAGED = (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, BadZipFile)


def save(path: Path, index: Index) -> None:
    """Save an index; a disk that cannot be written is noted, and nothing half-written is left."""
    arrays, facts = _arrays(index), _facts(index)
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    name = digest.hexdigest()
    with optional(path):
        for kind, array in arrays.items():
            with atomic_file(_array_path(path, name, kind)) as out:
                np.save(out, np.ascontiguousarray(array))
        with atomic_file(path.with_suffix(".json")) as out:
            out.write(json.dumps({"digest": name} | facts).encode())
        for old in path.parent.glob(f"{path.name}-*.npy"):
            if name not in old.name:
                old.unlink(missing_ok=True)


def load(path: Path, count: int) -> Index | None:
    """Index of `count` rows, its arrays mapped from disk; None where it is missing or damaged."""
    for _ in range(2):  # another process may replace it between the two reads
        try:
            facts = json.loads(path.with_suffix(".json").read_bytes())
            digest = str(facts["digest"])
            index = _index(facts, partial(_mapped, path, digest), count)
        except _DAMAGED:
            continue
        index.digest = digest
        return index
    return None


def to_bytes(index: Index) -> bytes:
    """An index as bytes, for another process or a block's file."""
    out = io.BytesIO()
    facts = np.frombuffer(json.dumps(_facts(index)).encode(), np.uint8)
    np.savez(out, facts=facts, **_arrays(index))  # type: ignore[arg-type]
    return out.getvalue()


def from_bytes(data: bytes, count: int) -> Index | None:
    """Index of `to_bytes`; None where it is damaged."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return _index(json.loads(arrays["facts"].tobytes()), lambda kind: arrays[kind], count)
    except _DAMAGED:
        return None


class IndexBlocks:
    """Blocks of an index that is being built: files beside it, so that a build that was ended goes on."""

    def __init__(self, path: Path, rows: int, size: int, on_disk: bool = True) -> None:
        self.folder, self.on_disk = path.with_suffix(".blocks"), on_disk
        self.starts = list(range(0, rows, size))
        self._rows, self._size = rows, size
        self._memory: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self.starts)

    def numbers(self, block: int) -> np.ndarray:
        """Numbers of a block's rows."""
        return np.arange(self.starts[block], min(self._rows, self.starts[block] + self._size))

    def read(self, block: int) -> bytes | None:
        """Bytes of a block; None where it is not measured, or its file is damaged."""
        if block in self._memory:
            return self._memory[block]
        with contextlib.suppress(OSError):
            data = self._place(block).read_bytes() if self.on_disk else b""
            return data if self.index(block, data) is not None else None
        return None

    def exists(self, block: int) -> bool:
        """True for a block that is measured, as far as its file's name tells."""
        return block in self._memory or (self.on_disk and self._place(block).is_file())

    def index(self, block: int, data: bytes) -> Index | None:
        """Index of a block from its bytes."""
        return from_bytes(data, len(self.numbers(block)))

    def write(self, block: int, data: bytes) -> None:
        """Write a block, whole or not at all; into memory where the disk cannot be written."""
        if self.on_disk:
            with optional(self._place(block)):
                with atomic_file(self._place(block)) as out:
                    out.write(data)
                return
        self._memory[block] = data

    def remove(self) -> None:
        """Remove the blocks, after the index is saved."""
        self._memory.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _place(self, block: int) -> Path:
        return self.folder / f"{block:06}.npz"


def _mapped(path: Path, digest: str, kind: str) -> np.ndarray:
    return load_mapped(_array_path(path, digest, kind))


def _array_path(path: Path, digest: str, kind: str) -> Path:
    return path.with_name(f"{path.name}-{digest}-{kind}.npy")


def _arrays(index: Index) -> dict[str, np.ndarray]:
    media = index.media
    return {"records": index.records, "uses": media.uses, "stamps": media.stamps, "paths": media.paths}


def _facts(index: Index) -> dict:
    facts = {"problems": index.problems, "dropped": index.dropped, "unread": index.unread}
    return facts | {"blocks": index.media.blocks.tolist()}


def _index(facts: dict, array: Callable[[str], np.ndarray], count: int) -> Index:
    """Raises ValueError where the arrays are not those of `count` rows."""
    records = array("records")
    media = MediaStamps(
        array("uses"), array("stamps"), array("paths"), np.array(facts["blocks"], np.int64).reshape(-1, 2)
    )
    media.check(count)
    if records.dtype != RECORD or len(records) != count:
        raise ValueError("not the records of these rows")
    problems, dropped = ({int(n): text for n, text in facts[name].items()} for name in ("problems", "dropped"))
    return Index(records, problems, dropped, [tuple(names) for names in facts["unread"]], media)
