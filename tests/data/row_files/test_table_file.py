"""Tables of rows: random access, what a cell becomes, and the same Examples as from jsonl."""

import decimal
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


def refused(path, words, cache, **limits):
    with pytest.raises(UserError, match=words):
        TableFile(path, cache, FileLimits(**limits))


def test_two_columns_of_one_name_are_refused(tmp_path):
    """Of two only the last would be read."""
    table = pa.Table.from_arrays([pa.array(["q"]), pa.array(["a"]), pa.array(["b"])], ["query", "response", "response"])
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("query,response,response\nq,a,b\n")
    for name in ("a.parquet", "a.csv"):
        refused(tmp_path / name, rf"{name}: two columns are called 'response'", tmp_path / "cache")


def test_a_long_cell_of_a_csv_file_is_read(tmp_path):
    """Pictures in cells are longer than the blocks that pyarrow reads by default."""
    path, text = tmp_path / "a.csv", "x " * 1_500_000
    path.write_text(f'query,response\nq,{text}\n"two\nlines",r\n')
    file = TableFile(path, tmp_path / "cache")
    assert [file[0]["response"], file[1]] == [text, {"query": "two\nlines", "response": "r"}]
    words = r"a\.csv: .*rows of at most 1,048,576 bytes \(data\.file_limits\.max_row_bytes\)"
    refused(path, words, tmp_path / "other", max_row_bytes=1 << 20)


@pytest.mark.parametrize("encoding", ["latin-1", "gbk", "utf-16"])
@pytest.mark.parametrize("first", [True, False])
def test_text_in_another_encoding_is_named(tmp_path, encoding, first):
    text = (
        "query,response\n" + ("" if first else "q,a\n" * 300_000) + ("é,a\n" if encoding == "latin-1" else "中文,是\n")
    )
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    refused(tmp_path / "a.csv", r"a\.csv: .* UTF-8; save the table anew as UTF-8", tmp_path / "cache")


def test_a_message_does_not_repeat_a_long_row(tmp_path):
    (tmp_path / "a.csv").write_text(f"query,response\nq,{'x' * 100_000},r\n")
    with pytest.raises(UserError, match="expected a header and the same cells a row") as error:
        TableFile(tmp_path / "a.csv", tmp_path / "cache")
    assert len(str(error.value)) < 600


def test_a_mark_of_utf8_is_no_part_of_a_name(tmp_path):
    (tmp_path / "a.tsv").write_text("\ufeffquery\tresponse\nq\ta\n", encoding="utf-8")
    assert TableFile(tmp_path / "a.tsv", tmp_path / "cache")[0] == {"query": "q", "response": "a"}


def test_damage_inside_a_table_is_no_fault_of_the_cache(tmp_path, capsys):
    rows = [{"query": os.urandom(50).hex(), "response": "a"} for _ in range(5000)]
    path = parquet(tmp_path / "a.parquet", rows, 5000)
    data = bytearray(path.read_bytes())
    data[1000:3000] = b"\xff" * 2000
    path.write_bytes(data)
    refused(path, r"a\.parquet: not a readable parquet file .*is the file complete", tmp_path / "cache")
    assert "cache" not in capsys.readouterr().err


def test_categories_inside_lists_are_told(tmp_path):
    turn = pa.struct([("role", pa.dictionary(pa.int32(), pa.string())), ("content", pa.string())])
    turns = pa.array([[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]] * 200, pa.list_(turn))
    pq.write_table(pa.table({"messages": turns}), tmp_path / "a.parquet", row_group_size=30)
    try:
        file = TableFile(tmp_path / "a.parquet", tmp_path / "cache")
    except UserError as error:  # not read by pyarrow 26
        assert "expected texts, not categories" in str(error)
    else:
        assert file[199]["messages"][1] == {"role": "assistant", "content": "a"}


def test_decimals_and_lists_as_json(tmp_path, processor):
    """Numbers of databases are decimals, and a csv file has lists as JSON."""
    weights = pa.array([decimal.Decimal("0.5")] * 2)
    pq.write_table(pa.table({"query": ["q"] * 2, "response": ["a"] * 2, "weight": weights}), tmp_path / "a.parquet")
    data = RowDataset(tmp_path / "a.parquet", processor, cache_dir=tmp_path / "cache")
    assert data.conversation(1).weight == 0.5
    for name in ("p.png", "[q].png"):
        (tmp_path / name).write_bytes(png("red"))
    (tmp_path / "a.csv").write_text(
        'query,response,images,history\n<image>x<image>,"[1, 2]","[""p.png"", ""p.png""]","[[""a"", ""b""]]"\n'
        "<image>y,a,[q].png,\n"
    )
    data = RowDataset(tmp_path / "a.csv", processor, cache_dir=tmp_path / "cache")
    conversation = data.conversation(0)
    assert [message.text for message in conversation.messages[1::2]] == ["b", "[1, 2]"]
    assert len(conversation.media) == 2 and len(data.conversation(1).media) == 1
    messages = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    file = parquet(tmp_path / "b.parquet", [{"messages": messages}])
    data = RowDataset(file, processor, cache_dir=tmp_path / "cache")
    assert data.conversation(0).messages[1].text == "a"


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


