"""A name or a path → a local checkpoint folder: as it is, from a local cache, or downloaded and checked.

Weights are safetensors only; a release's `.py` files are copied so that an export can carry them, and never executed.
Sources: the Hugging Face hub through huggingface_hub, ModelScope through its file API
(modelscope/modelscope, modelscope/hub/api.py and file_download.py).
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import json
import os
import time
import urllib.error
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from ivl.families import MODELS, find_model
from ivl.types import UserError

Hub = Literal["huggingface", "modelscope"]
HUBS: tuple[Hub, ...] = ("huggingface", "modelscope")

WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
"""Files at the top of a release that are needed to load it, and to write it back so that other engines read it"""

UNFINISHED = ".ivl-unfinished"
"""Lies beside a download until every file of it has been checked; a folder with it is not taken from the cache"""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_CHUNK = 1 << 20


@dataclass
class _Choice:
    hub: Hub = "huggingface"
    token: str | None = None


_choice = _Choice()


def choose(hub: str | None = None, token: str | None = None) -> None:
    """Where names are looked up by this process, and with which login; None: as before. Neither is written anywhere.

    Raises UserError for an unknown hub.
    """
    _choice.hub = _checked(hub) or _choice.hub
    _choice.token = token or _choice.token


def _checked(hub: str | None) -> Hub | None:
    if hub is not None and hub not in HUBS:
        raise UserError(f"hub: expected one of {', '.join(HUBS)}, found {hub!r}")
    return hub


def resolve(
    name_or_path: str | Path,
    hub: Hub | None = None,
    token: str | None = None,
    revision: str | None = None,
    offline: bool | None = None,
) -> Path:
    """The local folder of a checkpoint: a folder as it is, else from a hub's local cache, else downloaded.

    `name_or_path`: a folder, a name of `ivl.families` (`internvl2-2b`) or a hub's id (`OpenGVLab/InternVL2-2B`).
    `hub` and `token`: None takes what `choose` was told, else Hugging Face, and HF_TOKEN or the stored login, or
    MODELSCOPE_API_TOKEN. `offline`: None takes HF_HUB_OFFLINE.
    A copy either hub left on this machine serves both, unless a `revision` is asked for. Downloads go to the hub's own
    cache, go on where they broke off (Hugging Face: with the file that broke off) and overwrite nothing.
    HF_ENDPOINT and MODELSCOPE_DOMAIN name other servers.

    Raises UserError where there is no such folder or model, it may not be had, or a file does not match its checksum.
    """
    from filelock import FileLock
    from huggingface_hub.constants import is_offline_mode

    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    hub, token = _checked(hub) or _choice.hub, token or _choice.token
    ids = _ids(str(name_or_path))
    places = [hub] if revision else [hub, *(h for h in HUBS if h != hub)]
    if folder := _on_this_machine(places, ids, revision):
        return folder
    if offline if offline is not None else is_offline_mode():
        raise UserError(
            f"{name_or_path}: not on this machine, and offline; looked for a complete copy in {_hf_cache()} and "
            f"{_modelscope_cache()}; give the path of a local folder, or go online once (HF_HUB_OFFLINE=0)"
        )
    lock = _LOCK[hub](ids[hub])
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):  # of several processes that start together one downloads
        return _on_this_machine(places, ids, revision) or _DOWNLOAD[hub](ids[hub], revision, token)


def _on_this_machine(places: list[Hub], ids: dict[Hub, str], revision: str | None) -> Path | None:
    folders = (folder for place in places for folder in _CACHED[place](ids[place], revision))
    return next((folder for folder in folders if not missing_files(folder)), None)


def missing_files(folder: Path) -> list[str]:
    """What a checkpoint folder lacks to be loaded. Empty: it is complete."""
    missing = [name for name in ("config.json",) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        missing.append(" or ".join(_TOKENIZERS))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing += sorted(name for name in shards if not (folder / name).is_file())
    elif not (folder / "model.safetensors").is_file():
        missing.append("model.safetensors")
    return missing


def _ids(name: str) -> dict[Hub, str]:
    row = find_model(name)
    if row is not None:
        return {place: row.id_on(place) for place in HUBS}
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        close = difflib.get_close_matches(name.lower(), [row.name for row in MODELS], n=3, cutoff=0.5)
        raise UserError(
            f"{name}: neither a folder nor a known model{f' (did you mean {chr(32).join(close)}?)' if close else ''}; "
            "give a local folder, a hub's OWNER/NAME, or a name that `python -m ivl models` lists"
        )
    return dict.fromkeys(HUBS, name)


def _refused(repo_id: str, hub: Hub, why: object) -> UserError:
    """The document's answer to `The request model does not exist!`."""
    if hub == "modelscope":
        page, tokens = f"{modelscope_endpoint()}/models/{repo_id}", f"{modelscope_endpoint()}/my/myaccesstoken"
        variable = "MODELSCOPE_API_TOKEN"
    else:
        page, tokens = f"https://huggingface.co/{repo_id}", "https://huggingface.co/settings/tokens"
        variable = "HF_TOKEN"
    return UserError(
        f"{repo_id}: {hub} says that it does not exist or that you may not have it ({why}). Check the name. Some "
        f"models must be applied for: log in, open {page} and apply. Once approved, make a token at {tokens} and pass "
        f"it with --token or in {variable}; or download the model by hand and give the path of the local folder"
    )


