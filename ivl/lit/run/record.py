"""Record of a fit beside its config, versions.json: command, versions, rows and their digests, base, seed, devices.

`python -m ivl reproduce RUN` compares it with what is here today; an export's model card is written from it.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ivl
from ivl.checkpoint.fingerprint import files_fingerprint
from ivl.hub import commit_of, resolve
from ivl.run import SCORES, Run
from ivl.storage.files import write_json, write_text

if TYPE_CHECKING:  # `python -m ivl reproduce` starts without Lightning
    from lightning.pytorch import Trainer

    from ivl.lit.types import RunData

PACKAGES = ("torch", "lightning", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pillow")
EXTRAS = ("torchvision", "accelerate", "av", "bitsandbytes", "deepspeed", "flash-attn", "pyarrow")
"""Packages that are recorded where they are installed"""
_SECRET = re.compile(r"(--[\w.]*(?:token|key|password|secret))(?:=.*)?", re.IGNORECASE | re.DOTALL)


def record_of(trainer: Trainer, data: RunData, pretrained: str, seed: Any) -> dict[str, Any]:
    """Return the record of a fit that begins."""
    digests, rows = data.fingerprints()
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "folder": str(Path.cwd()),
        "command": shlex.join(["python", "-m", "ivl", *without_secrets(sys.argv[1:])]),
        "seed": seed,
        "processes": trainer.world_size,
        "nodes": trainer.num_nodes,
        "device": device_name(trainer),
        "base": base_identity(pretrained),
        "versions": versions(),
        "data": digests,
        "rows": rows,
    }


def save_record(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=2) + "\n")


def add_scores(folder: Path, step: int, scores: dict[str, dict[str, float]]) -> None:
    """Add the scores of a run's last validation to `scores.json` in its folder, which keeps those of earlier fits."""
    entries = [entry for entry in Run(folder).scores if entry["step"] != step]
    write_json(folder / SCORES, {"fits": [*entries, {"step": step, "scores": scores}]})


def versions() -> dict[str, str]:
    """Versions of python and of the packages that compute, and the commit of this package in a checkout."""
    # of the code that runs, which need not be the installed one
    versions = {"python": platform.python_version(), "ivl": ivl.__version__}
    for name in (*PACKAGES, *EXTRAS):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a folder, not installed
            if name in PACKAGES:
                versions[name] = "not installed"
    folder = Path(__file__).resolve().parents[3]
    if (folder / ".git").exists():
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            versions["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            versions["commit"] = "unknown"
    return versions


def base_identity(pretrained: str, offline: bool | None = None) -> dict[str, str | None]:
    """Name of a checkpoint, its commit on a hub, and a digest of its config and weights.

    Raises UserError where it is not here and `offline`.
    """
    folder = resolve(pretrained, offline=offline)
    return {"name": pretrained, "commit": commit_of(folder), "digest": files_fingerprint(folder)}


def device_name(trainer: Trainer) -> str:
    """Name of the kind of device that a run computes on."""
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return device.type
    import torch

    return torch.cuda.get_device_name(device)


def without_secrets(argv: list[str]) -> list[str]:
    """Leave out the values of options such as `--…api_key`."""
    words, hidden = [], False
    for word in argv:
        match = None if hidden else _SECRET.fullmatch(word)
        words.append("..." if hidden else f"{match[1]}=..." if match and "=" in word else word)
        hidden = match is not None and "=" not in word
    return words
