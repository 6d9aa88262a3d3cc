"""Files of a checkpoint folder: those needed, those missing, and the errors for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from ivl.architecture.config import read_json
from ivl.architecture.config_fields import shown
from ivl.errors import UserError, first_few

Hub = Literal["huggingface", "modelscope"]

WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
"""Patterns of files at the top of a release, needed to load it and to write it back for other engines."""

UNFINISHED = ".ivl-unfinished"
"""Marker beside a download until every file of it is checked; a folder with it is not taken from the cache."""

CHUNK = 1 << 20
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def wanted(names: Iterable[str], patterns: tuple[str, ...] = WANTED) -> list[str]:
    return sorted(n for n in names if "/" not in n and any(fnmatch(n, pattern) for pattern in patterns))


def weight_files(folder: Path) -> list[str]:
    """Names of a checkpoint's weight files, by its index or the one file; they may be missing.

    Raises UserError where the index is no index, names files elsewhere, or there are no safetensors here.
    """
    index = folder / INDEX
    if index.is_file():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
            raise UserError(f"{index}: weight_map: expected an object from tensors to files, found {shown(table)}")
        names = sorted(set(table.values()))
        if strange := [n for n in names if Path(n).name != n or "\\" in n or not n.endswith(".safetensors")]:
            raise UserError(
                f"{index}: weight_map: expected names of .safetensors files in this folder, found {shown(strange[0])}"
            )
        return names
    if (folder / ONE_FILE).is_file():
        return [ONE_FILE]
    raise UserError(f"{folder}: no {ONE_FILE} and no {INDEX}; {_describe_other_files(folder)}")


INDEX, ONE_FILE = "model.safetensors.index.json", "model.safetensors"


def _describe_other_files(folder: Path) -> str:
    """Describe the files in place of weights, and the remedy."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"there are {first_few(shards, 3)}, without the index that says what is in them; download {INDEX} as well"
        )
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth")) and "training_args" not in name]:
        return (
            f"there are only pickles ({first_few(pickles, 3)}), which are never opened here; take the safetensors of "
            "the release, or convert them with transformers (save_pretrained)"
        )
    if others := [name for name in names if name.endswith((".gguf", ".onnx", ".engine"))]:
        return (
            f"there are weights for other programs ({first_few(others, 3)}); take the release that they were made from"
        )
    return "expected a checkpoint's weights; is the download complete?"


def missing_files(folder: Path) -> list[str]:
    """Files that a checkpoint folder lacks to be loaded. Empty: it is complete."""
    missing = [name for name in ("config.json",) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        missing.append(" or ".join(_TOKENIZERS))
    try:
        missing += [name for name in weight_files(folder) if not (folder / name).is_file()]
    except UserError:
        missing.append(f"readable {INDEX}" if (folder / INDEX).is_file() else ONE_FILE)
    return missing


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Kind:
    """Kind of folder that a hub holds."""

    name: str
    patterns: tuple[str, ...]
    """Files to download, at the top of the folder"""
    missing: Callable[[Path], list[str]]
    """Files that a folder lacks to be loaded"""

    def need_complete(self, folder: Path, repo_id: str) -> None:
        """Raise UserError where a downloaded folder cannot be loaded."""
        if missing := self.missing(folder):
            raise UserError(f"{repo_id}: not {self.name} this program can read: it has no {', no '.join(missing)}")


def _missing_settings(folder: Path) -> list[str]:
    return [name for name in missing_files(folder) if not name.endswith((".safetensors", INDEX))]


CHECKPOINT = Kind("a checkpoint", WANTED, missing_files)
SETTINGS = Kind("a checkpoint", tuple(p for p in WANTED if p != "*.safetensors"), _missing_settings)
"""Checkpoint without its weights: all that rows are read with"""
CONFIGS = Kind("a checkpoint or adapter", ("config.json", "adapter_config.json"), lambda folder: [])
"""Files that tell a model from an adapter; they are fetched first"""
# All weights at the top: those of a tower beside the adapter are read, others refused.
ADAPTER = Kind(
    "a PEFT adapter",
    ("adapter_config.json", "*.safetensors"),
    lambda folder: [n for n in ADAPTER_FILES if not (folder / n).is_file()],
)


class Unreachable(UserError):
    """A hub cannot be reached, or gives no answer."""


def refused(repo_id: str, hub: Hub, why: object, page: str, tokens: str, variable: str) -> UserError:
    """Error for what does not exist or needs access: the document's `The request model does not exist!`.

    `page`: address to apply for it; `tokens`: address to make a login, which goes in `variable`.
    """
    return UserError(
        f"{repo_id}: {hub} says that it does not exist or that you may not have it ({why}). Check the name. Some "
        f"must be applied for: log in, open {page} and apply. Once approved, make a token at {tokens} and pass it with "
        f"--token or in {variable}; or download it by hand and give the path of the local folder"
    )


def other_kind(repo_id: str, is_data: bool) -> UserError:
    """Error for a data set's name that was given for a model, or, where not `is_data`, a model's given for data."""
    if is_data:
        return UserError(
            f"{repo_id}: is a data set, not a model; give it with --data.train (fit) or --data.predict (predict)"
        )
    return UserError(
        f"{repo_id}: is a model, not a data set; give it with --model (chat) or --model.pretrained (fit, predict)"
    )


def unreachable(repo_id: str, hub: Hub, error: Exception) -> Unreachable:
    first = str(error).strip().splitlines() or [type(error).__name__]
    return Unreachable(
        f"{repo_id}: cannot download from {hub}: {first[0]}; run again to go on where it stopped, "
        "or give the path of a local folder"
    )


def corrupt(file: str, where: str, expected: object, actual: object) -> UserError:
    return UserError(
        f"{where}: {file} does not match the hub's checksum: expected {expected}, found {actual}; "
        "it was removed, run again to download it anew"
    )
