"""Downloads against a local server that misbehaves in every way; nothing leaves this machine."""

import base64
import contextlib
import io
import ipaddress
import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool
from typing import ClassVar

import pytest
import torch
from PIL import Image

from ivl.data.media.download import cached_path, fetch
from ivl.data.media.load import image_size, load_image, load_video
from ivl.data.processor import Processor
from ivl.options import FetchPolicy, MediaPolicy, Sampling, VideoOptions
from ivl.types import UserError
from tests.tiny import write_checkpoint

out = io.BytesIO()
Image.new("RGB", (30, 20), (250, 0, 0)).save(out, "PNG")
PNG = out.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hits: ClassVar[dict[str, int]] = {}

    def do_GET(self):
        name = self.path.strip("/").split("?")[0]
        self.hits[name] = self.hits.get(name, 0) + 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, f"do_{name}", self.do_missing)()
        self.close_connection = True

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for key, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_missing(self):
        self.answer(404, b"<html>no</html>")

    def do_good(self):
        self.answer(200, PNG)

    def do_chunked(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in (PNG[:40], PNG[40:], b""):
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")

    def do_html(self):
        self.answer(200, b"<!DOCTYPE html>please log in")

    def do_empty(self):
        self.answer(200, b"")

    def do_gzipped(self):
        self.answer(200, PNG, Content_Encoding="gzip")

    def do_large(self):
        self.answer(200, b"", Content_Length="99999999999")

    def do_endless(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(10_000):
            self.wfile.write(bytes(10_000))

    def do_cut(self):
        self.answer(200, PNG[:50], Content_Length=str(len(PNG)))

    def do_silent(self):
        time.sleep(3)

    def do_trickle(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def do_trickling_header(self):
        for _ in range(100):
            self.wfile.write(b"H")
            time.sleep(0.05)

    def do_garbage(self):
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")

    def do_busy(self):
        if self.hits["busy"] < 2:
            self.answer(503, b"later", Retry_After="0")
        else:
            self.do_good()

    def do_broken(self):
        self.answer(500)

    def do_redirect(self):
        self.answer(302, Location="/good")

    def do_relative(self):
        self.answer(307, Location="redirect")

    def do_loop(self):
        self.answer(302, Location="/loop")

    def do_file(self):
        self.answer(302, Location="file:///etc/passwd")

    def do_elsewhere(self):
        self.answer(302, Location="http://10.255.255.1/a.png")

    def do_endless_redirect(self):
        self.answer(302, b"", Location="/good", Content_Length="99999999999")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.daemon_threads = True
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    Handler.hits.clear()


@pytest.fixture
def policy(tmp_path):
    return FetchPolicy(
        timeout=0.5,
        total_timeout=1,
        max_bytes=100_000,
        retries=1,
        backoff=0.01,
        allow_private=True,
        cache_dir=str(tmp_path),
    )


@pytest.mark.parametrize("name", ["good", "chunked", "redirect", "relative", "endless_redirect", "good?size=1&b=é ü"])
def test_what_is_fetched_once_is_kept(server, policy, name):
    url = f"{server}/{name}"
    path = fetch(url, policy)
    assert path.read_bytes() == PNG and path == cached_path(url, policy)
    hits = dict(Handler.hits)
    assert fetch(url, policy) == path and Handler.hits == hits
    path.unlink()
    fetch(url, policy)
    assert Handler.hits != hits


@pytest.mark.parametrize(
    ("name", "words", "attempts"),
    [
        ("missing", "404 Not Found; check the address", 1),
        ("empty", "0 bytes", 1),
        ("gzipped", "Content-Encoding gzip", 1),
        ("large", "above the limit of 100000", 1),
        ("endless", "more bytes than the limit", 1),
        ("loop", "more than 5 redirects", 6),
        ("file", r"only http and https are fetched \(redirected to file:///etc/passwd\)", 1),
        ("cut", r"no whole answer .*received 50 bytes, expected \d+.*, 2 times", 2),
        ("silent", "no whole answer .timed out., 2 times", 2),
        ("trickle", "not complete after 1 seconds, 2 times", 2),
        ("trickling_header", "not complete after 1 seconds, 2 times", 2),
        ("garbage", "no whole answer", 2),
        ("broken", "500 Internal Server Error, 2 times", 2),
    ],
)
def test_faults_are_named_and_nothing_is_kept(server, policy, tmp_path, name, words, attempts):
    began = time.monotonic()
    with pytest.raises(UserError, match=words) as caught:
        fetch(f"{server}/{name}", policy)
    assert str(caught.value).startswith(f"{server}/{name}: ")
    assert Handler.hits[name] == attempts and time.monotonic() - began < 8
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_busy_server_is_asked_again(server, policy):
    assert fetch(f"{server}/busy", policy).read_bytes() == PNG
    assert Handler.hits["busy"] == 2


def test_private_addresses_are_refused(server, policy):
    closed = replace(policy, allow_private=False)
    port = server.rsplit(":", 1)[1]
    hosts = [
        "127.0.0.1",
        "localhost",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "10.1.2.3",
        "192.168.0.1",
        "2130706433",
    ]
    for host in [*hosts, "169.254.169.254", "[fe80::1]", "224.0.0.1"]:
        with pytest.raises(UserError, match="not public"):
            fetch(f"http://{host}:{port}/good", closed)
    assert not Handler.hits


def test_redirects_are_checked_again(server, policy, monkeypatch):
    """The first host counts as public here; the one it redirects to does not."""
    seen = []
    real = ipaddress.ip_address

    class Public:
        is_global, is_multicast = True, False

    def ip_address(text):
        seen.append(text)
        return Public() if text == "127.0.0.1" else real(text)

    monkeypatch.setattr(ipaddress, "ip_address", ip_address)
    with pytest.raises(UserError, match=r"10\.255\.255\.1 is not public"):
        fetch(f"{server}/elsewhere", replace(policy, allow_private=False))
    assert seen == ["127.0.0.1", "10.255.255.1"]


def test_what_is_no_url(policy):
    for url, words in (
        ("file:///etc/passwd", "only http and https"),
        ("ftp://example.org/a", "only http and https"),
        ("http://", "not a valid URL"),
        ("http:///a.png", "not a valid URL"),
        ("http://[::1/a", "not a valid URL"),
        ("http://host:port/a", "not a valid URL"),
        ("http://bücher.example/a", "not a valid URL"),
        ("http://user:secret@example.org/a", "a user name in a URL"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            fetch(url, policy)
        assert "secret" not in str(caught.value)


def test_an_unreachable_host(policy):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="Connection refused"):
        fetch(f"http://127.0.0.1:{port}/a", policy)


def test_a_proxy_is_asked_for_the_whole_url(policy, monkeypatch):
    class Proxy(Handler):
        def do_GET(self):
            self.answer(200, self.path.encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{made.server_port}")
        url = "http://only-the-proxy-knows.invalid/a%20b.png?c=d"
        assert fetch(url, policy).read_text() == url
        with pytest.raises(UserError, match="not public"):
            fetch("http://127.0.0.1:1/a.png", replace(policy, allow_private=False))
        made.shutdown()


def test_many_at_once(server, policy):
    with ThreadPool(8) as pool:
        paths = pool.map(lambda n: fetch(f"{server}/good?{n % 3}", policy), range(24))
    assert len(set(paths)) == 3 and all(path.read_bytes() == PNG for path in paths)


def test_images_and_videos_by_url(server, policy, tmp_path):
    media = MediaPolicy(fetch=policy)
    assert image_size(f"{server}/good", policy=media) == (30, 20)
    assert load_image(f"{server}/good", policy=media).getpixel((0, 0)) == (250, 0, 0)
    for load in (load_image, image_size):
        with pytest.raises(UserError, match="found text that begins with '<!DOCTYPE html>please"):
            load(f"{server}/html", policy=media)
    assert Handler.hits == {"good": 1, "html": 2}, "what is no image is not kept"
    with pytest.raises(UserError, match=r"expected a video .*, found text"):
        load_video(f"{server}/html", policy=media)
    assert len(load_video(f"{server}/good", Sampling(1), policy=media)) == 1


def test_rows_name_their_media_in_every_way(server, policy, tmp_path):
    """The same picture and the same clip, however a row names them: equal examples, equal lengths before pixels."""
    folder = write_checkpoint(tmp_path / "model")
    processor = Processor.from_pretrained(
        folder, max_tiles=4, policy=MediaPolicy(fetch=policy), video=VideoOptions(num_segments=2)
    )
    (tmp_path / "good.png").write_bytes(PNG)
    frames = [Image.new("RGB", (20, 10), (n * 40, 0, 0)) for n in range(6)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=500)
    (tmp_path / "clip").mkdir()
    for n, frame in enumerate(frames):
        frame.save(tmp_path / "clip" / f"{n}.png")
    uri = "data:image/png;base64," + base64.b64encode(PNG).decode()
    said = {"role": "assistant", "content": "R"}

    def parts(*before):
        return {"messages": [{"role": "user", "content": [*before, {"type": "text", "text": "Q"}]}, said]}

    pictures = ["good.png", f"{server}/good", uri, PNG, Image.open(io.BytesIO(PNG))]
    rows = [{"query": "<image>\nQ", "response": "R", "images": [picture]} for picture in pictures]
    rows += [{"query": f"<img>{name}</img>\nQ", "response": "R"} for name in ("good.png", f"{server}/good")]
    rows += [parts({"type": "image_url", "image_url": {"url": url}}) for url in (uri, f"{server}/good")]
    clips = [{"query": "<video>\nQ", "response": "R", "videos": [source]} for source in ("clip.gif", "clip")]
    clips += [parts({"type": "video", "video": "clip.gif"}), {"query": "Q", "response": "R", "videos": "clip.gif"}]
    cut = [row | {"start": 1.0, "end": 2.0} for row in clips[:1]]
    cut += [{"query": "Q", "response": "R", "videos": [{"path": "clip.gif", "start": 1.0, "end": 2.0}]}]
    for same in (rows, clips, cut):
        made = [processor(row, f"f:{n}", tmp_path) for n, row in enumerate(same)]
        for row, example in zip(same, made):
            assert example.input_ids.tolist() == made[0].input_ids.tolist(), row
            assert torch.equal(example.tiles, made[0].tiles), row
            assert processor.lengths(row, "f:1", tmp_path)[:2] == (len(example), len(example.tiles))
    assert not torch.equal(processor(clips[0], "", tmp_path).tiles, processor(cut[0], "", tmp_path).tiles)
