"""Checkpoints of the Hugging Face hub, through huggingface_hub and in its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ivl.errors import UserError
from ivl.hub.files import CHECKPOINT, CONFIGS, UNFINISHED, Kind, corrupt, other_kind, refused, unreachable


def cache() -> Path:
    """Folder in which the hub's own package keeps files."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def custom_endpoint() -> str | None:
    """Address of the server that HF_ENDPOINT names; None: the hub's own. Raises UserError where it is no address."""
    address = os.environ.get("HF_ENDPOINT") or None
    if address and not re.match(r"https?://[^/\s]", address):
        raise UserError(f"HF_ENDPOINT: expected an address that begins with https:// or http://, found {address!r}")
    return address


def _storage(repo_id: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return cache() / repo_folder_name(repo_id=repo_id, repo_type="model")


def cached(repo_id: str, revision: str | None) -> list[Path]:
    """Folders of this machine that may hold a checkpoint, complete or not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if (_storage(repo_id) / UNFINISHED).exists():
        return []
    try:
        return [Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[]))]
    except LocalEntryNotFoundError:
        return []


def download(
    repo_id: str, revision: str | None, token: str | None, subfolder: str = "", kind: Kind = CHECKPOINT
) -> Path:
    """Bring a checkpoint, or an adapter, into the cache, and compare its files with the hub's record. Raises UserError.

    `subfolder`: folder of the checkpoint in a repository of several. Returns the folder of the repository.
    """
    from huggingface_hub import HfApi, snapshot_download

    endpoint = custom_endpoint()
    storage = _storage(repo_id)
    storage.mkdir(parents=True, exist_ok=True)
    if kind is not CONFIGS:  # they come again with the rest, which is checked
        (storage / UNFINISHED).touch()
    inside = f"{subfolder}/" if subfolder else ""
    with hub_errors(repo_id, revision=revision):
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                endpoint=endpoint,
                allow_patterns=[f"{inside}{pattern}" for pattern in kind.patterns],
                ignore_patterns=f"{inside}*/*",
            )
        )
        api = HfApi(endpoint=endpoint, token=token)
        if folder.is_dir():  # no file has such a name otherwise
            _check(folder, api.verify_repo_checksums(repo_id, revision=folder.name, local_dir=folder).mismatches)
    if kind is not CONFIGS:
        (storage / UNFINISHED).unlink(missing_ok=True)
    kind.need_complete(folder / subfolder, repo_id)
    return folder


def _check(folder: Path, mismatches: list[Any]) -> None:
    """Remove the files that do not match the hub's record. Raises UserError for the first."""
    for file in mismatches:
        path = folder / file["path"]
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
    for file in mismatches:
        raise corrupt(file["path"], str(folder), file["expected"], file["actual"])


@contextmanager
def hub_errors(repo_id: str, folder: str = "", revision: str | None = None) -> Iterator[None]:
    """Turn the hub's refusals, and its silence, into errors a person can act on.

    `folder`: beginning of its page's address, such as datasets/. Raises UserError, of which Unreachable where the hub
    gives no answer.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,  # of httpx or httpx2, whichever this version is built on
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,  # a gated one, too
        RevisionNotFoundError,
    )

    page, tokens = f"https://huggingface.co/{folder}{repo_id}", "https://huggingface.co/settings/tokens"
    try:
        yield
    except RevisionNotFoundError as error:
        raise UserError(
            f"{repo_id}: huggingface has no revision {revision!r}; leave it out or name a branch"
        ) from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code not in (401, 403, 404):
            raise unreachable(repo_id, "huggingface", error) from error
        not_found = isinstance(error, RepositoryNotFoundError)
        gated = isinstance(error, GatedRepoError)
        if not_found and not gated and _exists(repo_id, "model" if folder else "dataset"):
            raise other_kind(repo_id, is_data=not folder) from error
        why = type(error).__name__ if not_found else code
        raise refused(repo_id, "huggingface", why, page, tokens, "HF_TOKEN") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError, OSError) as error:
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{repo_id}: not in the cache, and offline; go online once (HF_HUB_OFFLINE=0)") from error
        raise unreachable(repo_id, "huggingface", error) from error


def _exists(repo_id: str, kind: str) -> bool:
    """True for the name of a model or data set that may be had without a login; False where nothing is known."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        return HfApi(endpoint=custom_endpoint(), token=False).repo_exists(repo_id, repo_type=kind)
    except (HTTPError, OSError):
        return False


def lock(repo_id: str) -> Path:
    """Path of the lock file, held by the one process that downloads."""
    return cache() / ".locks" / _storage(repo_id).name / "ivl.lock"
