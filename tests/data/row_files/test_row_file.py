"""Rows found in every kind of file, with the right line, and nothing but UserError for broken ones."""

import gzip
import json
import os
import pickle
import random
import sys
import time
import tracemalloc

import numpy as np
import pytest

from ivl.data.row_files import row_file, row_table
from ivl.data.row_files.row_file import RowFile, load_rows
from ivl.options import FileLimits
from ivl.types import UserError

ROWS = [{"query": f'q{n} «é», }} ]{{ \\ "', "response": "n\nm" * n, "history": [["a", "b"]]} for n in range(20)]


def written(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(rows=ROWS, **options):
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def test_lines_lists_and_compressed_files_hold_the_same_rows(tmp_path):
    texts = {
        "a.jsonl": lines(),
        "utf8.jsonl": lines(ensure_ascii=False),
        "windows.jsonl": lines().replace("\n", "\r\n"),
        "bom.jsonl": "\ufeff" + lines(),
        "no_end.jsonl": lines().rstrip("\n"),
        "lines.json": lines(),
        "list.json": json.dumps(ROWS),
        "pretty.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
        "bom.json": "\ufeff" + json.dumps(ROWS, indent=1),
        "list.jsonl": json.dumps(ROWS),
        "a.jsonl.gz": gzip.compress(lines().encode()),
        "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    }
    for name, text in texts.items():
        file = RowFile(written(tmp_path, name, text), cache_dir=tmp_path / "cache")
        assert len(file) == 20, name
        for copy in (file, pickle.loads(pickle.dumps(file))):
            order = random.Random(0).sample(range(20), 20)
            assert [copy[i] for i in order] == [ROWS[i] for i in order], name


def test_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = written(tmp_path, "a.jsonl.zst", zstandard.compress(lines().encode()))
    assert [row for _, row in load_rows(path, tmp_path / "cache")] == ROWS
    with pytest.raises(UserError, match="damaged"):
        RowFile(written(tmp_path, "b.jsonl.zst", b"no frame"), tmp_path / "cache")


def test_zst_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: zstandard is not installed; pip install"):
        RowFile(written(tmp_path, "a.jsonl.zst", b"(\xb5/\xfd"), tmp_path / "cache")


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    text = "\n" + json.dumps(ROWS[0]) + "\n\n   \n" + json.dumps(ROWS[1]) + "\n\n"
    file = RowFile(written(tmp_path, "a.jsonl", text))
    assert [where.rsplit(":")[-1] for where, _ in load_rows(file.path)] == ["2", "5"]
    pretty = RowFile(written(tmp_path, "a.json", "[\n" + json.dumps(ROWS[0]) + ",\n\n" + json.dumps(ROWS[1]) + "]"))
    assert [pretty.where(i) for i in range(2)] == [f"{tmp_path}/a.json:2", f"{tmp_path}/a.json:4"]


def test_a_bad_row_is_named_and_spoils_no_other(tmp_path):
    good = json.dumps(ROWS[0])
    file = RowFile(written(tmp_path, "a.jsonl", f"{good}\n{{'query': 1}}\n{good[:-3]}\n\xff\n{'[' * 100000}\n{good}\n"))
    for i, words in ((1, "at character 2"), (2, "not JSON"), (3, "not JSON"), (4, "nested too deeply")):
        with pytest.raises(UserError, match=rf"a\.jsonl:{i + 1}: .*{words}"):
            file[i]
    assert file[0] == file[5] == ROWS[0]


def test_files_that_hold_no_rows(tmp_path):
    row = json.dumps(ROWS[0])
    table = {
        "empty.jsonl": ("", "no rows"),
        "blank.jsonl": ("\n\n  \n", "no rows"),
        "empty.json": ("[]", "no rows"),
        "text.jsonl": ("query,response\n1,2\n", "found 'query,"),
        "utf16.jsonl": (lines().encode("utf-16"), "UTF-16"),
        "object.json": (json.dumps({"a": 1}, indent=2), "one JSON object over several lines"),
        "cut.json": (json.dumps(ROWS)[:-1], "no end"),
        "cut2.json": (json.dumps(ROWS)[:-100], "no end"),
        "scalars.json": ("[1, 2]", ":1: expected a list of JSON objects"),
        "strings.json": ('["a"]', "expected a list of JSON objects"),
        "nested.json": (f"[[{row}]]", "expected a list of JSON objects"),
        "comma.json": (f"[{row}\n{row}]", ":2: expected a list of JSON objects"),
        "tail.json": (f"[{row}] and more", "found ' and more'"),
        "cut.jsonl.gz": (gzip.compress(lines().encode())[:-20], "compression is damaged"),
        "not.jsonl.gz": (lines(), "compression is damaged"),
    }
    for name, (text, words) in table.items():
        path = written(tmp_path, name, text)
        with pytest.raises(UserError, match=words) as caught:
            RowFile(path, tmp_path / "cache")
        assert str(caught.value).startswith(str(path)), name
    with pytest.raises(UserError, match="no such file"):
        RowFile(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        RowFile(tmp_path)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_mutated_files(tmp_path):
    """Every file gives rows or a UserError; rows that are given are JSON."""
    draw = random.Random(0)
    texts = [lines(ROWS[:5]).encode(), json.dumps(ROWS[:5]).encode(), json.dumps(ROWS[:5], indent=1).encode()]
    read = 0
    for n in range(600):
        broken = bytearray(texts[n % 3])
        for _ in range(draw.randrange(1, 6)):
            at = draw.randrange(len(broken))
            way = draw.randrange(3)
            if way == 0:
                broken[at] = draw.choice(b'{}[]",\\\n\0:x\xff')
            elif way == 1:
                del broken[at : at + draw.randrange(1, 9)]
            else:
                broken[at:at] = draw.choice([b"\n", b'"', b"[", b"}", b"\\", b"  "])
        try:
            file = RowFile(written(tmp_path, "a.json", bytes(broken)))
        except UserError:
            continue
        for i in range(len(file)):
            try:
                file[i]
                read += 1
            except UserError as error:
                assert str(error).startswith(f"{tmp_path}/a.json:")
    assert read > 500


def test_a_row_above_the_limit_is_a_problem_of_its_own(tmp_path):
    rows = [{"query": "q" * n, "response": "r"} for n in (10, 3000, 10)]
    for name, text in (("a.jsonl", lines(rows)), ("a.json", json.dumps(rows, indent=1))):
        file = RowFile(written(tmp_path, name, text), limits=FileLimits(max_row_bytes=1000))
        assert [file[0], file[2]] == [rows[0], rows[2]]
        with pytest.raises(UserError, match=r"a\.jsonl?:\d+: a row of 3,\d+ bytes, but the limit is 1,000; .*raise "):
            file[1]
        assert RowFile(file.path)[1] == rows[1]
    with pytest.raises(UserError, match=r"data\.file_limits: expected numbers of at least 1"):
        FileLimits(max_row_bytes=0)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_that_becomes_too_much(tmp_path, monkeypatch, kind):
    pack = gzip.compress if kind == "gz" else pytest.importorskip("zstandard").compress
    monkeypatch.setattr("ivl.data.row_files.row_file._ALWAYS", 1 << 20)
    monkeypatch.setattr("ivl.data.row_files.row_file._CHUNK", 1 << 16)
    path = written(tmp_path, f"bomb.jsonl.{kind}", pack((lines() + " " * (8 << 20)).encode()))
    with pytest.raises(
        UserError, match=rf"bomb\.jsonl\.{kind}: .* become more than .*data\.file_limits\.max_expansion"
    ):
        RowFile(path, tmp_path / "cache", FileLimits(max_expansion=2))
    assert not [found for found in (tmp_path / "cache").rglob("*") if found.is_file()], "nothing is left in the cache"
    whole = RowFile(path, tmp_path / "cache", FileLimits(max_expansion=1e6))
    assert len(whole) == 21 and whole[19] == ROWS[19]
    with pytest.raises(UserError, match="max_expansion"):
        RowFile(path, tmp_path / "cache", FileLimits(max_expansion=2))


def test_blank_lines_cost_no_memory(tmp_path, monkeypatch):
    """Rows with blanks of all kinds between them, cut anywhere into what is read at a time."""
    monkeypatch.setattr("ivl.data.row_files.row_file._CHUNK", 64)
    draw = random.Random(0)
    for _ in range(200):
        parts = [
            draw.choice(["", " ", "\r", "\t\x0b", "{}", json.dumps(ROWS[1])]) for _ in range(draw.randrange(1, 60))
        ]
        text = "{}\n" + "\n".join(parts) + draw.choice(["", "\n"])
        file = RowFile(written(tmp_path, "a.jsonl", text))
        expected = [(n, row) for n, row in enumerate(text.split("\n"), start=1) if row.strip()]
        assert [(int(where.rsplit(":")[-1]), row) for where, row in load_rows(file.path)] == [
            (n, json.loads(row)) for n, row in expected
        ]
    monkeypatch.undo()
    path = written(tmp_path, "b.jsonl", lines(ROWS[:1]) + "\n" * 10_000_000 + lines(ROWS[1:2]))
    tracemalloc.start()
    file = RowFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(file) == 2 and file.where(1) == f"{path}:10000002"
    assert peak < 80e6, "of what is read at a time; the places of all newlines are 80 MB, and were kept several times"


def test_a_string_without_an_end_is_scanned_once(tmp_path):
    """Each of its quotes was tried as the beginning of another string."""

    def seconds(count):
        path = written(tmp_path, "a.json", '[{"query": "' + '\\"' * count)
        start = time.process_time()
        with pytest.raises(UserError, match="no end"):
            RowFile(path)
        return time.process_time() - start

    assert min(seconds(40_000) for _ in range(2)) < 8 * min(seconds(10_000) for _ in range(3)) + 0.05


def test_the_table_of_a_large_file_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    """Also where a change keeps the size and sets the time of the content back."""
    monkeypatch.setattr(row_table, "LARGE", 100)
    cache, path = tmp_path / "cache", written(tmp_path, "a.jsonl", "\n" + lines())
    scans = []
    real = row_file._scan_lines
    monkeypatch.setattr(row_file, "_scan_lines", lambda *given: (scans.append(1), real(*given))[1])

    def opened():
        file = RowFile(path, cache)
        assert [file[i] for i in range(20)] == ROWS and file.where(3).endswith(":5")
        return file

    opened()
    assert not cache.exists(), "a file that has just been written may be written again within the clock's tick"
    monkeypatch.setattr(row_table, "_SETTLED", -1.0)
    first, second = opened(), opened()
    assert len(scans) == 2 and second.digest == first.digest and isinstance(second._starts, np.memmap)
    assert len(pickle.dumps(second)) < 3000 and pickle.loads(pickle.dumps(second))[7] == ROWS[7]
    stat = path.stat()
    text = path.read_text()
    path.write_text(text.replace("q7 ", "Q7 "))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert RowFile(path, cache)[7]["query"].startswith("Q7") and len(scans) == 3
    path.write_text(text)
    opened()
    for file in cache.rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:150])
    opened()
    assert len(scans) == 5
