"""Remedies for folders and names that are no model's or no adapter's: run, cache, data set, or another kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ivl.architecture.config import Config, read_json
from ivl.architecture.config_fields import shown
from ivl.architecture.hf_config import is_hf
from ivl.errors import UserError, first_few
from ivl.hub.unsupported import refuse_config

ADAPTER, RUN = "adapter_config.json", "config.yaml"
MODEL = "is a model, not an adapter; give it with --model (chat), --base (export) or --model.pretrained (fit, predict)"


def check_model_folder(folder: Path, where: object = None) -> None:
    """Raise UserError where a folder is of another known kind than a model's. `where`: its name in the message."""
    where = where or folder
    if not (folder / "config.json").is_file():
        if remedy := _describe_folder(folder):
            raise UserError(f"{where}: {remedy}")
        return
    raw = read_json(folder / "config.json")
    refuse_config(raw, where)
    for part in (raw, raw.get("llm_config"), raw.get("text_config")):
        if isinstance(part, dict) and (name := quantisation(part.get("quantization_config"))):
            raise UserError(
                f"{where}: its weights are quantised ({name}), a form that is not read here; take the release that it "
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


def check_repository(folder: Path, adapter: bool, repo_id: str) -> None:
    """Raise UserError where a hub's repository holds another kind than asked for.

    `folder`: its config.json and adapter_config.json, as far as it has them; nothing larger is downloaded before.
    """
    if adapter:
        if not (folder / ADAPTER).is_file():
            kind = MODEL if (folder / "config.json").is_file() else f"no {ADAPTER}; expected a PEFT adapter"
            raise UserError(f"{repo_id}: {kind}")
        return
    check_model_folder(folder, repo_id)
    if not (folder / "config.json").is_file():
        raise UserError(f"{repo_id}: not a checkpoint this program can read: it has no config.json")
    raw = read_json(folder / "config.json")
    if is_hf(raw):
        return
    if not {"vision_config", "llm_config"} <= raw.keys():
        kind = (raw.get("architectures") or [raw.get("model_type") or "unknown"])[0]
        raise UserError(
            f"{repo_id}: is no InternVL chat model (its config.json is of {shown(kind)}); `python -m ivl models` lists "
            "those that can be loaded"
        )
    Config.from_dict(raw, f"{repo_id}: config.json")


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
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give the adapter's folder, {folder.parent}")
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
        raise UserError(f"{folder}: {MODEL}")
    raise UserError(f"{folder}: no {ADAPTER}; expected a PEFT adapter's folder")


def is_run(folder: Path) -> bool:
    """True for the folder of a run of `fit`."""
    return (folder / RUN).is_file() and ((folder / "checkpoints").is_dir() or (folder / "adapter").is_dir())
