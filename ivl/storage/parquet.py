"""Rows of parquet files, for benchmarks and data sets; pyarrow is an extra."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ivl.errors import UserError


def import_pyarrow(name: str) -> Any:
    """Import pyarrow. Raises UserError with `name`, the file that needs it, where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{name}: reading it needs pyarrow; pip install 'ivl[parquet]'") from None
    return pyarrow


def parquet_rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file. Raises UserError with `name` where pyarrow is missing or it is no parquet file."""
    pyarrow = import_pyarrow(name)
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{name}: not a readable parquet file ({error}); is the download complete?") from error
