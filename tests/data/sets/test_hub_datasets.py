"""Data sets known by name, from a small hub on this machine: its layouts, its faults, and what is kept."""

import hashlib
import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from PIL import Image

from ivl.data.sets import hub_datasets as named
from ivl.data.sets.dataset import RowDataset
from ivl.data.sets.sources import open_sources
from ivl.options import FetchPolicy
from ivl.types import Conversation, Message, UserError


def jpeg(colour="red"):
    out = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(out, "JPEG")
    return out.getvalue()


def zipped(**files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return out.getvalue()


class Handler(BaseHTTPRequestHandler):
    """The file APIs of both hubs' data sets. `server.files`: repository → path → content; `server.sent`: requests."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        path, query = unquote(url.path), {k: v[0] for k, v in parse_qs(url.query).items()}
        self.server.sent.append(query.get("FilePath", path))
        for repo, files in self.server.files.items():
            found = None
            if path == f"/api/v1/datasets/{repo}/repo/tree":
                start = (int(query["PageNumber"]) - 1) * int(query["PageSize"])
                listed = [
                    {"Path": name, "Type": "blob", "Size": len(body), "Sha256": self.digest(body)}
                    for name, body in files.items()
                ] + [{"Path": "folder", "Type": "tree"}]
                page = listed[start : start + int(query["PageSize"])]
                found = json.dumps({"Code": 200, "Data": {"Files": page}}).encode()
            elif path == f"/api/v1/datasets/{repo}/repo":
                found = files.get(query["FilePath"])
            elif path == f"/api/datasets/{repo}/tree/main":
                listed = [
                    {"type": "file", "path": name, "size": len(body), "lfs": {"oid": self.digest(body)}}
                    for name, body in files.items()
                ]
                found = json.dumps(listed).encode()
            elif path.startswith(f"/datasets/{repo}/resolve/main/"):
                found = files.get(path.partition("/resolve/main/")[2])
            if found is not None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(found)))
                self.end_headers()
                self.wfile.write(self.server.spoilt.get(query.get("FilePath"), found))
                return
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    @staticmethod
    def digest(body):
        return hashlib.sha256(body).hexdigest()


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.sent, server.spoilt = {}, [], {}
    url = f"http://127.0.0.1:{server.server_port}"
    for name in ("HF_ENDPOINT", "MODELSCOPE_DOMAIN"):
        monkeypatch.setenv(name, url)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


COCO = "modelscope/coco_2014_caption"
POLICY = FetchPolicy(timeout=5.0, retries=0)


def coco_files(**change):
    """As ModelScope lays out a data set of its own: subset → split → table and archive."""
    table = 'image_id,image:FILE,caption\n1,COCO_val2014_1.jpg,A cat.&&One cat.\n2,COCO_val2014_2.jpg,"Two, dogs"\n'
    splits = {"validation": {"meta": "val.csv", "file": "val.zip"}, "train": {"meta": "train.csv", "file": "x.zip"}}
    return {
        "README.md": b"# COCO",
        "coco_2014_caption.json": json.dumps({"coco_2014_caption": splits}).encode(),
        "val.csv": table.encode(),
        "val.zip": zipped(**{"val2014__COCO_val2014_1.jpg": jpeg(), "val2014__COCO_val2014_2.jpg": jpeg("blue")}),
    } | change


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_coco_en_2_mini(hub, tmp_path):
    hub.files[COCO] = coco_files()
    path = named.fetch_rows("coco-en-2-mini", tmp_path, POLICY)
    query = "please describe the image."
    assert rows_of(path) == [
        {"query": query, "response": "A cat.", "images": ["media/val2014/COCO_val2014_1.jpg"]},
        {"query": query, "response": "Two, dogs", "images": ["media/val2014/COCO_val2014_2.jpg"]},
    ]
    assert all((path.parent / row["images"][0]).is_file() for row in rows_of(path))
    assert "README.md" not in hub.sent and "train.csv" not in hub.sent
    asked = len(hub.sent)
    assert named.fetch_rows("coco-en-2-mini", tmp_path, POLICY) == path and len(hub.sent) == asked
    left = {entry.name for entry in (tmp_path / "named").iterdir() if not entry.name.endswith(".lock")}
    assert left == {path.parent.name}, "downloads and half-made folders are gone"


def test_a_listing_of_many_pages(hub, tmp_path):
    many = {f"a/{n}.txt": b"x" for n in range(named._PAGE + 3)}
    hub.files[COCO] = many | coco_files()
    assert len(rows_of(named.fetch_rows("coco-en-2-mini", tmp_path, POLICY))) == 2


def test_a_failed_download_goes_on_where_it_stopped(hub, tmp_path):
    hub.files[COCO] = coco_files()
    hub.spoilt["val.csv"] = b"x" * len(coco_files()["val.csv"])
    with pytest.raises(UserError, match=r"val\.csv does not match the hub's checksum"):
        named.fetch_rows("coco-en-2-mini", tmp_path, POLICY)
    assert not [entry for entry in (tmp_path / "named").iterdir() if ".part" in entry.name]
    hub.spoilt.clear()
    assert len(rows_of(named.fetch_rows("coco-en-2-mini", tmp_path, POLICY))) == 2
    assert hub.sent.count("val.zip") == 1 and hub.sent.count("val.csv") == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coco_2014_caption.json": b"{}"}, "has no validation; it has README.md"),
        (
            {"val.csv": b"image_id,words\n1,x\n"},
            r"val\.csv:1: expected the field 'caption', found \['image_id', 'words'\]",
        ),
        ({"val.zip": zipped(**{"..__evil.jpg": jpeg()})}, "a path outside of it"),
        ({"val.zip": b"PK not a zip"}, "cannot be unpacked"),
        ({"val.zip": zipped(**{"other.jpg": jpeg()})}, r"COCO_val2014_1\.jpg is in none of the archives"),
        ({"val.csv": b"image:FILE,caption\n../../x.jpg,a\n"}, "expected a picture or its path"),
    ],
)
def test_a_repository_that_is_not_what_the_table_says(hub, tmp_path, change, words):
    hub.files[COCO] = coco_files(**change)
    with pytest.raises(UserError, match=words):
        named.fetch_rows("coco-en-2-mini", tmp_path, POLICY)
    assert not list(tmp_path.rglob("rows.jsonl")) and not list(tmp_path.parent.glob("evil.jpg"))


def test_no_such_repository(hub, tmp_path):
    with pytest.raises(UserError, match="404"):
        named.fetch_rows("coco-en-2-mini", tmp_path, POLICY)


def test_huggingface_rows_with_an_archive_and_with_urls(hub, tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    record = {"id": "7", "image": "a b.jpg", "conversations": turns, "width": 8}
    hub.files["OpenGVLab/ShareGPT-4o"] = {
        "image_conversations/gpt-4o.jsonl": json.dumps(record).encode(),
        "images.zip": zipped(**{"mnt__image__a b.jpg": jpeg()}),
    }
    path = named.fetch_rows("sharegpt-4o-image", tmp_path, POLICY)
    assert rows_of(path) == [{"id": "7", "conversations": turns, "image": ["media/mnt/image/a b.jpg"]}]
    hub.files["liuhaotian/LLaVA-Instruct-150K"] = {"llava_instruct_150k.json": json.dumps([record]).encode()}
    (row,) = rows_of(named.fetch_rows("llava-instruct-150k", tmp_path, POLICY))
    assert row["image"] == ["http://images.cocodataset.org/train2017/a b.jpg"]


def test_parquet_with_pictures_inside(hub, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is missing: tables as parquet")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = {}
    for n, split in enumerate(("train", "validation", "test")):
        out = io.BytesIO()
        record = {"image": {"bytes": jpeg(), "path": None}, "text": f"x^{n}"}
        parquet.write_table(pyarrow.Table.from_pylist([record]), out)
        files[f"full/{split}-00000-of-00001.parquet"] = out.getvalue()
    hub.files["linxy/LaTeX_OCR"] = files | {"small/test-00000-of-00001.parquet": b"x"}
    path = named.fetch_rows("latex-ocr-print", tmp_path, POLICY)
    assert [row["response"] for row in rows_of(path)] == ["x^1", "x^2"]
    assert (path.parent / rows_of(path)[1]["images"][0]).read_bytes() == jpeg()


class Stub:
    def parse(self, row, where="", root=None):
        turns = (Message("user", (row["query"],)), Message("assistant", (row["response"],)))
        return Conversation(turns, where=where, id=str(root), source=row.get("source", ""))


def test_a_name_where_a_file_is_accepted(hub, tmp_path, monkeypatch):
    hub.files[COCO] = coco_files()
    options = {"root": "elsewhere", "cache_dir": tmp_path}
    (part,) = open_sources("coco-en-2-mini", Stub(), **options)
    assert part.name == "coco-en-2-mini" and len(part.rows) == 2
    assert part.rows.conversation(0).id == str(part.rows.files[0].path.parent), "its media lie beside its rows"
    (part,) = open_sources(["coco-en-2-mini#1"], Stub(), **options)
    (again,) = open_sources(["coco-en-2-mini#1"], Stub(), **options)
    assert len(part.rows) == 1 and part.rows.where(0) == again.rows.where(0)
    with pytest.raises(UserError, match="asked for 3 rows of 2"):
        open_sources("coco-en-2-mini#3", Stub(), **options)
    with pytest.raises(UserError, match=r"coco-en-3: neither a file nor a data set known by name; .*coco-en-2-mini"):
        open_sources("coco-en-3", Stub(), **options)
    monkeypatch.chdir(tmp_path)  # a file of that name is the file
    (tmp_path / "coco-en-2-mini").write_text('{"query": "q", "response": "r"}')
    (part,) = open_sources("coco-en-2-mini", Stub(), **options)
    assert isinstance(part.rows, RowDataset) and len(part.rows) == 1
