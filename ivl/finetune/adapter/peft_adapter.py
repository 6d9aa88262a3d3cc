"""Reader of PEFT adapter folders; merge of LoRAs into the weights. Writer: `adapter_writer`.

A part (or a piece of one) that trained in full goes along as peft's `modules_to_save`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ivl.architecture.families import find_model
from ivl.finetune.adapter import adapters
from ivl.finetune.adapter.adapter_config import AdapterConfig
from ivl.finetune.adapter.adapter_writer import DIGEST, WEIGHTS, digest
from ivl.finetune.adapter.adapter_writer import save_adapter as save_adapter
from ivl.finetune.adapter.adapters import Adapter
from ivl.finetune.tune import PARTS, adapted, inject
from ivl.model.parts import ADAPTER
from ivl.parallel.devices import check_at_hand
from ivl.types import UserError, first_few

if TYPE_CHECKING:
    from ivl.model.internvl import InternVL


def has_adapter(model: InternVL) -> bool:
    """True if the model has a LoRA layer."""
    return bool(adapted(model))


def load_adapter(model: InternVL, folder: str | Path) -> Adapter:
    """Put a PEFT adapter folder onto the model: LoRA layers and fully tuned parts. Strict in names and shapes.

    One that another program made, in the names of the releases' own code or of transformers, is translated first.
    Returns it in this model's names.

    Raises UserError where a file is missing or damaged, has weights or settings that are not known here, or the
    adapter does not fit this model.
    """
    from peft import LoraConfig

    adapter = read_adapter(model, folder)
    config = adapter.config
    if adapter.ranks:
        settings = LoraConfig(
            target_modules=list(adapter.ranks),
            rank_pattern=adapter.ranks,
            alpha_pattern=adapter.alphas,
            lora_dropout=config.dropout,
            use_dora=config.dora,
        )
        inject(model, settings)
    model.requires_grad_(False)
    put_adapter(model, adapter, str(folder))
    return adapter


def read_adapter(model: InternVL, folder: str | Path) -> Adapter:
    """An adapter folder in this model's names. Raises UserError as `load_adapter`."""
    check_at_hand(model)
    folder = Path(folder)
    config = AdapterConfig.load(folder)
    try:
        return adapters.translated(model, read_tensors(folder), config)
    except UserError as error:
        raise UserError(f"{folder}: {error}{_base_note(config)}") from error


def put_adapter(model: InternVL, adapter: Adapter, where: str) -> None:
    """Copy an adapter's tensors into a model whose layers are in place. Raises UserError where they do not fit."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # peft makes it in the dtype of the layer; a merge adds it before rounding
            parameter.data = parameter.data.float()
    parameters = {_peft_key(n): p for n, p in model.named_parameters()}
    problems = [f"missing {k}" for k in sorted(k for k in parameters if "lora_" in k and k not in adapter.state)]
    problems += [f"unexpected {k}" for k in sorted(set(adapter.state) - set(parameters))]
    problems += [
        f"{k}: expected {tuple(parameters[k].shape)}, found {tuple(t.shape)}"
        for k, t in sorted(adapter.state.items())
        if k in parameters and parameters[k].shape != t.shape
    ]
    if problems:
        raise UserError(
            f"{where}: the adapter does not fit this model ({len(problems)} tensors): {'; '.join(problems[:5])}"
            f"{_base_note(adapter.config)}"
        )
    with torch.no_grad():
        for key, tensor in adapter.state.items():
            parameters[key].copy_(tensor)


def _base_note(config: AdapterConfig) -> str:
    return f"; it was made for {config.base!r}" if config.base else ""


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all trained tensors of an adapter folder: its file, and the tower that ms-swift puts beside it.

    Raises UserError where a file is missing or damaged, or other weights lie beside it.
    """
    others = [p.name for p in sorted(folder.iterdir()) if p.suffix in _ENDINGS and not _PASSED.fullmatch(p.name)]
    if unread := [name for name in others if name not in (WEIGHTS, TOWER)]:
        raise UserError(
            f"beside it lie {first_few(unread)}, which may be trained weights and are not read here; move them away if "
            "they are not part of the adapter"
        )
    state = _load(folder / WEIGHTS)
    if not state:
        raise UserError(f"{WEIGHTS} holds no tensors; save the adapter again, all processes' weights gathered")
    if TOWER in others:
        state = _load(folder / TOWER) | state
    return state


