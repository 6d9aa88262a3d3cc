"""Checkpoint folders by name or path: local, from a cache, or downloaded and checked.

Weights are safetensors only; a release's `.py` files are copied so that an export can carry them, and never executed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivl.architecture.families import MODELS, find_model
from ivl.errors import UserError
from ivl.hub import huggingface, modelscope
from ivl.hub.files import ADAPTER, CHECKPOINT, CONFIGS, SETTINGS, Hub, Kind
from ivl.hub.hints import MODEL, check_model_folder, check_repository
from ivl.hub.unsupported import refuse_name

HUBS: tuple[Hub, ...] = ("huggingface", "modelscope")


_MODULES: dict[Hub, Any] = {"huggingface": huggingface, "modelscope": modelscope}
"""Modules with the same functions: cached, download, lock, cache"""


@dataclass
class _HubSettings:
    """Hub, login and revision of this process, set by `choose`."""

    hub: Hub = "huggingface"
    token: str | None = None
    revision: str | None = None


_settings = _HubSettings()


def choose(hub: str | None = None, token: str | None = None, revision: str | None = None) -> None:
    """Set hub, login and revision for the models that this process looks up by name; None: as before.

    They are written nowhere. Raises UserError for an unknown hub.
    """
    _settings.hub = _known_hub(hub) or _settings.hub
    _settings.token = token or _settings.token
    _settings.revision = revision or _settings.revision


def login() -> tuple[Hub, str | None]:
    """Return the hub and the token that were given to `choose`; None: those of the environment or the stored login."""
    return _settings.hub, _settings.token


def with_revision(name_or_path: str) -> str:
    """Add the revision given to `choose` to a model's name, so that a run records it; a folder stays as it is."""
    if not _settings.revision or "@" in name_or_path or Path(name_or_path).expanduser().is_dir():
        return name_or_path
    return f"{name_or_path}@{_settings.revision}"


def _known_hub(hub: str | None) -> Hub | None:
    if hub is not None and hub not in HUBS:
        raise UserError(f"hub: expected one of {', '.join(HUBS)}, found {hub!r}")
    return hub


