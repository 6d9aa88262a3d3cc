"""Remedies for folders that are no model's or no adapter's: run, cache, or another kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ivl.architecture.config import read_json
from ivl.errors import UserError, first_few
from ivl.hub.unsupported import refuse_config

ADAPTER, RUN = "adapter_config.json", "config.yaml"


def check_model_folder(folder: Path) -> None:
    """Raise UserError where a folder is of another known kind than a model's."""
    if not (folder / "config.json").is_file():
        if remedy := _describe_folder(folder):
            raise UserError(f"{folder}: {remedy}")
        return
    raw = read_json(folder / "config.json")
    refuse_config(raw, folder)
    for part in (raw, raw.get("llm_config"), raw.get("text_config")):
        if isinstance(part, dict) and (name := quantisation(part.get("quantization_config"))):
            raise UserError(
                f"{folder}: its weights are quantised ({name}), a form that is not read here; take the release that it "
                "was made from, and --quantize int8 or nf4 (model.quantize) for the same memory"
            )


def quantisation(settings: Any) -> str | None:
    """Name of a form of quantised weights that is not read; the 8 bits of bitsandbytes are."""
    if not isinstance(settings, dict) or settings.get("load_in_8bit") is True:
        return None
    method = str(settings.get("quant_method") or settings.get("quantization_method") or "")
    if settings.get("load_in_4bit") is True:
        return "bitsandbytes, 4 bits"
    return method.upper() or None


def _describe_folder(folder: Path) -> str | None:
    if (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        return (
            "is a PEFT adapter, not a model; give it with --adapter (chat, export) or --model.adapter (predict), and "
            f"the model that it was made for{f' ({base})' if base else ''} in its place"
        )
    if is_run(folder):
        return "is a run, not a model; give it with --ckpt_path (chat, predict) or --run (export)"
    for repo in (folder, *sorted(folder.glob("models--*")), *sorted(folder.glob("hub/models--*"))):
        if snapshots := [path for path in sorted(repo.glob("snapshots/*")) if (path / "config.json").exists()]:
            return f"is a hub's cache; give the model's OWNER/NAME, or a folder in it, such as {snapshots[-1]}"
    if inside := sorted(path.parent.name for path in folder.glob("*/config.json")):
        return f"no config.json, but there is one in {first_few(inside, 3)}; give that folder: {folder / inside[0]}"
    return None


def check_adapter_folder(folder: Path) -> None:
    """Raise UserError where a folder that was given for an adapter's has no adapter_config.json."""
    if (folder / ADAPTER).is_file():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a PEFT adapter ({ADAPTER}, adapter_model.safetensors)")
    if (folder / "adapter" / ADAPTER).is_file():
        raise UserError(
            f"{folder}: is a run, not an adapter; give its adapter, {folder / 'adapter'}, or the run itself with "
            "--ckpt_path (chat, predict) or --run (export)"
        )
    if is_run(folder):
        raise UserError(
            f"{folder}: is a run, not an adapter; give it with --ckpt_path (chat, predict) or --run (export)"
        )
    if (folder / "config.json").is_file():
        raise UserError(f"{folder}: is a model, not an adapter; give it with --model (chat), --base (export)")
    raise UserError(f"{folder}: no {ADAPTER}; expected a PEFT adapter's folder")


def is_run(folder: Path) -> bool:
    """True for the folder of a run of `fit`."""
    return (folder / RUN).is_file() and ((folder / "checkpoints").is_dir() or (folder / "adapter").is_dir())
