"""The files of a checkpoint folder: which are wanted, whether they are all there and whole, and what to say if not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from ivl.types import UserError

Hub = Literal["huggingface", "modelscope"]

WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
"""Files at the top of a release that are needed to load it, and to write it back so that other engines read it"""

UNFINISHED = ".ivl-unfinished"
"""Lies beside a download until every file of it has been checked; a folder with it is not taken from the cache"""

CHUNK = 1 << 20
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def wanted(names: Iterable[str]) -> list[str]:
    return sorted(n for n in names if "/" not in n and any(fnmatch(n, pattern) for pattern in WANTED))


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


def need_complete(folder: Path, repo_id: str) -> None:
    missing = missing_files(folder)
    if missing:
        raise UserError(f"{repo_id}: not a checkpoint this program can read: it has no {', no '.join(missing)}")


def digest(path: Path, how: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            how.update(chunk)
    return how.hexdigest()


def refused(repo_id: str, hub: Hub, why: object, page: str, tokens: str, variable: str) -> UserError:
    """The document's answer to `The request model does not exist!`. `page`: where a model is applied for; `tokens`:
    where a login is made, which is given in `variable`."""
    return UserError(
        f"{repo_id}: {hub} says that it does not exist or that you may not have it ({why}). Check the name. Some "
        f"models must be applied for: log in, open {page} and apply. Once approved, make a token at {tokens} and pass "
        f"it with --token or in {variable}; or download the model by hand and give the path of the local folder"
    )


def unreachable(repo_id: str, hub: Hub, error: Exception) -> UserError:
    first = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"{repo_id}: cannot download from {hub}: {first[0]}; run again to go on where it stopped, "
        "or give the path of a local folder"
    )


def corrupt(file: str, where: str, expected: object, found: object) -> UserError:
    return UserError(
        f"{where}: {file} does not match the hub's checksum: expected {expected}, found {found}; "
        "it was removed, run again to download it anew"
    )
