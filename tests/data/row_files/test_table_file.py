"""Tables of rows: random access, what a cell becomes, and the same Examples as from jsonl."""

import io
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from ivl.data.index.index_build import build_index  # noqa: E402
from ivl.data.processor import Processor  # noqa: E402
from ivl.data.row_files.row_file import FileLimits  # noqa: E402
from ivl.data.row_files.table_file import TableFile  # noqa: E402
from ivl.data.sets.dataset import RowDataset  # noqa: E402
from ivl.types import UserError  # noqa: E402
from tests.tiny import write_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def png(color) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(out, "PNG")
    return out.getvalue()


def parquet(path, rows, group=50):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def test_any_row_of_any_row_group(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"query": f"q{n}", "response": "r"} for n in range(301)], group=70)
    file = TableFile(path, tmp_path / "cache")
    assert len(file) == 301
    assert [file[n]["query"] for n in (300, 0, 63, 64, 70, 69, -1)] == [
        "q300",
        "q0",
        "q63",
        "q64",
        "q70",
        "q69",
        "q300",
    ]
    assert file.where(69) == f"{path}:70"
    with pytest.raises(IndexError):
        file[301]
    other = pickle.loads(pickle.dumps(file))
    assert other[200] == file[200] and other.digest == file.digest


def test_the_rows_of_batches_are_read_once(tmp_path, monkeypatch):
    rows = [{"query": f"q{n}"} for n in range(200)]
    path, cache = parquet(tmp_path / "a.parquet", rows, group=70), tmp_path / "cache"
    first = TableFile(path, cache)
    (note,) = (cache / "tables").glob("*.npy")
    counted = np.load(note).tolist()
    assert counted[0] == 0 and counted[-1] == 200 and counted == sorted(set(counted))
    with monkeypatch.context() as patch:
        patch.setattr("ivl.data.row_files.table_file.np.cumsum", lambda *_, **__: pytest.fail("counted again"))
        again = TableFile(path, cache)
    assert [again[n] for n in (0, 69, 70, 199)] == [first[n] for n in (0, 69, 70, 199)]
    note.write_bytes(b"damaged")
    assert len(TableFile(path, cache)) == 200 and np.load(note).tolist() == counted


def test_a_cell_without_a_value_is_no_key(tmp_path):
    rows = [
        {"query": "q", "response": None, "images": [{"bytes": png("red"), "path": None}]},
        {"query": "q", "response": "r", "images": None},
    ]
    file = TableFile(parquet(tmp_path / "a.parquet", rows), tmp_path / "cache")
    assert file[0] == {"query": "q", "images": [{"bytes": png("red")}]}
    assert file[1] == {"query": "q", "response": "r"}
    told = json.loads(file.raw(0))
    assert len(told["images"][0]["bytes"]) == 32 and json.loads(file.raw(1)) == file[1]


def test_a_table_is_converted_once(tmp_path, monkeypatch):
    path, cache = parquet(tmp_path / "a.parquet", [{"query": "q"}] * 3), tmp_path / "cache"
    first = TableFile(path, cache)
    made = list((cache / "tables").glob("*.arrow"))
    monkeypatch.setattr("ivl.data.row_files.table_file._write", lambda *_: pytest.fail("written twice"))
    assert TableFile(path, cache).digest == first.digest
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(path.read_bytes())
    assert TableFile(copy, cache).digest == first.digest  # content, not place or time
    assert list((cache / "tables").glob("*.arrow")) == made


def test_another_content_at_the_same_place_is_seen(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"query": "old"}])
    assert TableFile(path, tmp_path / "cache")[0] == {"query": "old"}
    stat = os.stat(path)
    parquet(path, [{"query": "new"}])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert TableFile(path, tmp_path / "cache")[0] == {"query": "new"}


def test_categories_of_pandas_are_their_texts(tmp_path):
    path = tmp_path / "a.parquet"
    words = pa.array(["yes", "no", "yes"]).dictionary_encode()
    pq.write_table(pa.table({"query": ["q"] * 3, "response": words}), path)
    assert [TableFile(path, tmp_path / "cache")[n]["response"] for n in range(3)] == ["yes", "no", "yes"]


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv_and_tsv(tmp_path, name, mark):
    path = tmp_path / name
    lines = [["query", "response", "images"], ['"two\nlines"', "007", "a.png"], ["what?", "", ""]]
    path.write_text("".join(mark.join(line) + "\n" for line in lines))
    file = TableFile(path, tmp_path / "cache")
    assert [file[0], file[1]] == [
        {"query": "two\nlines", "response": "007", "images": "a.png"},
        {"query": "what?"},
    ]