def test_rows_with_all_that_they_may_have_are_those_of_jsonl(tmp_path, processor):
    """Boxes of each form, histories, weights, systems, media in turns, videos with their own frames, marks of turns."""
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(png((60 * n, 90, 30)))
    frames = [f"{n}.png" for n in range(4)]
    image = {"bytes": png((0, 90, 30)), "path": "0.png"}
    turns = [{"role": "user", "content": "<image>x"}, {"role": "assistant", "content": "y"}]
    objects = [{"caption": "c", "bbox": [1, 2, 30, 20], "bbox_type": "real", "image": 0}]
    common = {"query": "<image>Find <ref-object>", "response": "<bbox>", "history": [["a", "b"]], "system": "s"}
    shares = [{"caption": "c", "bbox": [0.1, 0.2, 0.5, 0.6], "bbox_type": "norm_1"}]
    unlearnt = [*turns[:1], turns[1] | {"loss": False}, {"role": "user", "content": "z"}, turns[1]]
    spoken = [{"from": "human", "value": "<image>h"}, {"from": "gpt", "value": "g"}]
    video = {"query": "<video>v", "response": "r"}
    rows = [  # and what the table has instead
        (common | {"images": ["0.png"], "objects": objects, "weight": 0.25}, {"images": [image]}),
        (common | {"images": ["0.png"], "objects": shares}, {}),
        (video | {"videos": [frames], "weight": 2.0}, {}),
        (video | {"videos": [{"path": frames, "num_frames": 2}]}, {}),
        ({"messages": turns, "images": ["0.png"]}, {"images": [image]}),
        ({"messages": unlearnt, "images": ["1.png"]}, {}),
        ({"image": "0.png", "conversations": spoken}, {"image": image}),
        ({"query": "q", "response": "r", "tools": "[]"}, {}),
    ]
    for n, (row, other) in enumerate(rows):
        (tmp_path / f"{n}.jsonl").write_text(json.dumps(row) + "\n")
        lines = RowDataset(tmp_path / f"{n}.jsonl", processor, cache_dir=tmp_path / "cache")
        # Other rows have other keys, so that most cells of this one are empty.
        empty = dict.fromkeys(("query", "response", "images", "source"))
        table = parquet(tmp_path / f"{n}.parquet", [empty | row | other, {"query": "q", "response": "r"}])
        table = RowDataset(table, processor, cache_dir=tmp_path / "cache")
        a, b = lines[0], table[0]
        assert a.input_ids.tolist() == b.input_ids.tolist() and a.labels.tolist() == b.labels.tolist(), row
        assert np.array_equal(a.tiles, b.tiles), row
        assert lines.conversation(0).weight == table.conversation(0).weight
        first, second = (build_index(rows, workers=0, cache_dir=tmp_path / "cache") for rows in (lines, table))
        same = [name for name in first.records.dtype.names if name != "same"]
        assert np.array_equal(first.records[same], second.records[same][:1])


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_quote_that_is_not_closed(tmp_path, suffix):
    """It would take the rest of the file as one cell, and all its rows with it."""
    comma = "," if suffix == ".csv" else "\t"
    path = tmp_path / f"rows{suffix}"
    head = f"query{comma}response\n"
    path.write_text(head + f'a{comma}b\nc{comma}"it goes on\n' + f"d{comma}e\n" * 50)
    with pytest.raises(UserError, match=r"begins with 'it goes on' is in a quote .* the rest of the file, 51 lines"):
        TableFile(path, tmp_path / "cache")
    for ending in ("\n", "", "\r\n"):  # a cell of two lines at the end, and a quote within a cell
        path.write_text(head + f'a 5" pipe{comma}b\nc{comma}"it goes\non"{ending}')
        assert [row["response"] for row in TableFile(path, tmp_path / "cache")] == ["b", "it goes\non"]
    path.write_text(head + f'a{comma}"it goes\non" \n')  # a blank behind the quote is part of the cell
    assert [row["response"] for row in TableFile(path, tmp_path / "cache")] == ["it goes\non "]
