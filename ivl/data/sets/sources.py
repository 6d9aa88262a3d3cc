"""Sources of a data option: files of rows, meta files, or data sets known by name."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ivl.architecture.families import find_model
from ivl.data.object_store import is_object, object_files
from ivl.data.processor import Processor
from ivl.data.row_files.open_file import TAR, tar_remedy
from ivl.data.sets import hub_datasets as named
from ivl.data.sets.dataset import MixtureSource, RowDataset, permutation
from ivl.data.sets.meta_file import read_meta
from ivl.hub.dataset_files import NAME, dataset_files
from ivl.hub.files import other_kind
from ivl.options.data import Source
from ivl.types import UserError

_META_BYTES = 16 << 20
_COUNT = re.compile(r"(.+)#(\d+)")
_ROWS = re.compile(r"\.(?:jsonl(?:\.gz|\.zst)?|parquet|csv|tsv)$")
"""Files of a folder that hold rows; a `.json` may be anything"""


SourceLike = str | Path | Source


def open_sources(
    values: SourceLike | Sequence[SourceLike], processor: Processor, root: str | Path | None = None, **options: Any
) -> list[MixtureSource]:
    """Open the sources of a data option as parts of a mixture.

    A source is a file of rows, a folder or pattern of such files, an OpenGVLab meta file (see `read_meta`), a name of
    `ivl.data.sets.hub_datasets`, or a data set of the Hugging Face hub (see `dataset_files`).
    `#N` after it takes N of its rows, the same ones for the same seed. `options` go to `RowDataset`. The root and tile
    limit of a Source go before `root`, and those of a meta file before both. Raises UserError naming the file.
    """
    values = [values] if isinstance(values, (str, Path, Source)) else list(values)
    if not values:
        raise UserError("data: no files; expected one or more (jsonl or json), or names of data sets")
    sources = [one if isinstance(one, Source) else Source(str(one)) for one in values]
    return [part for source in sources for part in _parts(source, processor, root, options)]


def _parts(
    source: Source, processor: Processor, root: str | Path | None, options: dict[str, Any]
) -> list[MixtureSource]:
    place, count = _counted(source.path)
    path = Path(place).expanduser()
    if count is not None:
        if is_meta(path):
            raise UserError(
                f"{source.path}: a meta file says by repeat_time how much of its sources is seen; leave # out"
            )
        (part,) = _parts(replace(source, path=place), processor, root, options)
        numbers = _sample(len(part.rows), count, part.rows.seed, part.name, source.path)
        return [replace(part, rows=part.rows.select(numbers))]
    options = options | {"source": source.name, "root": source.media_root or root, "max_tiles": source.max_tiles}
    options["loss_weight"] = source.loss_weight
    if source.columns:
        options["columns"] = source.columns
    if is_meta(path):
        if source.repeat is not None or source.ratio is not None:
            raise UserError(
                f"{path}: a meta file says how often each of its sources is seen; leave repeat and ratio out"
            )
        return read_meta(path, processor, **options)
    files = row_files(source.path, options.get("cache_dir"))
    if not path.exists() and named.find(source.path) is not None:
        options["root"] = None  # its pictures lie beside its rows
    rows = RowDataset(files, processor, **options)
    return [MixtureSource(rows, source.name or Path(source.path).name, source.repeat, source.ratio)]


def open_rows(values: str | Path | Sequence[str | Path], processor: Processor, **options: Any) -> RowDataset:
    """Open the rows of an option that is no mixture, in order; `#N` after a name takes N of its rows.

    `options` go to `RowDataset`. Raises UserError naming the file.
    """
    names = [str(value) for value in ([values] if isinstance(values, (str, Path)) else values)]
    counted = [_counted(name) for name in names]
    files = [row_files(place, options.get("cache_dir")) for place, _ in counted]
    rows = RowDataset([file for group in files for file in group], processor, **options)
    if all(count is None for _, count in counted):
        return rows
    numbers, first, opened = [], 0, iter(rows.files)
    for name, (place, count), group in zip(names, counted, files, strict=True):
        total = sum(len(next(opened)) for _ in group)
        chosen = np.arange(total) if count is None else _sample(total, count, rows.seed, Path(place).name, name)
        numbers.append(first + chosen)
        first += total
    return rows.select(np.concatenate(numbers))


def _counted(name: str) -> tuple[str, int | None]:
    """Name without `#N`, and N; a file may have such a name itself."""
    match = None if Path(name).expanduser().exists() else _COUNT.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)


def row_files(values: str | Path | Sequence[str | Path], cache_dir: str | Path | None = None) -> list[str | Path]:
    """Files of rows that names stand for: a file, a folder or pattern of files, a data set known by name, or objects in
    a store.

    Raises UserError where a name stands for none.
    """
    values = [values] if isinstance(values, (str, Path)) else values
    return [file for value in values for file in _files(str(value), Path(value).expanduser(), cache_dir)]


def _files(name: str, path: Path, cache_dir: str | Path | None) -> Sequence[str | Path]:
    if is_object(name):
        return object_files(name, _ROWS)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _ROWS.search(file.name))
        if not files and any(TAR.search(file.name) for file in path.iterdir()):
            raise UserError(tar_remedy(path, f"{path}/*.tar*"))
        if not files:
            raise UserError(f"{path}: a folder without rows; expected files named *.jsonl, *.parquet, *.csv or *.tsv")
        return files
    if path.exists():
        return [path]
    if named.find(name) is not None:
        return [named.fetch_rows(name, cache_dir)]
    if find_model(name) is not None:
        raise other_kind(name, is_data=False)
    if re.search(r"[*?\[]", name):
        if files := sorted(Path(file) for file in glob.glob(str(path), recursive=True)):
            return files
        raise UserError(f"{name}: no file fits this pattern")
    if NAME.fullmatch(name) and (":" in name or not path.suffix) and not path.parent.is_dir():
        return dataset_files(name)
    if not path.suffix:
        known = ", ".join(named.SETS)
        raise UserError(
            f"{path}: neither a file nor a data set known by name; expected a path, OWNER/NAME of a data set on "
            f"Hugging Face, or one of {known}"
        )
    return [path]


def _sample(total: int, count: int, seed: int, name: str, file: str) -> np.ndarray:
    """Numbers of `count` rows of `total`, in order; the same for the same seed. Raises UserError naming `file`."""
    if not 0 < count <= total:
        raise UserError(
            f"{file}: asked for {count} rows of {total}; expected 1 to {total} (repeat of a source sees rows again)"
        )
    return np.sort(permutation(total, seed, "sample", name)[:count])


def is_meta(path: Path) -> bool:
    """True for a file that is one object of sources, each with an `annotation`; False for rows."""
    if path.suffix != ".json" or not path.is_file() or path.stat().st_size > _META_BYTES:
        return False
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"{"):
        return False
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError):
        return False  # one row a line; errors in them are raised where they are read
    return bool(meta) and all(isinstance(v, dict) and "annotation" in v for v in meta.values())
