"""Upload of a checkpoint or adapter folder to the Hugging Face hub, in one commit.

A repository that holds other files is refused, unless its replacement is asked for; its earlier commits stay.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ivl.errors import UserError, note
from ivl.hub import login
from ivl.hub.huggingface import custom_endpoint, hub_errors
from ivl.storage.files import file_digest

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_OWN_OF_HUB = ".gitattributes"
"""File that the hub itself writes into a new repository"""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Remote:
    """Repository of the hub as it was before an upload."""

    name: str
    commit: str | None
    """None: there is no such repository yet"""
    private: bool
    digests: dict[str, str]
    """File → its SHA-256, or the hash that git has for it"""

    @property
    def url(self) -> str:
        from huggingface_hub import constants

        return f"{(custom_endpoint() or constants.ENDPOINT).rstrip('/')}/{self.name}"

    def differing(self, folder: Path, skipped: tuple[str, ...]) -> list[str]:
        """Names of files that the repository lacks, holds beyond the folder's, or holds with another content."""
        here = set(uploaded_files(folder, skipped))
        both = here & self.digests.keys()
        return sorted((here ^ self.digests.keys()) | {n for n in both if not _same(folder / n, self.digests[n])})


def look_up(name: str, private: bool) -> Remote:
    """Return the repository as it is now. Raises UserError where nothing can be pushed to that name."""
    hub, token = login()
    if hub != "huggingface":
        raise UserError(
            f"--push {name}: only Hugging Face is pushed to; ModelScope takes uploads by its own package alone: export "
            f"without --push, then `modelscope upload {name} OUT`"
        )
    if not NAME.fullmatch(name) or ".." in name:
        raise UserError(f"--push: expected OWNER/NAME of a repository on Hugging Face, found {name!r}")
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise UserError(f"--push {name}: HF_HUB_OFFLINE is set; unset it, or export without --push")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(endpoint=custom_endpoint(), token=token)
    try:
        info = _asked(name, lambda: api.model_info(name, files_metadata=True), missing=RepositoryNotFoundError)
    except RepositoryNotFoundError:
        return Remote(name, None, private, {})
    if private and not info.private:
        raise UserError(f"--push {name}: exists already, and is public; leave out --private, or name another")
    files = [file for file in info.siblings or () if file.rfilename != _OWN_OF_HUB]
    digests = {f.rfilename: str(f.lfs.sha256 if f.lfs else f.blob_id) for f in files}
    return Remote(name, info.sha, bool(info.private), digests)


def push_folder(folder: Path, remote: Remote, message: str, again: str, skipped: tuple[str, ...] = ()) -> str:
    """Upload the files of a folder in one commit that holds nothing else. Returns the address of the commit.

    `again`: command that repeats the upload, for an error's message. `skipped`: names that are not uploaded.
    Raises UserError where the hub refuses, cannot be reached, or the repository has changed since `look_up`.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=custom_endpoint(), token=login()[1])

    def upload() -> Any:
        if remote.commit is None:
            api.create_repo(remote.name, private=remote.private)
        return api.upload_folder(
            repo_id=remote.name,
            folder_path=folder,
            commit_message=message,
            parent_commit=remote.commit,
            ignore_patterns=list(skipped),
            delete_patterns="*" if remote.digests else None,
        )

    return str(_asked(remote.name, upload, f"; {folder} is complete here, push it again with `{again}`").commit_url)


def licence_of(name: str) -> str | None:
    """Licence that the card of a model on the hub names; None where the hub does not tell."""
    from huggingface_hub import HfApi

    try:
        with hub_errors(name):
            info = HfApi(endpoint=custom_endpoint(), token=login()[1]).model_info(name)
    except UserError as error:
        note(f"the licence of the base is not known: {error}")
        return None
    return str(info.card_data.license) if info.card_data and info.card_data.license else None


def uploaded_files(folder: Path, skipped: tuple[str, ...]) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for name in names if name not in skipped]


def _same(path: Path, digest: str) -> bool:
    if len(digest) == 64:
        return file_digest(path, hashlib.sha256()) == digest
    return file_digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size)) == digest


def _asked(name: str, request: Callable[[], Answer], ending: str = "", missing: Any = ()) -> Answer:
    """Answer of the hub. Raises `missing` as it is, and UserError where the hub refuses or cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        return request()
    except missing:
        raise
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403, 404):
            raise UserError(
                f"{name}: not yours to write to on huggingface, or you are not logged in (HTTP {code}); log in with "
                "`hf auth login`, or set HF_TOKEN to a token with the right to write "
                f"(https://huggingface.co/settings/tokens){ending}"
            ) from error
        if code in (409, 412):
            raise UserError(f"{name}: has changed on huggingface meanwhile (HTTP {code}){ending}") from error
        raise UserError(
            f"{name}: huggingface answers HTTP {code} ({error.server_message or error.response.reason_phrase}){ending}"
        ) from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{name}: huggingface cannot be reached, or broke off ({_first_line(error)}){ending}"
        ) from error


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
