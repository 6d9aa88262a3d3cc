"""Held-out rows of a run: a file in its folder lists them, to score or predict them later."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ivl.data.object_store import absolute
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset, digests
from ivl.options import FileLimits
from ivl.storage.files import atomic_file
from ivl.types import UserError

NAME = "validation-split"


def remember(folder: str | Path, held: RowDataset, seed: int = 0) -> Path:
    """Write a run's held-out rows into its folder; a different earlier file is never overwritten."""
    folder = Path(folder)
    new = folder / f".{NAME}.{os.getpid()}.json"
    save_split(new, held, seed)
    last = remembered(folder)
    if last is not None and last.read_bytes() == new.read_bytes():
        new.unlink()
        return last
    count = len(list(folder.glob(f"{NAME}*.json")))
    return new.rename(folder / (f"{NAME}-{count}.json" if count else f"{NAME}.json"))


def remembered(folder: str | Path) -> Path | None:
    """Last file of held-out rows that a run wrote; None where there is none."""
    paths = sorted(Path(folder).glob(f"{NAME}*.json"), key=lambda path: (len(path.name), path.name))
    return paths[-1] if paths else None


def save_split(path: str | Path, held: RowDataset, seed: int = 0) -> None:
    """Write the held-out rows of `ivl.data.sets.dataset.split`: their files, and a digest of each row's text."""
    record = {
        "files": [absolute(file.name) for file in held.files],
        "root": None if held.root is None else absolute(held.root),
        "source": held.source,
        "max_tiles": held.max_tiles,
        "columns": held.columns,
        "seed": seed,
        "rows": [f"{digest:016x}" for digest in digests(held, seed)],
    }
    with atomic_file(Path(path)) as out:
        out.write(json.dumps(record, indent=0).encode())


def open_split(
    path: str | Path, processor: Processor, root: str | Path | None = None, limits: FileLimits | None = None
) -> RowDataset:
    """Held-out rows of a file that `save_split` wrote, from the files of rows it names.

    `root`, `limits`: as in `RowDataset`; `root` is used where the run had none. Raises UserError as `load_split`.
    """
    record = _read(path)
    options: dict[str, Any] = {key: record.get(key) for key in ("max_tiles", "columns")}
    options |= {"root": record.get("root") or root, "source": record.get("source") or "", "limits": limits}
    rows = RowDataset(record["files"], processor, **options)
    return load_split(path, rows)[1]


def load_split(path: str | Path, rows: RowDataset) -> tuple[RowDataset, RowDataset]:
    """Split into (training rows, held-out rows) as a split file says, also where files were moved, sorted or added to.

    Raises UserError where the file is no split, or a held-out row is not among `rows`.
    """
    record = _read(path)
    left = Counter(int(digest, 16) for digest in record["rows"])
    held = np.zeros(len(rows), bool)
    for number, digest in enumerate(digests(rows, record["seed"]).tolist()):
        if left[digest] > 0:
            left[digest] -= 1
            held[number] = True
    if missing := sum(left.values()):
        names = ", ".join(file.name for file in rows.files)
        raise UserError(
            f"{path}: {missing} of its {len(record['rows'])} held-out rows are not in {names}; they changed since. "
            f"Give the rows to be answered as a file"
        )
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


def _read(path: str | Path) -> dict:
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        [int(digest, 16) for digest in record["rows"]]
        if isinstance(record["seed"], int) and isinstance(record["files"], list):
            return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as held-out rows of a run ({error})") from None
    raise UserError(f"{path}: expected files, seed and rows, as a run writes them")