def _corrupt(file: str, where: str, expected: object, found: object) -> UserError:
    return UserError(
        f"{where}: {file} does not match the hub's checksum: expected {expected}, found {found}; "
        "it was removed, run again to download it anew"
    )


def _wanted(names: Iterable[str]) -> list[str]:
    return sorted(n for n in names if "/" not in n and any(fnmatch(n, pattern) for pattern in WANTED))


def _digest(path: Path, how: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            how.update(chunk)
    return how.hexdigest()


# Hugging Face


def _hf_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _hf_storage(repo_id: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return _hf_cache() / repo_folder_name(repo_id=repo_id, repo_type="model")


def _hf_cached(repo_id: str, revision: str | None) -> list[Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if (_hf_storage(repo_id) / UNFINISHED).exists():
        return []
    try:
        return [Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[]))]
    except LocalEntryNotFoundError:
        return []


def _hf_download(repo_id: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,  # of httpx or httpx2, whichever this version is built on
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = os.environ.get("HF_ENDPOINT")
    storage = _hf_storage(repo_id)
    storage.mkdir(parents=True, exist_ok=True)
    (storage / UNFINISHED).touch()
    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                endpoint=endpoint,
                allow_patterns=list(WANTED),
                ignore_patterns="*/*",
            )
        )
        tree = HfApi(endpoint=endpoint, token=token).list_repo_tree(repo_id, revision=folder.name)
        _hf_check(folder, {file.path: file for file in tree if file.path in _wanted([file.path])})
    except RevisionNotFoundError as error:
        raise UserError(
            f"{repo_id}: huggingface has no revision {revision!r}; leave it out or name a branch"
        ) from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise _refused(repo_id, "huggingface", type(error).__name__) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            raise _refused(repo_id, "huggingface", error.response.status_code) from error
        raise _unreachable(repo_id, "huggingface", error) from error
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise _unreachable(repo_id, "huggingface", error) from error
    (storage / UNFINISHED).unlink(missing_ok=True)
    _need_complete(folder, repo_id)
    return folder


def _hf_check(folder: Path, files: dict[str, Any]) -> None:
    """Compare each file with the hub's own record: sha256 of large files, git's hash of the others."""
    for name, file in files.items():
        path = folder / name
        if file.lfs is not None:
            expected, how = file.lfs.sha256, hashlib.sha256()
        else:
            # git's name for a file's content: a hash, not a secret
            expected, how = file.blob_id, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        found = _digest(path, how)
        if found != expected:
            blob = path.resolve()
            path.unlink()
            blob.unlink(missing_ok=True)
            raise _corrupt(name, str(folder), expected, found)


def _unreachable(repo_id: str, hub: Hub, error: Exception) -> UserError:
    first = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"{repo_id}: cannot download from {hub}: {first[0]}; run again to go on where it stopped, "
        "or give the path of a local folder"
    )


def _need_complete(folder: Path, repo_id: str) -> None:
    missing = missing_files(folder)
    if missing:
        raise UserError(f"{repo_id}: not a checkpoint this program can read: it has no {', no '.join(missing)}")


# ModelScope


@dataclass(frozen=True)
class _Remote:
    """A file of a ModelScope repository."""

    path: str
    size: int
    sha256: str


def modelscope_endpoint() -> str:
    """Address of ModelScope, or of the server that MODELSCOPE_DOMAIN names."""
    domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    return (domain if "://" in domain else f"https://{domain}").rstrip("/")


def _modelscope_cache() -> Path:
    return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope/hub").expanduser()


def _modelscope_folder(repo_id: str, revision: str | None) -> PurePosixPath:
    # A dot in a name is written so by the modelscope package. Its folders do not tell revisions apart; ours do.
    owner, name = repo_id.split("/")
    return PurePosixPath(owner, name.replace(".", "___") + (f"@{quote(revision, safe='')}" if revision else ""))


