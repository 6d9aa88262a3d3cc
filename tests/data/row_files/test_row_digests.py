"""Digests of rows: those of large files come from the cache, and give the same split."""

import json

import numpy as np
import pytest

from ivl.data.cache import default_cache
from ivl.data.row_files import row_digests
from ivl.data.row_files.row_file import RowFile
from ivl.data.row_files.table_file import TableFile


def write(path, count=40):
    rows = [{"query": f"{n}", "response": "x"} for n in range(count)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return RowFile(path)
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return TableFile(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_of_a_large_file_are_read_once(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write(tmp_path / name)
    plain = row_digests.file_digests(file, 3)
    assert not (default_cache() / "row_digests").exists(), "a small file is read each time"
    monkeypatch.setattr(row_digests, "STORED", 10)
    first = row_digests.file_digests(file, 3)
    assert np.array_equal(first, plain)
    with monkeypatch.context() as unread:
        unread.setattr(type(file), "raw", None)
        assert np.array_equal(row_digests.file_digests(file, 3), plain)
    assert not np.array_equal(row_digests.file_digests(file, 4), plain), "of another seed"
    for stored in (default_cache() / "row_digests").iterdir():
        stored.write_bytes(stored.read_bytes()[:-20])
    assert np.array_equal(row_digests.file_digests(file, 3), plain), "a damaged one is made anew"
    changed = write(tmp_path / name, 41)
    assert len(row_digests.file_digests(changed, 3)) == 41