def test_what_cannot_be_read_is_named(tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"gone\.parquet: no such file"):
        TableFile(tmp_path / "gone.parquet", cache)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"broken\.parquet: not a readable parquet file"):
        TableFile(broken, cache)
    ragged = tmp_path / "ragged.csv"
    ragged.write_text("query,response\nq,r\nq,r,s\n")
    with pytest.raises(UserError, match=r"ragged\.csv: not a readable table"):
        TableFile(ragged, cache)
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"query": pa.array([], pa.string())}), empty)
    with pytest.raises(UserError, match=r"empty\.parquet: no rows"):
        TableFile(empty, cache)
    assert not list(cache.rglob("*.part*"))


def test_limits_hold(tmp_path):
    path, cache = parquet(tmp_path / "a.parquet", [{"query": "x" * 10_000}] * 2), tmp_path / "cache"
    with pytest.raises(UserError, match=r"a\.parquet:2: a row of .* the limit is 1,000"):
        TableFile(path, cache, FileLimits(max_row_bytes=1000))[1]


def test_expansion_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("ivl.data.row_files.row_file._ALWAYS", 1000)
    path = parquet(tmp_path / "bomb.parquet", [{"query": "x" * 100_000}] * 1000)
    with pytest.raises(UserError, match=r"bomb\.parquet: .* bytes that become more than"):
        TableFile(path, tmp_path / "cache", FileLimits(max_expansion=10))


def test_columns_are_renamed(tmp_path, processor):
    rows = [{"question": f"q{n}", "answer": "a", "picture": {"bytes": png("blue"), "path": "b.png"}} for n in range(3)]
    path = parquet(tmp_path / "a.parquet", rows)
    columns = {"query": "question", "response": "answer", "images": "picture"}
    data = RowDataset(path, processor, cache_dir=tmp_path / "cache", columns=columns)
    assert data.row(1).keys() == columns.keys()
    conversation = data.conversation(1)
    assert conversation.messages[1].text == "a" and len(conversation.media) == 1
    with pytest.raises(UserError, match=r"columns: no column 'reply'; it has question, answer, picture"):
        RowDataset(path, processor, cache_dir=tmp_path / "cache", columns=columns | {"response": "reply"})
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"question": "q", "answer": "a", "query": "mine"}\n{"other": 1}\n')
    data = RowDataset(lines, processor, columns={"query": "question", "response": "answer"})
    with pytest.raises(UserError, match=r"a\.jsonl:1: columns: the row has a key 'query' of its own beside 'question'"):
        data.row(0)
    lines.write_text('{"query": "ours"}\n{"other": 1}\n')
    data = RowDataset(lines, processor, columns={"query": "question", "response": "answer"})
    assert data.row(0) == {"query": "ours"}
    with pytest.raises(UserError, match=r"a\.jsonl:2: columns: expected question, answer; the row has other"):
        data.row(1)


def test_the_same_rows_as_jsonl(tmp_path, processor):
    """Ids, labels, pixels, lengths and the index are those of the jsonl file, and so are packs."""
    rows, table = [], []
    for n in range(40):
        row = {"query": f"<image>what is {n}?" if n % 3 else f"count to {n}", "response": "word " * (n % 5 + 1)}
        if n % 3:
            picture = png((n, 2 * n, 3 * n))
            (tmp_path / f"{n}.png").write_bytes(picture)
            rows.append(row | {"images": [f"{n}.png"]})
            table.append(row | {"images": [{"bytes": picture, "path": f"{n}.png"}]})
        else:
            rows.append(row)
            table.append(row | {"images": None})
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = RowDataset(lines, processor, cache_dir=tmp_path / "cache")
    two = RowDataset(parquet(tmp_path / "a.parquet", table, 7), processor, cache_dir=tmp_path / "cache")
    for n in range(len(one)):
        a, b = one[n], two[n]
        assert a.input_ids.tolist() == b.input_ids.tolist() and a.labels.tolist() == b.labels.tolist()
        assert np.array_equal(a.tiles, b.tiles)
    first, second = (build_index(rows, workers=0, cache_dir=tmp_path / "cache") for rows in (one, two))
    same = [name for name in first.records.dtype.names if name != "same"]  # a digest of texts and paths
    assert np.array_equal(first.records[same], second.records[same])
    again = build_index(two, workers=0, cache_dir=tmp_path / "cache")
    assert np.array_equal(again.records, second.records)
