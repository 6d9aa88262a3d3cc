"""Checkpoints of ModelScope, through its file API and in its package's cache.

The API: modelscope/modelscope, modelscope/hub/api.py and file_download.py.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from ivl.errors import UserError
from ivl.hub.files import (
    CHECKPOINT,
    CHUNK,
    CONFIGS,
    UNFINISHED,
    Kind,
    corrupt,
    other_kind,
    refused,
    unreachable,
    wanted,
)
from ivl.storage.files import file_digest


@dataclass(frozen=True)
class _Remote:
    """File of a ModelScope repository."""

    path: str
    size: int
    sha256: str


def endpoint() -> str:
    """Address of ModelScope, or of the server that MODELSCOPE_DOMAIN names."""
    domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    return (domain if "://" in domain else f"https://{domain}").rstrip("/")


def cache() -> Path:
    """Folder in which the hub's own package keeps files."""
    return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope/hub").expanduser()


def _folder(repo_id: str, revision: str | None) -> PurePosixPath:
    # A dot in a name is written so by the modelscope package. Its folders do not tell revisions apart; ours do.
    owner, name = repo_id.split("/")
    return PurePosixPath(owner, name.replace(".", "___") + (f"@{quote(revision, safe='')}" if revision else ""))


def cached(repo_id: str, revision: str | None) -> list[Path]:
    """Folders of this machine that may hold a checkpoint, complete or not."""
    root, name = cache(), _folder(repo_id, revision)
    folders = [root / "models" / name, root / name, root / "hub" / name]
    return [f for f in folders if f.is_dir() and not (f / UNFINISHED).exists()]


def download(
    repo_id: str, revision: str | None, token: str | None, subfolder: str = "", kind: Kind = CHECKPOINT
) -> Path:
    """Bring a checkpoint, or an adapter, into the cache, and compare its files with the hub's record. Raises UserError.

    `subfolder`: folder of the checkpoint in a repository of several. Returns the folder of the repository.
    """
    token = token or os.environ.get("MODELSCOPE_API_TOKEN")
    files = _files(repo_id, revision or "master", token, subfolder, kind)
    folder = cache() / "models" / _folder(repo_id, revision)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / UNFINISHED
    (folder / subfolder).mkdir(exist_ok=True)
    (unfinished / subfolder).mkdir(parents=True, exist_ok=True)
    for file in files:
        _file(repo_id, revision or "master", token, file, folder)
    with suppress(OSError) if kind is CONFIGS else nullcontext():  # the rest may have begun to come before
        if subfolder:
            (unfinished / subfolder).rmdir()
        unfinished.rmdir()
    kind.need_complete(folder / subfolder, repo_id)
    return folder


def _files(repo_id: str, revision: str, token: str | None, subfolder: str, kind: Kind) -> list[_Remote]:
    query = urlencode({"Revision": revision, "Recursive": "False"} | ({"Root": subfolder} if subfolder else {}))
    try:
        with _open(f"{endpoint()}/api/v1/models/{repo_id}/repo/files?{query}", token) as answer:
            body = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code in (400, 401, 403, 404):
            if _is_data_set(repo_id):
                raise other_kind(repo_id, is_data=True) from error
            raise _refused(repo_id, error.code) from error
        raise unreachable(repo_id, "modelscope", error) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise unreachable(repo_id, "modelscope", error) from error
    if body.get("Code") != 200:
        if _is_data_set(repo_id):
            raise other_kind(repo_id, is_data=True)
        raise _refused(repo_id, body.get("Message"))
    inside = f"{subfolder}/" if subfolder else ""
    files = (f for f in body["Data"]["Files"] if f.get("Type") != "tree" and f["Path"].startswith(inside))
    listing = {f["Path"].removeprefix(inside): f for f in files}
    names = wanted(listing, kind.patterns)
    return [_Remote(inside + n, listing[n]["Size"], listing[n].get("Sha256") or "") for n in names]


def _is_data_set(repo_id: str) -> bool:
    query = urlencode({"Revision": "master", "PageNumber": 1, "PageSize": 1})
    try:
        with _open(f"{endpoint()}/api/v1/datasets/{repo_id}/repo/tree?{query}", None) as answer:
            return json.loads(answer.read()).get("Code") == 200
    except (OSError, ValueError, AttributeError, http.client.HTTPException):
        return False


def _file(repo_id: str, revision: str, token: str | None, file: _Remote, folder: Path) -> None:
    """Download one file to `folder`, going on from its partial copy; it takes its place once it is checked."""
    target, part = folder / file.path, folder / UNFINISHED / file.path
    if target.exists():
        if _matches(target, file):
            return
        raise UserError(f"{target}: exists and is not the hub's file; move it away or name its folder instead")
    query = urlencode({"Revision": revision, "FilePath": file.path})
    url = f"{endpoint()}/api/v1/models/{repo_id}/repo?{query}"
    part.touch()
    best, failures, problem = 0, 0, None
    while (size := part.stat().st_size) < file.size:
        failures = 0 if size > best else failures + 1
        best = max(best, size)
        if failures > 5:
            raise unreachable(repo_id, "modelscope", problem or OSError(f"{file.path} broke off at byte {size}"))
        if failures > 1:
            time.sleep(2 ** (failures - 3))
        problem = _fetch(url, token, part, file, repo_id)
    if not _matches(part, file):
        actual = file_digest(part, hashlib.sha256())
        part.unlink()
        raise corrupt(file.path, str(folder), file.sha256 or f"{file.size} bytes", actual)
    os.replace(part, target)


def _matches(path: Path, file: _Remote) -> bool:
    if path.stat().st_size != file.size:
        return False
    return not file.sha256 or file_digest(path, hashlib.sha256()) == file.sha256


def _fetch(url: str, token: str | None, part: Path, file: _Remote, repo_id: str) -> Exception | None:
    """Append to `part` the bytes that it lacks. Returns the error, where another try may help."""
    from tqdm.auto import tqdm

    start = part.stat().st_size
    try:
        with _open(url, token, {"Range": f"bytes={start}-"} if start else {}) as answer:
            resumed = answer.status == 206
            bar = tqdm(
                desc=file.path, total=file.size, initial=start * resumed, unit="B", unit_scale=True, disable=None
            )
            with part.open("ab" if resumed else "wb") as out, bar:
                while chunk := answer.read(CHUNK):
                    out.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            raise _refused(repo_id, error.code) from error
        return error
    except (OSError, http.client.HTTPException) as error:
        return error
    return None


def _open(url: str, token: str | None, headers: dict[str, str] | None = None) -> Any:
    request = Request(url, headers={"User-Agent": "ivl", **(headers or {})})
    if token:
        # The file API redirects to storage on another host, which has no business with the login.
        request.add_unredirected_header("Cookie", f"m_session_id={token}")
    return urlopen(request, timeout=60)


def _refused(repo_id: str, why: object) -> UserError:
    page, tokens = f"{endpoint()}/models/{repo_id}", f"{endpoint()}/my/myaccesstoken"
    return refused(repo_id, "modelscope", why, page, tokens, "MODELSCOPE_API_TOKEN")


def lock(repo_id: str) -> Path:
    """Path of the lock file, held by the one process that downloads."""
    return cache() / ".locks" / (repo_id.replace("/", "--") + ".lock")
