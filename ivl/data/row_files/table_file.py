"""Tables of rows with random access: parquet, csv and tsv, read by pyarrow.

A table is written once, in batches, to an Arrow file in the cache, as Hugging Face's `datasets` does: any row of it is
read without decoding others, and processes share its pages. Pictures may be in cells, as bytes or `{bytes, path}`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ivl.data.cache import default_cache, optional, written
from ivl.data.row_files.row_file import expansion_limit
from ivl.options import FileLimits
from ivl.storage.files import atomic_file, file_digest, write_text
from ivl.storage.parquet import import_pyarrow
from ivl.types import UserError, printable

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".csv", ".tsv")
_BATCH = 64
"""Rows of a batch: those of one are decoded from the table together, once"""


class TableFile:
    """Table of rows. Picklable; opened anew in each process. As `RowFile`: length, `where`, `raw`, `[i]`, `digest`.

    Cells without a value are left out of a row. Raises UserError where pyarrow is missing, there is no file or no row,
    or the file cannot be read.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None, limits: FileLimits | None = None) -> None:
        self.path = Path(path)
        self.name, self.folder = str(path), str(self.path.parent)
        """Name for messages, and folder of relative media; of an object in a store, addresses"""
        self.limits = limits or FileLimits()
        import_pyarrow(str(path))
        cache = Path(cache_dir or default_cache())
        try:
            self.digest = _content_digest(self.path, cache)
            most = expansion_limit(self.path, self.limits.max_expansion)
            place = cache / "tables" / f"{self.digest}{self.path.suffix}.arrow"
            self._arrow = written(place, lambda place: _convert(self.path, place, most))
            reader = self._open()
            self.columns: list[str] = reader.schema.names
            # (batches + 1,) number of the first row of each batch, and of all rows
            self._first = _first_rows(reader, self._arrow)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; expected rows as {', '.join(SUFFIXES)} or jsonl") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        if not len(self):
            raise UserError(f"{path}: no rows; expected at least one")
        self._reader: Any = None

    def _open(self) -> pa.ipc.RecordBatchFileReader:
        import pyarrow as pa

        return pa.ipc.open_file(pa.memory_map(str(self._arrow)))

    def __len__(self) -> int:
        return int(self._first[-1])

    def where(self, i: int) -> str:
        """`file:row` of row `i`, counted from 1, for messages."""
        return f"{printable(self.name, ' ')}:{i + 1}"

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row `i`. Raises UserError with `file:row` where it is longer than the limit."""
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        if self._reader is None:
            self._reader = self._open()
        batch = int(np.searchsorted(self._first, i, side="right")) - 1
        row = self._reader.get_batch(batch).slice(i - int(self._first[batch]), 1)
        if row.nbytes > self.limits.max_row_bytes:
            raise UserError(
                f"{self.where(i)}: a row of {row.nbytes:,} bytes, but the limit is {self.limits.max_row_bytes:,}; "
                f"name media by their paths, or raise data.file_limits.max_row_bytes"
            )
        return _without_nulls(row.to_pylist()[0])

    def raw(self, i: int) -> bytes:
        """Row `i` as JSON, with a digest for each picture. Raises UserError as `[i]` does."""
        return json.dumps(self[i], ensure_ascii=False, default=_digest_or_text).encode()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}


def _first_rows(reader: pa.ipc.RecordBatchFileReader, arrow: Path) -> np.ndarray:
    """Number of the first row of each batch, and of all rows: (batches + 1,) int64.

    Kept in a file beside the table: a million rows have 16,000 batches, spread over all of a table of pictures.
    """
    note = arrow.with_suffix(".npy")
    try:
        first = np.load(note, allow_pickle=False)
        if first.shape == (reader.num_record_batches + 1,) and first.dtype == np.int64:
            return first
    except (OSError, ValueError, EOFError):
        pass
    counts = [reader.get_batch(n).num_rows for n in range(reader.num_record_batches)]
    first = np.cumsum([0, *counts], dtype=np.int64)
    with optional(note), atomic_file(note) as out:
        np.save(out, first)
    return first


def _without_nulls(value: Any) -> Any:
    """Drop fields without a value: all rows of a table have all of its fields."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _digest_or_text(value: Any) -> str:
    return hashlib.blake2b(value, digest_size=16).hexdigest() if isinstance(value, bytes) else str(value)


def _content_digest(path: Path, cache: Path) -> str:
    """Digest of a file's bytes, remembered in the cache while its size and time stay: tables of pictures are large."""
    stat = os.stat(path)
    stamp = [str(path.absolute()), stat.st_size, stat.st_mtime_ns]
    note = cache / "digests" / f"{hashlib.blake2b(repr(stamp).encode(), digest_size=16).hexdigest()}.txt"
    try:
        return note.read_text()
    except (OSError, ValueError):
        pass
    digest = file_digest(path, hashlib.blake2b(digest_size=16))
    with optional(note):
        write_text(note, digest)
    return digest


def _convert(path: Path, place: Path, most: int) -> Path:
    """Write a table as an Arrow file; of several processes that start together one writes it."""
    from filelock import FileLock

    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.is_file():
            _write(path, place, most)
    return place


def _write(path: Path, place: Path, most: int) -> None:
    import pyarrow as pa

    schema, batches, total = _csv_batches(path) if path.suffix != ".parquet" else _parquet_batches(path)
    plain = pa.schema([(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in schema])
    bar = tqdm(total=total, desc=printable(f"reading {path.name}", " "), unit="row", disable=None, leave=False)
    try:
        with bar, atomic_file(place) as out, pa.ipc.new_file(out, plain) as writer:
            for batch in batches:
                columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=plain))
                bar.update(batch.num_rows)
                if out.tell() > most:
                    raise UserError(
                        f"{path}: {path.stat().st_size:,} bytes that become more than {most:,}; raise "
                        f"data.file_limits.max_expansion where that is meant"
                    )
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a readable table ({error}); is the file complete?") from None


def _parquet_batches(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch], int]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file ({error}); is the file complete?") from None
    return file.schema_arrow, file.iter_batches(_BATCH), file.metadata.num_rows


def _csv_batches(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch], None]:
    """Batches of a csv or tsv file with a header; every cell is a text, an empty one no value."""
    import pyarrow as pa
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True)
    try:
        names = csv.open_csv(path, parse_options=parse).schema.names
        texts = csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
        )
        reader = csv.open_csv(path, parse_options=parse, convert_options=texts)
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a readable table ({error}); expected a header and the same cells a row") from None
    return reader.schema, (part for batch in reader for part in _parts(batch)), None


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, _BATCH):
        yield batch.slice(start, _BATCH)