def resolve(
    name_or_path: str | Path,
    hub: Hub | None = None,
    token: str | None = None,
    revision: str | None = None,
    offline: bool | None = None,
    weights: bool = True,
) -> Path:
    """Return the local folder of a checkpoint: a folder as it is, else from a hub's local cache, else downloaded.

    `name_or_path`: a folder, a name of `ivl.architecture.families` (`internvl2-2b`) or a hub's id
    (`OpenGVLab/InternVL2-2B`, with the folder of one model among several `OWNER/NAME:FOLDER`); a name may end with
    a revision (a branch, a tag or a commit), `NAME@REVISION`.
    `hub` and `token`: None takes the values given to `choose`, else Hugging Face, and HF_TOKEN or the stored login, or
    MODELSCOPE_API_TOKEN. `offline`: None takes HF_HUB_OFFLINE. `weights`: False for the other files alone, where the
    weights are not here yet.
    A copy either hub left on this machine serves both, unless a `revision` is asked for. Downloads go to the hub's own
    cache, go on where they broke off and overwrite nothing. HF_ENDPOINT and MODELSCOPE_DOMAIN name other servers.

    Raises UserError where there is no such folder or model, it may not be had, or a file does not match its checksum.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if revision:
            raise UserError(f"{name_or_path}: is a folder here, which has no revision {revision!r}; leave it out")
        check_model_folder(path)
        return path
    if path.is_file():
        raise UserError(f"{name_or_path}: is a file; give the checkpoint's folder, {path.parent}")
    ending = str(name_or_path).partition("@")[2]
    if ending and _settings.revision not in (None, ending):
        raise UserError(f"{name_or_path}: --revision is {_settings.revision}; expected one of them")
    revision = revision or ending or _settings.revision
    return _from_hub(str(name_or_path), CHECKPOINT if weights else SETTINGS, hub, token, revision, offline)


def resolve_adapter(name_or_path: str | Path) -> Path:
    """Return the local folder of a PEFT adapter: a path as it is, there or not, else of a hub, as `resolve`.

    A hub's id is `OWNER/NAME`, with the folder of one adapter among several `OWNER/NAME:FOLDER`, and may end with
    `@REVISION`; the revision given to `choose` is the model's. Raises UserError as `resolve` does.
    """
    path, name = Path(name_or_path).expanduser(), str(name_or_path).partition("@")[0]
    if path.exists() or path.parent.is_dir() or not _ID.fullmatch(name) or ".." in name:
        return path
    if find_model(name) is not None:
        raise UserError(f"{name_or_path}: {MODEL}")
    return _from_hub(str(name_or_path), ADAPTER, revision=str(name_or_path).partition("@")[2] or None)


def _from_hub(
    name_or_path: str,
    kind: Kind,
    hub: Hub | None = None,
    token: str | None = None,
    revision: str | None = None,
    offline: bool | None = None,
) -> Path:
    from filelock import FileLock
    from huggingface_hub.constants import is_offline_mode

    hub, token = _known_hub(hub) or _settings.hub, token or _settings.token
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UserError(
            f"{name_or_path}: revision: expected the name of a branch or a tag, or a commit, found {revision!r}"
        )
    if kind is not ADAPTER:
        refuse_name(name_or_path)
    ids = _ids(name_or_path.partition("@")[0])
    hubs = [hub] if revision else [hub, *(h for h in HUBS if h != hub)]
    if folder := _cached_folder(hubs, ids, revision, kind):
        return folder
    if offline if offline is not None else is_offline_mode():
        for folder in _folders(hubs, ids, revision):
            if any((folder / name).is_file() for name in CONFIGS.patterns):
                check_repository(folder, kind is ADAPTER, name_or_path)
        raise UserError(
            f"{name_or_path}: not on this machine, and offline; looked for a complete copy in {huggingface.cache()} "
            f"and {modelscope.cache()}; give the path of a local folder, or go online once (HF_HUB_OFFLINE=0)"
        )
    repo_id, _, subfolder = ids[hub].partition(":")
    module, lock = _MODULES[hub], _MODULES[hub].lock(repo_id)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # of several processes that start together one downloads
            if folder := _cached_folder(hubs, ids, revision, kind):
                return folder
            configs = module.download(repo_id, revision, token, subfolder, CONFIGS) / subfolder
            check_repository(configs, kind is ADAPTER, name_or_path)
            return module.download(repo_id, revision, token, subfolder, kind) / subfolder
    except OSError as error:
        variable = {"huggingface": "HF_HUB_CACHE", "modelscope": "MODELSCOPE_CACHE"}[hub]
        raise UserError(
            f"{name_or_path}: cannot be downloaded to {_MODULES[hub].cache()} ({error.strerror or error}); name a "
            f"folder that can be written by {variable}, or give the path of a local folder"
        ) from error


def commit_of(folder: Path) -> str | None:
    """Return the commit of a folder in Hugging Face's cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else None


_COMMIT = re.compile(r"[0-9a-f]{40}")
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:\w[\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"[\w./-]+")


def _cached_folder(hubs: list[Hub], ids: dict[Hub, str], revision: str | None, kind: Kind) -> Path | None:
    return next((folder for folder in _folders(hubs, ids, revision) if not kind.missing(folder)), None)


def _folders(hubs: list[Hub], ids: dict[Hub, str], revision: str | None) -> Iterator[Path]:
    """Yield the folders of a name in the caches, complete or not."""
    for hub in hubs:
        repo_id, _, subfolder = ids[hub].partition(":")
        yield from (folder / subfolder for folder in _MODULES[hub].cached(repo_id, revision))


def _ids(name: str) -> dict[Hub, str]:
    row = find_model(name)
    if row is not None:
        return {hub: row.id_on(hub) for hub in HUBS}
    if not _ID.fullmatch(name) or ".." in name:
        close = difflib.get_close_matches(name.lower(), [row.name for row in MODELS], n=3, cutoff=0.5)
        raise UserError(
            f"{name}: neither a folder nor a known model{f' (did you mean {chr(32).join(close)}?)' if close else ''}; "
            "give a local folder, a hub's OWNER/NAME, or a name that `python -m ivl models` lists"
        )
    return dict.fromkeys(HUBS, name)