def _modelscope_cached(repo_id: str, revision: str | None) -> list[Path]:
    root, name = _modelscope_cache(), _modelscope_folder(repo_id, revision)
    folders = [root / "models" / name, root / name, root / "hub" / name]
    return [f for f in folders if f.is_dir() and not (f / UNFINISHED).exists()]


def _modelscope_download(repo_id: str, revision: str | None, token: str | None) -> Path:
    token = token or os.environ.get("MODELSCOPE_API_TOKEN")
    files = _modelscope_files(repo_id, revision or "master", token)
    folder = _modelscope_cache() / "models" / _modelscope_folder(repo_id, revision)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / UNFINISHED
    unfinished.mkdir(exist_ok=True)
    for file in files:
        _modelscope_file(repo_id, revision or "master", token, file, folder)
    unfinished.rmdir()
    _need_complete(folder, repo_id)
    return folder


def _modelscope_files(repo_id: str, revision: str, token: str | None) -> list[_Remote]:
    query = urlencode({"Revision": revision, "Recursive": "False"})
    try:
        with _open(f"{modelscope_endpoint()}/api/v1/models/{repo_id}/repo/files?{query}", token) as answer:
            body = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code in (400, 401, 403, 404):
            raise _refused(repo_id, "modelscope", error.code) from error
        raise _unreachable(repo_id, "modelscope", error) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _unreachable(repo_id, "modelscope", error) from error
    if body.get("Code") != 200:
        raise _refused(repo_id, "modelscope", body.get("Message"))
    found = {f["Path"]: f for f in body["Data"]["Files"] if f.get("Type") != "tree"}
    return [_Remote(n, found[n]["Size"], found[n].get("Sha256") or "") for n in _wanted(found)]


def _modelscope_file(repo_id: str, revision: str, token: str | None, file: _Remote, folder: Path) -> None:
    """Bring one file to `folder`, from its partial copy on where there is one, and into place only once checked."""
    target, part = folder / file.path, folder / UNFINISHED / file.path
    if target.exists():
        if _matches(target, file):
            return
        raise UserError(f"{target}: exists and is not the hub's file; move it away or name its folder instead")
    query = urlencode({"Revision": revision, "FilePath": file.path})
    url = f"{modelscope_endpoint()}/api/v1/models/{repo_id}/repo?{query}"
    part.touch()
    best, failures, problem = 0, 0, None
    while (size := part.stat().st_size) < file.size:
        failures = 0 if size > best else failures + 1
        best = max(best, size)
        if failures > 5:
            raise _unreachable(repo_id, "modelscope", problem or OSError(f"{file.path} broke off at byte {size}"))
        if failures > 1:
            time.sleep(2 ** (failures - 3))
        problem = _fetch(url, token, part, file, repo_id)
    if not _matches(part, file):
        found = _digest(part, hashlib.sha256())
        part.unlink()
        raise _corrupt(file.path, str(folder), file.sha256 or f"{file.size} bytes", found)
    os.replace(part, target)


def _matches(path: Path, file: _Remote) -> bool:
    if path.stat().st_size != file.size:
        return False
    return not file.sha256 or _digest(path, hashlib.sha256()) == file.sha256


def _fetch(url: str, token: str | None, part: Path, file: _Remote, repo_id: str) -> Exception | None:
    """Append to `part` what is missing of it. Returns what went wrong, where another try may help."""
    from tqdm.auto import tqdm

    start = part.stat().st_size
    try:
        with _open(url, token, {"Range": f"bytes={start}-"} if start else {}) as answer:
            resumed = answer.status == 206
            bar = tqdm(
                desc=file.path, total=file.size, initial=start * resumed, unit="B", unit_scale=True, disable=None
            )
            with part.open("ab" if resumed else "wb") as out, bar:
                while chunk := answer.read(_CHUNK):
                    out.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            raise _refused(repo_id, "modelscope", error.code) from error
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


def _hf_lock(repo_id: str) -> Path:
    return _hf_cache() / ".locks" / _hf_storage(repo_id).name / "ivl.lock"


def _modelscope_lock(repo_id: str) -> Path:
    return _modelscope_cache() / ".locks" / (repo_id.replace("/", "--") + ".lock")


_LOCK = {"huggingface": _hf_lock, "modelscope": _modelscope_lock}
_CACHED = {"huggingface": _hf_cached, "modelscope": _modelscope_cached}
_DOWNLOAD = {"huggingface": _hf_download, "modelscope": _modelscope_download}
