"""Newest undamaged checkpoint of a run, by the step that each file holds."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ivl.checkpoint.ckpt_file import damage
from ivl.errors import note

Warn = Callable[[str], None]
"""Function that is told of checkpoints that are passed over"""


@dataclass(frozen=True)
class CheckpointHead:
    """Step and experiment of a checkpoint file."""

    path: Path
    step: int
    experiment: dict[str, Any] | None = None
    """None in older checkpoints and in folders of DeepSpeed"""
    epoch_ended: bool = True
    """True if the next row is the first of an epoch"""


def read_head(path: Path) -> CheckpointHead | None:
    """Read step and experiment of a checkpoint, without its tensors; None where it cannot be read."""
    file = next(iter(sorted(path.rglob("*model_states.pt"))), path) if path.is_dir() else path
    try:
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                return None
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        step, experiment = int(content["global_step"]), content.get("experiment")
    except Exception:  # noqa: BLE001  (torch and zipfile raise many kinds for bytes that are no checkpoint)
        return None
    try:
        loader = content["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        ended = not loader or not loader[0]["done"]
    except (KeyError, TypeError, IndexError):
        ended = True
    return CheckpointHead(path, step, experiment, ended)


def newest_checkpoint(folders: Iterable[Path], warn: Warn = note) -> Path | None:
    """Return the undamaged checkpoint of the highest step in `checkpoints` folders; warns of damaged ones.

    Of several folders, the one that was written to last counts.
    """
    for folder in sorted(folders, key=_last_written, reverse=True):
        if (head := furthest(read_heads(folder.glob("*.ckpt"), warn), warn)) is not None:
            return head.path
    return None


def _last_written(folder: Path) -> int:
    return max((path.stat().st_mtime_ns for path in folder.glob("*.ckpt")), default=0)


def read_heads(paths: Iterable[Path], warn: Warn) -> list[CheckpointHead]:
    """Read the heads of checkpoints; folders of DeepSpeed get the step of their names, or -1."""
    heads = []
    for path in paths:
        head = read_head(path)
        if head is None and path.is_dir() and damage(path) is None:
            head = CheckpointHead(path, _step_of_name(path))
        if head is None:
            warn(f"{path}: {damage(path) or 'not a checkpoint of a run'}; passed over")
        else:
            heads.append(head)
    return heads


def _step_of_name(path: Path) -> int:
    digits = path.stem.partition("step=")[2].partition("-")[0]
    return int(digits) if digits.isdigit() else -1


def furthest(heads: list[CheckpointHead], warn: Warn) -> CheckpointHead | None:
    """Return the undamaged checkpoint of the highest step; of the same step, the one that was written last."""
    for head in sorted(heads, key=lambda h: (h.step, h.path.stat().st_mtime_ns), reverse=True):
        if (problem := damage(head.path)) is None:
            return head
        warn(f"{head.path}: {problem}; passed over")
    return None
