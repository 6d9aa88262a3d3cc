"""Tables of rows with random access: parquet, csv and tsv, read by pyarrow.

A table is written once, in batches, to an Arrow file in the cache, as Hugging Face's `datasets` does: any row of it is
read without decoding others, and processes share its pages. Pictures may be in cells, as bytes or `{bytes, path}`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
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
            longest = self.limits.max_row_bytes
            self._arrow = written(place, lambda place: _convert(self.path, place, most, longest))
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
    """Drop fields without a value, since all rows of a table have all of its fields; a decimal is a number."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def with_lists(row: dict[str, Any]) -> dict[str, Any]:
    """Read the JSON in texts that stand for lists, as a csv file has them: `["a.png", "b.png"]`."""
    return {key: _list(value) if key in _LISTS else value for key, value in row.items()}


_LISTS = frozenset(("messages", "conversations", "history", "images", "videos", "rejected_messages", "rejected_images"))


def _list(value: Any) -> Any:
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # a path may begin so; a text that is neither is refused by its format


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


def _convert(path: Path, place: Path, most: int, longest: int) -> Path:
    """Write a table as an Arrow file; of several processes that start together one writes it."""
    from filelock import FileLock

    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.is_file():
            _write(path, place, most, longest)
    return place


def _write(path: Path, place: Path, most: int, longest: int) -> None:
    import pyarrow as pa

    with _problems(path, longest):
        schema, batches, total = _csv_batches(path, longest) if path.suffix != ".parquet" else _parquet_batches(path)
    if twice := [name for name in dict.fromkeys(schema.names) if schema.names.count(name) > 1]:
        raise UserError(f"{path}: two columns are called {twice[0]!r}; expected one of each name")
    plain = pa.schema([(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in schema])
    bar = tqdm(total=total, desc=printable(f"reading {path.name}", " "), unit="row", disable=None, leave=False)
    with bar, atomic_file(place) as out, pa.ipc.new_file(out, plain) as writer:
        for batch in _read(batches, path, longest):
            columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=plain))
            bar.update(batch.num_rows)
            if out.tell() > most:
                raise UserError(
                    f"{path}: {path.stat().st_size:,} bytes that become more than {most:,}; raise "
                    f"data.file_limits.max_expansion where that is meant"
                )


def _read(batches: Iterator[pa.RecordBatch], path: Path, longest: int) -> Iterator[pa.RecordBatch]:
    """Yield batches. Raises UserError where one cannot be read, apart from faults of the disk that is written to."""
    with _problems(path, longest):
        yield from batches


@contextmanager
def _problems(path: Path, longest: int) -> Iterator[None]:
    """Turn pyarrow's errors of reading, some of which are OSErrors without a number, into UserErrors with a remedy."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        text = " ".join(str(error).split())
        remedy = next((remedy for words, remedy in _REMEDIES.items() if words in text), "is the file complete?")
        kind = "parquet file" if path.suffix == ".parquet" else "table"
        raise UserError(f"{path}: not a readable {kind} ({text[:200]}); {remedy.format(longest=longest)}") from None


_REMEDIES = {
    "invalid UTF8": "expected text in UTF-8; save the table anew as UTF-8",
    "straddling object": "expected rows of at most {longest:,} bytes (data.file_limits.max_row_bytes); name media by "
    "their paths",
    "Expected": "expected a header and the same cells a row",
    "Empty CSV": "expected a header and the same cells a row",
    "Nested data conversions": "expected texts, not categories (dictionary), in lists and objects; save the column as "
    "texts",
}
"""Words of pyarrow's message → what to do"""


def _parquet_batches(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch], int]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    return file.schema_arrow, file.iter_batches(_BATCH), file.metadata.num_rows


def _csv_batches(path: Path, longest: int) -> tuple[pa.Schema, Iterator[pa.RecordBatch], None]:
    """Batches of a csv or tsv file with a header; every cell is a text, an empty one no value."""
    import pyarrow as pa
    from pyarrow import csv

    with path.open("rb") as opened:
        if opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{path}: is UTF-16; expected text in UTF-8; save the table anew as UTF-8")
    parse = csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True)
    # A block holds a row whole, and is read at once.
    read = csv.ReadOptions(block_size=max(1 << 20, min(path.stat().st_size, longest)))
    names = csv.open_csv(path, read, parse).schema.names
    texts = csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
    )
    reader = csv.open_csv(path, read, parse, texts)
    return reader.schema, (part for batch in _closed(reader, path) for part in _parts(batch)), None


def _closed(batches: Iterator[pa.RecordBatch], path: Path) -> Iterator[pa.RecordBatch]:
    """Yield batches of csv. Raises UserError at the end for a quote without its second, which takes all to the end."""
    last = None
    for batch in batches:
        last = batch if batch.num_rows else last
        yield batch
    value = "" if last is None else last.column(last.num_columns - 1)[-1].as_py() or ""
    with path.open("rb") as opened:
        opened.seek(max(0, path.stat().st_size - 64))
        ending = opened.read().rstrip()
    if "\n" in value and not ending.endswith(b'"'):
        start = printable(value.split("\n")[0][:60], " ")
        raise UserError(
            f'{path}: the cell that begins with {start!r} is in a quote (") that is not closed, and takes the rest of '
            f"the file, {len(value.splitlines())} lines; close it, or double a quote that is part of the text"
        )


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, _BATCH):
        yield batch.slice(start, _BATCH)