TOWER = "vit.safetensors"
"""File of ms-swift: the vision encoder and the projector, trained in full beside a LoRA"""
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz")
_PASSED = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|adapter_model).*\.(bin|pt|pth)")
"""State of a training, not of the model; and peft's older file beside the one that is read"""


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file() and path.with_suffix(".bin").is_file():
        raise UserError(
            f"there is only {path.with_suffix('.bin').name}, a pickle, which is never opened here; load it with peft "
            "and save it again, which writes safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get(DIGEST)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path.name} cannot be read ({error}); expected the weights of a PEFT adapter") from error
    if expected is not None and digest(state) != expected:
        raise UserError(f"{path.name} is damaged: its tensors are not those that were written; take another copy")
    return state


def merge(model: InternVL) -> None:
    """Add every LoRA to the weights under it, in float32, and leave plain linear layers in the dtypes they had.

    Raises UserError where the weights under it are quantised, or a merged weight is not finite.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
        linear = layer.get_base_layer()
        dtype = linear.weight.dtype
        if not dtype.is_floating_point:
            raise UserError(f"{name}: a LoRA cannot be merged into {dtype} weights; load the model without quantize")
        layer.float()
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise UserError(f"{name}: the merged weight is not finite; the adapter is damaged or diverged") from error
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, linear.to(dtype).requires_grad_(False))


def _peft_key(name: str) -> str:
    """Our parameter's name → its name in a PEFT adapter file."""
    name = name.replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
    return adapters.PREFIX + name.replace(f".{ADAPTER}.", ".").replace(".base_layer.", ".")


def adapted_parts(folder: str | Path) -> list[str]:
    """Return the parts of the model that an adapter folder changes. Raises UserError where it has no weights."""
    parts: set[str] = set()
    for name in (WEIGHTS, TOWER):
        path = Path(folder) / name
        if name == TOWER and not path.is_file():
            continue
        try:
            with safe_open(path, framework="pt") as file:
                parts |= {adapters.part_in_file(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); expected the weights of a PEFT adapter") from error
    return [part for part in PARTS if part in parts]


def base_of(folder: str | Path, base: str | None, option: str) -> str:
    """The checkpoint to put an adapter on: `base`, or the one that the adapter names. `option`: where `base` is given.

    Raises UserError where the adapter names none, or one that is not here.
    """
    config = AdapterConfig.load(Path(folder))
    if base:
        return base
    if not config.base:
        raise UserError(f"{folder}: the adapter does not say what it belongs to; name its model with {option}")
    if not Path(config.base).is_dir() and find_model(config.base) is None and not _HUB_ID.fullmatch(config.base):
        raise UserError(
            f"{folder}: the adapter was made for {config.base!r}, which is not on this machine; name that model, or "
            f"where it is now, with {option}"
        )
    return config.base


def other_base(folder: str | Path, base: str) -> str | None:
    """A line for people where an adapter names another checkpoint than the one it is put on."""
    named = AdapterConfig.load(Path(folder)).base
    if not named or _stem(named) == _stem(base):
        return None
    return f"{folder}: the adapter says that it was made for {named}, and is put on {base}"


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def _stem(name: str) -> str:
    """A model's name without its place: the last part of a path or an id, of a hub's cache the name in it."""
    row, path = find_model(name), Path(name.partition("@")[0])
    snapshots = [part for part in path.parts if part.startswith("models--")]
    stem = snapshots[-1].rpartition("--")[2] if snapshots else (path.resolve() if path.is_dir() else path).name
    return row.name if row else re.sub(r"[^a-z0-9]+", "-", stem.lower())
