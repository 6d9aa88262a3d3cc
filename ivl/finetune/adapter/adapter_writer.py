"""Writer of PEFT adapter folders, in the names of the program that will load them.

A LoRA lies on this model's layers; a file names those of a layout (`ivl.checkpoint.layouts`), for peft to find in the
releases' own code (InternLM2's fused `wqkv`) or in transformers' class (the tower's q, k, v apart). With B (rows, rank)
and A (rank, columns) of an update scale · B A:

    several layers → one fused   ranks add up: the As one above the other, the Bs in columns of their own
    one fused layer → several    each gets its rows of B, and the whole A

`ivl.finetune.adapter.adapters` is the way back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ivl.architecture.families import llm_family
from ivl.checkpoint.layouts import Group, groups
from ivl.finetune.adapter.adapters import PREFIX, LowRank
from ivl.finetune.adapter.expert_adapters import stacked_tensors
from ivl.finetune.tune import (
    EMBEDDINGS,
    FSDP_PREFIX,
    HEAD,
    PARTS,
    adapted,
    is_tied,
    lora_config,
    part_of,
)
from ivl.finetune.tune import trainable_state as trained_tensors
from ivl.model.parts import ADAPTER
from ivl.options import LoRA, Tune
from ivl.storage.files import atomic_path
from ivl.types import UserError

if TYPE_CHECKING:
    from ivl.model.internvl import InternVL

Layout = Literal["released", "hf"]

WEIGHTS = "adapter_model.safetensors"
DIGEST = "sha256"
"""Key of the file's metadata: `digest` of its tensors. safetensors itself has no checksum"""
_LISTS = ("layers", "layer")
"""Names of lists of layers, which peft cannot wrap"""


