"""LoRA in and out: the PEFT adapter folder, and merging into the weights.

A part (or a piece of one) that trained in full goes along as peft's `modules_to_save`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ivl.config import read_json
from ivl.model import adapters
from ivl.model.devices import check_at_hand
from ivl.model.tune import ADAPTER, PARTS, LoRA, Tune, adapted, inject, lora_config, part_of, scale_alpha
from ivl.model.tune import trainable_state as trained_tensors
from ivl.types import UserError

if TYPE_CHECKING:
    from ivl.model.internvl import InternVL


def has_adapter(model: InternVL) -> bool:
    """Whether any LoRA layer is in place."""
    return bool(adapted(model))


def save_adapter(model: InternVL, tune: Tune, folder: Path, base: str, state: dict[str, Tensor] | None = None) -> None:
    """Write the LoRA as a PEFT adapter folder (adapter_config.json, adapter_model.safetensors).

    `base` is the checkpoint it belongs to; `state` the tensors to write, by default what trains. A LoRA that started
    from singular values is written with twice its rank, so that it belongs to the base as released: the second half
    takes away what was taken out of the weight (as peft's `path_initial_model_for_weight_conversion`).
    """
    loras = {part: mode for part in PARTS if isinstance(mode := tune.mode(part), LoRA)}
    layers = {n: loras[part_of(n)] for n in adapted(model)}
    first, *_ = loras.values()
    config = lora_config(first, sorted(layers))
    config.init_lora_weights = True
    config.rank_pattern = {n: lora.rank * (2 if n in model.lora_start else 1) for n, lora in layers.items()}
    # One scale formula in the file; where a part has the other, its alpha makes up for it.
    config.use_rslora = False
    config.alpha_pattern = {
        n: scale_alpha(lora) * (lora.rank**0.5 if lora.rslora else 1) * config.rank_pattern[n] / lora.rank
        for n, lora in layers.items()
    }
    config.lora_dropout = max(lora.dropout for lora in loras.values())
    state = dict(trained_tensors(model) if state is None else state)
    config.modules_to_save = list(_covering(model, {n for n in state if "lora_" not in n})) or None
    config.base_model_name_or_path = base
    config.inference_mode = True
    for name, (a, b) in model.lora_start.items():
        key_a, key_b = (f"{name}.lora_{m}.{ADAPTER}.weight" for m in "AB")
        state[key_a] = torch.cat([state[key_a].cpu(), a])
        state[key_b] = torch.cat([state[key_b].cpu(), -b], dim=1)
    folder.mkdir(parents=True, exist_ok=True)
    state = {_peft_key(n): t.contiguous().cpu() for n, t in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _covering(model: nn.Module, names: set[str], prefix: str = "") -> Iterator[str]:
    """The largest modules whose parameters are all in `names`, and that together have them all."""
    for child, module in model.named_children():
        own = {f"{prefix}{child}.{n}" for n, _ in module.named_parameters(remove_duplicate=False)}
        if own and own <= names:
            yield prefix + child
        elif own & names:
            yield from _covering(module, names, f"{prefix}{child}.")


def load_adapter(model: InternVL, folder: str | Path) -> None:
    """Put a PEFT adapter folder onto the model: LoRA layers and fully tuned parts. Strict in names and shapes.

    One that another program made, in the names of the releases' own code or of transformers, is translated first.

    Raises UserError where a file is missing or damaged, or the adapter does not fit this model.
    """
    from peft import LoraConfig

    check_at_hand(model)
    folder = Path(folder)
    settings = read_json(folder / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{folder}/adapter_config.json: expected peft_type LORA, found {settings.get('peft_type')!r}")
    path = folder / "adapter_model.safetensors"
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected the weights of a PEFT adapter") from error
    try:
        foreign = adapters.translated(model, state, settings)
    except UserError as error:
        raise UserError(f"{path}: {error}; it was made for {settings.get('base_model_name_or_path')!r}") from error
    if foreign is None:
        config = LoraConfig.from_pretrained(str(folder))
        config.modules_to_save = None  # our modules stay as they are; peft would wrap them
    else:
        names, state = foreign.ranks, foreign.state
        config = LoraConfig(target_modules=list(names), rank_pattern=names, alpha_pattern=foreign.alphas)
        config.use_dora = foreign.dora
    inject(model, config)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # peft makes it in the dtype of the layer; a merge adds it before rounding
            parameter.data = parameter.data.float()
    own = {_peft_key(n): p for n, p in model.named_parameters()}
    wanted = {k for k in own if "lora_" in k} | {
        k for k in own for part in settings.get("modules_to_save") or () if k.startswith(f"base_model.model.{part}.")
    }
    problems = [f"missing {k}" for k in sorted(wanted - set(state))]
    problems += [f"unexpected {k}" for k in sorted(set(state) - set(own))]
    problems += [
        f"{k}: expected {tuple(own[k].shape)}, found {tuple(t.shape)}"
        for k, t in sorted(state.items())
        if k in own and own[k].shape != t.shape
    ]
    if problems:
        raise UserError(
            f"{path}: the adapter does not fit this model ({len(problems)} tensors): {'; '.join(problems[:5])}; "
            f"it was made for {settings.get('base_model_name_or_path')!r}"
        )
    with torch.no_grad():
        for key, tensor in state.items():
            own[key].copy_(tensor)


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
    return "base_model.model." + name.replace(f".{ADAPTER}.", ".").replace(".base_layer.", ".")


def adapted_parts(folder: str | Path) -> list[str]:
    """The parts of the model that an adapter folder changes. Raises UserError where it has no weights."""
    path = Path(folder) / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            found = {adapters.part_of(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected the weights of a PEFT adapter") from error
    return [part for part in PARTS if part in found]


def adapter_base(folder: str | Path) -> str | None:
    """The checkpoint an adapter folder says it belongs to."""
    return read_json(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
