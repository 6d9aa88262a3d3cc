"""Rows and media in object stores, by fsspec's file system in memory, which stands for a store."""

import io
import json
import time

import fsspec
import numpy as np
import pytest
from PIL import Image

from ivl.__main__ import main
from ivl.data import object_store
from ivl.data.index.index_build import build_index
from ivl.data.media.load import load_image
from ivl.data.object_store import fetch_object, fetch_rows, is_object
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.data.sets.holdout import open_split, save_split
from ivl.data.sets.sources import open_sources, row_files
from ivl.options import FetchPolicy, MediaPolicy
from ivl.types import UserError
from tests.tiny import write_checkpoint


@pytest.fixture
def store():
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def png(level=9, size=(40, 30)):
    out = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(out, "PNG")
    return out.getvalue()


def jsonl(*queries, **keys):
    return "".join(json.dumps({"query": q, "response": "r"} | keys) + "\n" for q in queries).encode()


def test_rows_are_fetched_once_and_again_where_the_object_changed(store, capsys):
    store.pipe("/b/a.jsonl", jsonl("one", "two"))
    url = "memory://b/a.jsonl"
    copy = fetch_rows(url)
    assert copy.read_bytes() == jsonl("one", "two") and f"note: {url}: " in capsys.readouterr().err
    assert fetch_rows(url) == copy and not capsys.readouterr().err
    store.pipe("/b/a.jsonl", jsonl("three"))
    assert fetch_rows(url).read_bytes() == jsonl("three")


def test_the_last_copy_is_used_where_the_store_is_silent(store, monkeypatch, capsys):
    store.pipe("/b/a.jsonl", jsonl("one"))
    copy = fetch_rows("memory://b/a.jsonl")
    monkeypatch.setattr(object_store, "_filesystem", Broken(OSError("down")))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    capsys.readouterr()
    assert fetch_rows("memory://b/a.jsonl") == copy
    assert "going on with the copy in the cache" in capsys.readouterr().err
    with pytest.raises(UserError, match="the store cannot be read \\(OSError\\)"):
        fetch_rows("memory://b/other.jsonl")


class Broken:
    """File system of which every call fails with one error, or hangs."""

    def __init__(self, error=None, seconds=0):
        self.error, self.seconds = error, seconds

    def __call__(self, scheme):
        return self

    def info(self, path):
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        return {"size": 10}

    def open(self, path, mode, **options):
        return io.BytesIO(b"x" * 10)


def test_rows_and_their_media_are_those_of_local_files(store, processor, tmp_path):
    rows = jsonl("<image>What?", images=["pictures/1.png"]) + jsonl("Why?")
    store.pipe("/b/rows/a.jsonl", rows)
    store.pipe("/b/rows/pictures/1.png", png())
    (tmp_path / "pictures").mkdir()
    (tmp_path / "a.jsonl").write_bytes(rows)
    (tmp_path / "pictures/1.png").write_bytes(png())
    remote, local = (RowDataset(path, processor) for path in ("memory://b/rows/a.jsonl", tmp_path / "a.jsonl"))
    assert remote.where(1) == "memory://b/rows/a.jsonl:2"
    for a, b in zip(remote, local):
        assert a.input_ids.tolist() == b.input_ids.tolist() and a.tiles.equal(b.tiles)
    assert remote[0].conversation.media[0].source == "memory://b/rows/pictures/1.png"
    index = build_index(remote, workers=0)
    assert index.records["exact"].tolist() == [False, True]  # as media behind URLs
    exact = build_index(remote, workers=0, probe_urls=True)
    assert exact.tokens.tolist() == build_index(local, workers=0).tokens.tolist()
    rooted = RowDataset(tmp_path / "a.jsonl", processor, root="memory://b/rows")
    assert rooted[0].tiles.equal(local[0].tiles)


def test_patterns_folders_and_counts(store, processor):
    for name in ("a.jsonl", "b.jsonl", "notes.txt"):
        store.pipe(f"/b/rows/{name}", jsonl("one", "two"))
    expected = ["memory://b/rows/a.jsonl", "memory://b/rows/b.jsonl"]
    assert row_files("memory://b/rows/*.jsonl") == row_files("memory://b/rows") == expected
    (part,) = open_sources("memory://b/rows/*.jsonl#3", processor)
    assert len(part.rows) == 3
    with pytest.raises(UserError, match="no files of rows there"):
        row_files("memory://b/other/*.jsonl")


