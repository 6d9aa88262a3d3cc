"""A small local server that speaks the file APIs of both hubs, and can misbehave on request.

Hugging Face's takes uploads too: a repository is made, large files are stored, and a commit changes its files.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors"  # kept in large-file storage, whose record is a sha256


@dataclass
class Hub:
    """One repository. `files`: what the hub's record says; `sent`: what is sent instead of it."""

    repo: str
    files: dict[str, bytes]
    sent: dict[str, bytes] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """For each download of a file in turn: after how many bytes the connection breaks"""
    token: str | None = None
    """Without it the repository does not exist"""
    kind: str | None = None
    """models or datasets; None: both"""
    gated: bool = False
    whole: bool = False
    """Send whole files, whatever range is asked for"""
    storage: str | None = None
    """Another server that files are redirected to"""
    listed: list[dict] = field(default_factory=list)
    """More entries of the ModelScope listing"""
    log: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path with query, headers of every request"""
    url: str = ""
    exists: bool = True
    """False: the repository is to be created first"""
    private: bool = False
    card: dict = field(default_factory=dict)
    """Front matter of the card, as the hub tells it"""
    commits: list[str] = field(default_factory=list)
    """Titles of commits that were made by uploads"""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256"""
    breaks_at_commit: bool = False

    @property
    def commit(self) -> str:
        return COMMIT[: 40 - len(self.commits)] + "f" * len(self.commits)

    def downloads(self, name: str) -> list[dict[str, str]]:
        """Headers of each download of a file."""
        return [h for method, path, h in self.log if method == "GET" and name in unquote(path).replace("?", "/")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        hub: Hub = self.server.hub
        hub.log.append((self.command, self.path, dict(self.headers)))
        self.upload(hub, unquote(urlsplit(self.path).path), self.body())

    def do_PUT(self):
        hub: Hub = self.server.hub
        hub.log.append((self.command, self.path, dict(self.headers)))
        hub.stored[self.path.rpartition("/")[2]] = self.body()
        self.send(200, b"", {})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def upload(self, hub: Hub, path: str, body: bytes):
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.json({"error": "not allowed"}, 403)
        if path == "/api/repos/create":
            asked = json.loads(body)
            if hub.exists:
                return self.json({"error": "exists"}, 409)
            hub.exists, hub.private = True, asked.get("visibility") == "private" or bool(asked.get("private"))
            hub.repo, hub.files = f"{asked['organization']}/{asked['name']}", {".gitattributes": b"*.bin lfs"}
            return self.json({"url": f"{hub.url}/{hub.repo}"})
        if path.endswith("/preupload/main"):
            modes = {True: "lfs", False: "regular"}
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": n, "uploadMode": modes[n.endswith(LARGE)], "shouldIgnore": False} for n in names]
            return self.json({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            wanted = [
                o | {"actions": {"upload": {"href": f"{hub.url}/storage/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.json({"transfer": "basic", "objects": wanted})
        assert path.endswith("/commit/main"), path
        if hub.breaks_at_commit:
            return self.json({"error": "the disks are full"}, 507)
        return self.commit(hub, [json.loads(line) for line in body.splitlines()])

    def commit(self, hub: Hub, lines: list[dict]):
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, hub.commit):
            return self.json({"error": "the branch has moved"}, 412)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del hub.files[value["path"]]
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.stored[value["oid"]]
            else:
                hub.files[value["path"]] = base64.b64decode(value["content"])
        hub.commits.append(header["summary"])
        return self.json(
            {"commitUrl": f"{hub.url}/{hub.repo}/commit/{hub.commit}", "commitOid": hub.commit, "pullRequestUrl": ""}
        )

    def answer(self):
        hub: Hub = self.server.hub
        hub.log.append((self.command, self.path, dict(self.headers)))
        url = urlsplit(self.path)
        path, query = unquote(url.path), {k: v[0] for k, v in parse_qs(url.query).items()}
        if path.startswith("/storage/"):
            return self.file(hub, path.rpartition("/")[2])
        if path.startswith(f"/api/v1/datasets/{hub.repo}/repo/tree") and hub.kind == "datasets":
            return self.json({"Code": 200, "Data": {"Files": []}})
        if path.startswith("/api/v1/datasets/"):
            return self.json({"Code": 404, "Message": "no such data set"}, 404)
        if path.startswith("/api/v1/models/"):
            return self.modelscope(hub, path.removeprefix("/api/v1/models/"), query)
        return self.huggingface(hub, path)

    def modelscope(self, hub: Hub, path: str, query: dict[str, str]):
        repo = path.partition("/repo")[0]
        allowed = hub.token is None or f"m_session_id={hub.token}" == self.headers.get("Cookie")
        if repo != hub.repo or not allowed or hub.kind == "datasets":
            return self.json({"Code": 10010205001, "Message": f"the request model: {repo} does not exist"}, 404)
        if query.get("Revision") not in ("master", "v2"):
            return self.json({"Code": 10010205001, "Message": "no such revision"}, 404)
        if path.endswith("/repo/files"):
            files = [
                {"Path": n, "Name": n, "Type": "blob", "Size": len(b), "Sha256": hashlib.sha256(b).hexdigest()}
                for n, b in hub.files.items()
            ]
            return self.json({"Code": 200, "Data": {"Files": files + hub.listed}})
        name = query["FilePath"]
        if hub.storage:
            return self.send(302, b"", {"Location": f"{hub.storage}/storage/{name}"})
        return self.file(hub, name)

    def huggingface(self, hub: Hub, path: str):
        allowed = hub.token is None or self.headers.get("Authorization") == f"Bearer {hub.token}"
        kind = "datasets" if path.removeprefix("/api").startswith("/datasets/") else "models"
        if hub.repo not in path or not allowed or not hub.exists or hub.kind not in (None, kind):
            return self.json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if hub.gated:
            return self.json({"error": "restricted"}, 403, {"X-Error-Code": "GatedRepo"})
        rest = path.partition(hub.repo)[2]
        if rest == f"/revision/{hub.commit}":
            rest = "/revision/main"
        if rest.startswith("/revision/") and rest != "/revision/main":
            return self.json({"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if rest in ("", "/revision/main"):
            info = {"id": hub.repo, "sha": hub.commit, "private": hub.private, "cardData": hub.card}
            return self.json(info | {"siblings": [self.sibling(n, b) for n, b in hub.files.items()]})
        if rest.startswith("/tree/"):
            return self.json([self.entry(n, b) for n, b in hub.files.items()])
        name = rest.removeprefix(f"/resolve/{COMMIT}/").removeprefix("/resolve/main/")
        if name not in hub.files:
            return self.json({"error": "no file"}, 404, {"X-Error-Code": "EntryNotFound"})
        return self.file(hub, name, {"ETag": f'"{etag(name, hub.files[name])}"', "X-Repo-Commit": COMMIT})

    @staticmethod
    def sibling(name: str, content: bytes) -> dict:
        about = {"rfilename": name, "blobId": git_hash(content), "size": len(content)}
        if name.endswith(LARGE):
            about["lfs"] = {"sha256": etag(name, content), "size": len(content), "pointerSize": 100}
        return about

    @staticmethod
    def entry(name: str, content: bytes) -> dict:
        found = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
        if name.endswith(LARGE):
            found["lfs"] = {"oid": etag(name, content), "size": len(content), "pointerSize": 100}
        return found

    def file(self, hub: Hub, name: str, headers: dict[str, str] | None = None):
        content = hub.sent.get(name, hub.files[name])
        status, start, headers = 200, 0, dict(headers or {})
        if not hub.whole and (found := self.headers.get("Range")):
            start, status = int(found.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cuts = hub.cuts.get(name)
        self.send(status, content[start:], headers, cuts.pop(0) if cuts and self.command == "GET" else None)

    def json(self, value: object, status: int = 200, headers: dict[str, str] | None = None):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_hash(content)


@contextmanager
def serve(hub: Hub):
    """Serve a repository on a port of this machine; sets `hub.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