def save_adapter(
    model: InternVL,
    tune: Tune,
    folder: Path,
    base: str,
    state: dict[str, Tensor] | None = None,
    layout: Layout | None = None,
) -> None:
    """Write the LoRA as a PEFT adapter folder (adapter_config.json, adapter_model.safetensors).

    `base` is the checkpoint it belongs to; `state` the tensors to write, by default what trains; `layout` whose names
    the file has, by default those of the folder that the model was read from. A LoRA that started from singular values
    is written with twice its rank, so that it belongs to the base as released: the second half takes away what was
    taken out of the weight (as peft's `path_initial_model_for_weight_conversion`).

    Raises UserError where a DoRA of some of the layers that are one layer there needs weights that are not whole here.
    """
    state = dict(trained_tensors(model) if state is None else state)
    loras = {part: mode for part in PARTS if isinstance(mode := tune.mode(part), LoRA)}
    scales = {
        n: lora.scale
        for n in (name.replace(FSDP_PREFIX, "") for name in adapted(model))
        for lora in [loras[part_of(n)]]
    }
    layout = layout or model.config.layout
    layers, full = _convert(model, _updates(model, state, scales), _full_tensors(model, state), layout)
    first, *_ = loras.values()
    stacked = sorted(name for name, update in layers.items() if update.A.ndim == 3)
    config = lora_config(first, sorted(layers.keys() - set(stacked)))
    config.target_parameters = stacked or None
    config.init_lora_weights = True
    # One scale formula in the file; where a part has the other, its alpha makes up for it.
    config.use_rslora = False
    config.rank_pattern = {n: update.rank for n, update in layers.items()}
    config.alpha_pattern = {n: update.scale * update.rank for n, update in layers.items()}
    # peft has none in front of stacked experts, and it is of no account for answers.
    config.lora_dropout = 0.0 if stacked else max(lora.dropout for lora in loras.values())
    config.modules_to_save = list(_modules(_stored_names(model, layout), full.keys())) or None
    name, _, revision = base.partition("@") if not Path(base).is_dir() else (base, "", "")
    config.base_model_name_or_path, config.revision = name, revision or None
    config.inference_mode = True
    tensors = dict(full)
    tensors |= stacked_tensors({name: (layers[name].A, layers[name].B) for name in stacked})
    for name, update in layers.items():
        if name in stacked:
            continue
        tensors |= {f"{name}.lora_A.weight": update.A, f"{name}.lora_B.weight": update.B}
        if update.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = update.magnitude
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_path(folder / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt", DIGEST: digest(tensors)})
    config.save_pretrained(str(folder))


def _updates(model: InternVL, state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, LowRank]:
    """Layer → its update, on the base as released."""
    updates = {}
    for name, scale in scales.items():
        A, B = (state[f"{name}.lora_{half}.{ADAPTER}.weight"].cpu() for half in "AB")
        if name in model.lora_start:
            first_a, first_b = model.lora_start[name]
            A, B = torch.cat([A, first_a]), torch.cat([B, -first_b], dim=1)
        updates[name] = LowRank(A, B, scale, state.get(f"{name}.lora_magnitude_vector.{ADAPTER}.weight"))
    return updates


def _full_tensors(model: InternVL, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that were trained in full. Embeddings that are the output layer too are there twice: peft puts what
    it saves in full beside the module, and the other would stay the base's."""
    full = {name.replace(".base_layer.", "."): t.cpu() for name, t in state.items() if ".lora_" not in name}
    if is_tied(model) and EMBEDDINGS + ".weight" in full:
        full[HEAD + ".weight"] = full[EMBEDDINGS + ".weight"].clone()
    return full


def _tables(model: InternVL, layout: Layout) -> tuple[list[Group], dict[str, tuple[int, ...]]]:
    """Return the groups of a layout, and the full shapes of the model's tensors."""
    state = type(model).from_config(model.config, device="meta").state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    mixture = model.language_model.config.experts is not None
    name = ("hf-stacked" if mixture else "hf") if layout == "hf" else llm_family(model.config.llm_architecture).layout
    return groups(shapes, name, model.config), shapes


def _stored_names(model: InternVL, layout: Layout) -> set[str]:
    return {name for group in _tables(model, layout)[0] for name in group.stored}


def _convert(
    model: InternVL, updates: dict[str, LowRank], full: dict[str, Tensor], layout: Layout
) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """Updates by layer and full tensors by name, as the layout names and cuts them."""
    table, shapes = _tables(model, layout)
    layers: dict[str, LowRank] = {}
    tensors: dict[str, Tensor] = {}
    for group in table:
        of_group = [updates.get(name.removesuffix(".weight")) for name in group.module]
        if any(of_group):
            converted = _convert_group(model, group, of_group, [shapes[name][0] for name in group.module])
            layers |= zip((name.removesuffix(".weight") for name in group.stored), converted)
        elif any(name in full for name in group.module):
            tensors |= zip(group.stored, group.write([full[name] for name in group.module], model.config))
    return layers, tensors


def _convert_group(model: InternVL, group: Group, updates: list[LowRank | None], rows: list[int]) -> list[LowRank]:
    """The updates of a group's stored layers."""
    if updates[0] is not None and updates[0].A.ndim == 3:
        return _convert_experts(model, group, updates[0])
    present = [update for update in updates if update is not None]
    scale = next((update.scale for update in present if update.scale), 1.0)
    blocks, start, rank = [], 0, sum(len(update.A) for update in present)
    for update, count in zip(updates, rows):
        block = torch.zeros(count, rank)
        if update is not None:
            block[:, start : start + len(update.A)] = update.B * (update.scale / scale)
            start += len(update.A)
        blocks.append(block)
    magnitudes: list[Tensor] | list[None] = [None] * len(group.stored)
    if present[0].magnitude is not None:
        sizes = [
            _magnitude(model, name) if update is None or update.magnitude is None else update.magnitude.cpu()
            for name, update in zip(group.module, updates)
        ]
        magnitudes = group.write(sizes, model.config)
    A = torch.cat([update.A for update in present])
    return [
        LowRank(A.clone(), B, scale, magnitude)
        for B, magnitude in zip(group.write(blocks, model.config), magnitudes, strict=True)
    ]


def _convert_experts(model: InternVL, group: Group, update: LowRank) -> list[LowRank]:
    """The updates of the matrices that a file has of a layer of experts: each gets its rows of B, and the whole A."""
    if len(group.stored) == 1:
        return [update]
    halves = group.write([update.B], model.config)
    A = update.A.repeat_interleave(len(halves) // len(update.A), 0)
    return [LowRank(a.clone(), b.clone(), update.scale) for a, b in zip(A, halves, strict=True)]


def _magnitude(model: InternVL, name: str) -> Tensor:
    """Magnitudes of DoRA for a layer that is not adapted: the norms of its weight's rows."""
    weight = model.get_parameter(name)
    if isinstance(weight, DTensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise UserError(
            f"{name}: a DoRA of some of the layers that are one layer in the adapter's layout needs the others' "
            "weights, which are quantised or split over processes; export it from the run with --adapter_only"
        )
    return weight.detach().float().norm(dim=1).cpu()


def _modules(names: Iterable[str], trained: Iterable[str], prefix: str = "") -> Iterator[str]:
    """The largest modules whose tensors all trained, and that together have them all."""
    inside = {name for name in names if name.startswith(prefix)}
    trained = {name for name in trained if name.startswith(prefix)}
    for child in dict.fromkeys(name[len(prefix) :].partition(".")[0] for name in sorted(inside)):
        module = f"{prefix}{child}"
        tensors = {name for name in inside if name.startswith(module + ".")}
        if tensors and tensors <= trained and child not in _LISTS:
            yield module
        elif tensors & trained:
            yield from _modules(tensors, trained, module + ".")


def digest(state: Mapping[str, Tensor]) -> str:
    """A checksum of tensors, their names, dtypes and shapes."""
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
