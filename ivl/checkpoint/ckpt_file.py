"""Reader of a run's checkpoint files (`*.ckpt`, `weights.pt`), for every command.

The file is a zip archive as torch.save writes it: each member is stored as it is and has a checksum. A file whose
checksums do not hold, that is compressed (and so could be made to fill any memory), or that is another program's is
refused. Nothing in it is unpickled but tensors and plain values.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ivl.types import UserError

PREFIX = "model."
"""Prefix of names in a run's `state_dict`: the model is a member of its LightningModule"""


def read_ckpt(path: str | Path, map_location: Any = "cpu", needed: Collection[str] = ("state_dict",)) -> dict[str, Any]:
    """Return the content of a checkpoint file, mapped into memory: a process reads only what it takes.

    `needed`: keys that must be there. Raises UserError where the file is missing, damaged, or no checkpoint of a run.
    """
    if (problem := damage(path)) is not None:
        raise UserError(f"{path}: {problem}; give another one, or the newest whole one by --ckpt_path last")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"{path}: not a checkpoint of this program's: {_first_line(error)}; expected a file that `fit` has written"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint of this program's: it holds a {type(content).__name__}")
    for key, expected, right in _CONTENT:
        value = content.get(key)
        if not right(value) if value is not None else key in needed:
            kind = "nothing" if value is None else f"another {type(value).__name__}"
            raise UserError(
                f"{path}: not a checkpoint of this program's: {key}: expected {expected}, found {kind}; give a file "
                "that `fit` has written"
            )
    return content


def trained_state(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors that a run has trained, in the model's names. Raises UserError as `read_ckpt` does."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in read_ckpt(path)["state_dict"].items()}


def best_beside(path: str | Path) -> str | None:
    """Describe a run's checkpoint and the best one beside it by its monitored metric, for people to choose; None where
    there is no other.
    """
    content = read_ckpt(path)
    for state in (content.get("callbacks") or {}).values():
        if not isinstance(state, dict) or state.get("monitor") in (None, "step", "epoch"):
            continue
        best = Path(path).parent / Path(str(state.get("best_model_path"))).name
        if best.is_file() and best.name != Path(path).name:
            step, other = content.get("global_step"), read_ckpt(best).get("global_step")
            if step != other:
                return f"step {step}; the best by {state['monitor']} is that of step {other}: {best}"
    return None


def damage(path: str | Path) -> str | None:
    """Describe the damage of a checkpoint file, by the checksums in it; None where it is intact.

    A folder is DeepSpeed's: all files in it are looked at. Takes the time to read the file once, and no memory.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.rglob("*.pt"))
        return next(filter(None, map(damage, files)), None) if files else "an empty folder"
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            # torch stores members as they are. Others are not decompressed, not even to look at their checksums.
            if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in members):
                return "not a checkpoint: its members are compressed, which torch.save never does"
            if sum(m.file_size for m in members) > path.stat().st_size:
                return "not a checkpoint: its members are larger than the file"
            broken = file.testzip()
        return f"damaged (checksum of {broken})" if broken else None
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except Exception as error:  # noqa: BLE001  (zipfile raises many kinds for bytes that are no archive)
        return f"not a whole checkpoint ({_first_line(error)})"


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and name.startswith(PREFIX) and isinstance(tensor, Tensor)
        for name, tensor in value.items()
    )


def _is_loops(value: Any) -> bool:
    fit = value.get("fit_loop") if isinstance(value, dict) else None
    return isinstance(fit, dict) and "epoch_loop.batch_progress" in fit and isinstance(fit.get("state_dict"), dict)


_CONTENT: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("pytorch-lightning_version", "a version", lambda value: isinstance(value, str)),
    ("state_dict", f"tensors whose names begin with {PREFIX!r}", _is_state),
    ("loops", "the positions of a fit", _is_loops),
    ("global_step", "a whole number", lambda value: isinstance(value, int)),
)
"""Keys of a run's checkpoint, each with a description and a test of its value"""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
