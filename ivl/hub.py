"""A name or a path → a local checkpoint folder. Weights are safetensors; a checkpoint's `.py` files are only ever copied."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ivl.families import find_model
from ivl.types import UserError

Hub = Literal["huggingface", "modelscope"]

WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
"""Files of a release that are needed to load it, and to write it back so that other engines read it"""


def resolve(
    name_or_path: str | Path,
    hub: Hub = "huggingface",
    token: str | None = None,
    revision: str | None = None,
    offline: bool | None = None,
) -> Path:
    """The local folder of a checkpoint: a folder as it is, else from the hub's cache, else downloaded.

    `name_or_path`: a folder, a name of `ivl.families` (`internvl2-2b`) or a hub's id (`OpenGVLab/InternVL2-2B`).
    Raises UserError where there is no such model or it cannot be had.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    row = find_model(str(name_or_path))
    repo_id = str(name_or_path) if row is None else row.id_on(hub)
    if "/" not in repo_id or path.is_absolute():
        raise UserError(
            f"{name_or_path}: neither a folder nor a model this program knows; "
            f"give a local folder, a hub id (OWNER/NAME) or a name that `python -m ivl models` lists"
        )
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        repo_id, revision=revision, token=token, allow_patterns=list(WANTED), local_files_only=bool(offline)
    )
    return Path(folder)
