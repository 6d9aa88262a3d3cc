"""Files of rows of a data set on the Hugging Face hub, by `OWNER/NAME[:SUBSET[:SPLIT]]`, in huggingface_hub's cache.

Which files a subset and a split have is what the card says (its `configs`), else what files are named, as `datasets`
has it. No code of a repository is executed.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ivl.errors import UserError
from ivl.hub import login
from ivl.hub.files import Unreachable
from ivl.hub.huggingface import custom_endpoint, hub_errors

NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<subset>[^:#]*))?(?::(?P<split>[^:#]*))?")
_ROWS = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
_CARD, _PAGES = "README.md", "datasets/"


def dataset_files(name: str) -> list[Path]:
    """Paths of the files of a data set's rows, downloaded where the cache lacks them.

    SUBSET is one of the card's `configs` or a folder, where there are several; SPLIT is train where it is left out.
    With HF_HUB_OFFLINE, or without a network, only the cache is read. HF_ENDPOINT names another server.
    Raises UserError where the hub has no such data set, subset or split, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    parts = NAME.fullmatch(name)
    if parts is None:
        raise UserError(f"{name}: expected OWNER/NAME, OWNER/NAME:SUBSET or OWNER/NAME:SUBSET:SPLIT")
    repo, subset, split = parts["repo"], parts["subset"] or "", parts["split"] or "train"
    listing = _listing(repo)
    card = _card(repo) if _CARD in listing else {}
    wanted = files_of(listing, card, subset, split, repo)
    with hub_errors(repo, _PAGES):
        folder = Path(snapshot_download(repo, allow_patterns=wanted, **_options()))
    return [folder / path for path in wanted]


def files_of(listing: Sequence[str], card: dict[str, Any], subset: str, split: str, repo: str) -> list[str]:
    """Choose the paths of a listing that hold the rows of a subset and split. Raises UserError that lists the others.

    `card`: the front matter of the data set's README.
    """
    listing = sorted(path for path in listing if PurePosixPath(path).suffix in _ROWS)
    configs = {str(c.get("config_name")): c for c in card.get("configs") or () if isinstance(c, dict)}
    if configs:
        name = subset or ("default" if "default" in configs else next(iter(configs)) if len(configs) == 1 else "")
        if name not in configs:
            problem = f"no subset {subset}" if subset else "several subsets"
            raise UserError(f"{repo}: {problem}; name one as {repo}:SUBSET: {', '.join(configs)}")
        splits = _splits(configs[name])
        if split not in splits:
            raise UserError(f"{repo}:{subset}: no split {split}; name one as {repo}:{name}:SPLIT: {', '.join(splits)}")
        files = [path for path in listing if any(fnmatch.fnmatch(path, pattern) for pattern in splits[split])]
    else:
        inside = [path for path in listing if not subset or subset in PurePosixPath(path).parts]
        named = re.compile(rf"(?:.*[/_.-])?{re.escape(split)}(?:[-_./].*)?\.\w+")
        files = [path for path in inside if named.fullmatch(path)]
        if not files and split == "train" and not any(_OTHER_SPLIT.fullmatch(path) for path in inside):
            files = inside  # a set without splits is one for training
    if not files:
        files_there = ", ".join(listing[:20]) or "no files of rows (parquet, jsonl, json, csv)"
        raise UserError(f"{repo}: no rows for subset {subset or '(none)'} and split {split}; it has {files_there}")
    return files


_OTHER_SPLIT = re.compile(r"(?:.*[/_.-])?(?:test|val|valid|validation|dev)(?:[-_./].*)?\.\w+")


def _splits(config: dict[str, Any]) -> dict[str, list[str]]:
    """Patterns of each split: `data_files` is a pattern, a list of them, or a list of {split, path}."""
    data_files = config.get("data_files") or []
    entries = data_files if isinstance(data_files, list) else [data_files]
    splits: dict[str, list[str]] = {}
    for entry in entries:
        split, path = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        splits.setdefault(str(split), []).extend(map(str, path if isinstance(path, list) else [path]))
    return splits


def _token() -> str | None:
    hub, token = login()
    return token if hub == "huggingface" else None


def _options() -> dict[str, Any]:
    return {"repo_type": "dataset", "endpoint": custom_endpoint(), "token": _token()}


def _listing(repo: str) -> list[str]:
    """Paths of a data set's files by the hub, or those in the cache where the hub is not to be asked or not reached."""
    from huggingface_hub import HfApi, constants, snapshot_download

    def cached() -> list[str]:
        with hub_errors(repo, _PAGES):
            folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=[], **_options()))
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    if constants.HF_HUB_OFFLINE:
        return cached()
    try:
        with hub_errors(repo, _PAGES):
            return HfApi(endpoint=custom_endpoint(), token=_token()).list_repo_files(repo, repo_type="dataset")
    except Unreachable:
        try:
            return cached()
        except UserError:
            pass
        raise


def _card(repo: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    with hub_errors(repo, _PAGES):
        text = Path(hf_hub_download(repo, _CARD, **_options())).read_text(encoding="utf-8")
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    try:
        card = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}