def test_a_table(store, processor, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    row = {"query": "<image>q", "response": "r", "images": [{"bytes": png()}]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a")
    store.pipe("/b/a.parquet", (tmp_path / "a").read_bytes())
    rows = RowDataset("memory://b/a.parquet", processor)
    assert rows[0].num_tiles > 0 and rows.where(0) == "memory://b/a.parquet:1"


def test_held_out_rows_are_found_again(store, processor, tmp_path):
    store.pipe("/b/a.jsonl", jsonl("one", "two", "three"))
    rows = RowDataset("memory://b/a.jsonl", processor, root="memory://b")
    save_split(tmp_path / "split.json", rows.select(np.array([1])))
    assert json.loads((tmp_path / "split.json").read_text())["files"] == ["memory://b/a.jsonl"]
    held = open_split(tmp_path / "split.json", processor)
    assert len(held) == 1 and held.row(0)["query"] == "two" and held.root == "memory://b"


def test_check_names_rows_by_their_address(store, tmp_path, processor, capsys):
    store.pipe("/b/a.jsonl", jsonl("fine") + jsonl("<image>What?"))
    folder = write_checkpoint(tmp_path / "model")
    argv = [f"--model.pretrained={folder}", "--data.train=memory://b/a.jsonl", "--workers=0", f"--out={tmp_path / 'o'}"]
    assert main(["check", *argv]) == 2
    assert "memory://b/a.jsonl:2: 1 <image> mark but 0 images" in capsys.readouterr().out


def test_a_problem_of_a_file_names_its_address(store, processor):
    store.pipe("/b/a.jsonl", b"nonsense")
    with pytest.raises(UserError, match=r"^memory://b/a\.jsonl:1: expected JSON objects"):
        RowDataset("memory://b/a.jsonl", processor)
    with pytest.raises(UserError, match=r"^memory://b/none\.jsonl: no such object in the store; check the address"):
        RowDataset("memory://b/none.jsonl", processor)


# -- limits ----------------------------------------------------------------------------------------------------------


def test_bytes_and_pixels_are_bounded(store):
    store.pipe("/b/1.png", png())
    with pytest.raises(UserError, match=r"above the limit of 10 \(max_bytes\)"):
        fetch_object("memory://b/1.png", FetchPolicy(max_bytes=10))
    with pytest.raises(UserError, match="max_pixels"):
        load_image("memory://b/1.png", policy=MediaPolicy(max_pixels=100))
    store.pipe("/b/2.png", b"no picture at all")
    with pytest.raises(UserError, match=r"memory://b/2\.png: expected an image"):
        load_image("memory://b/2.png")
    assert load_image("memory://b/1.png").size == (40, 30)


def test_a_size_that_lies_is_bounded_too(monkeypatch):
    broken = Broken()
    monkeypatch.setattr(object_store, "_filesystem", broken)
    broken.info = lambda path: {"size": 3}
    with pytest.raises(UserError, match="more bytes than the limit of 5"):
        fetch_object("s3://b/1.png", FetchPolicy(max_bytes=5))


def test_a_store_that_hangs_costs_no_run(monkeypatch):
    monkeypatch.setattr(object_store, "_filesystem", Broken(seconds=3))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"the store was silent for 0\.2 seconds"):
        fetch_object("s3://b/1.png", FetchPolicy(timeout=0.2, retries=1, backoff=0.0))
    with pytest.raises(UserError, match=r"not complete after 0\.1 seconds"):
        fetch_object("s3://b/2.png", FetchPolicy(total_timeout=0.1, retries=0))
    assert time.monotonic() - start < 2.5


def test_a_half_fetched_object_is_none(store, monkeypatch, cache):
    class Torn(io.BytesIO):
        def read(self, size=-1):
            if self.tell():
                raise OSError("connection reset, key=SECRET")
            return super().read(5)

    broken = Broken()
    broken.open = lambda path, mode, **options: Torn(b"x" * 10)
    monkeypatch.setattr(object_store, "_filesystem", broken)
    with pytest.raises(UserError, match="cannot be read"):
        fetch_object("s3://b/1.png", FetchPolicy(retries=0))
    assert not [path for path in (cache / "ivl/media").rglob("*") if path.is_file()]


# -- credentials, packages, other schemes ----------------------------------------------------------------------------


class NoCredentialsError(Exception):
    """As botocore names it."""


@pytest.mark.parametrize(
    "error",
    [NoCredentialsError("key=SECRET"), PermissionError("SECRET"), ValueError("https://x/?X-Amz-Signature=SECRET")],
)
def test_credentials_are_in_no_message(monkeypatch, error):
    monkeypatch.setattr(object_store, "_filesystem", Broken(error))
    with pytest.raises(UserError) as raised:
        fetch_object("s3://b/1.png", FetchPolicy(retries=0))
    assert "SECRET" not in str(raised.value) and type(error).__name__ in str(raised.value)
    assert raised.value.__cause__ is None and raised.value.__suppress_context__
    with pytest.raises(UserError, match="a user name in an address is not sent") as raised:
        fetch_object("s3://KEY:SECRET@b/1.png", FetchPolicy())
    assert "SECRET" not in str(raised.value)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("oss", "ossfs")])
def test_a_missing_package_is_named_with_the_command(monkeypatch, scheme, package):
    monkeypatch.setattr(object_store, "_filesystem", Broken(ImportError(f"Install {package}")))
    with pytest.raises(UserError, match=rf"{scheme}://b/a: reading it needs {package}; pip install 'ivl\[stores\]'"):
        fetch_object(f"{scheme}://b/a", FetchPolicy())


def test_only_stores_are_opened():
    assert is_object("s3://b/a") and is_object("GS://b/a")
    for name in ("file:///etc/passwd", "ssh://h/a", "s3:/b", "s3://", "https://b/a", "a.jsonl", 3, None):
        assert not is_object(name)
    with pytest.raises(UserError, match="addresses within addresses"):
        fetch_object("s3://b/a::file:///etc/passwd", FetchPolicy())
    with pytest.raises(UserError, match="ssh:// is not opened; expected a local path"):
        load_image("ssh://h/a.png")
