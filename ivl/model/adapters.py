"""PEFT adapters made by other programs: their names and shapes → this model's, exactly.

They name the layers of the model they were trained on: the releases' own code (InternLM2's fused `wqkv`), transformers'
class (the tower's q, k, v apart), or the language model alone. What `ivl.model.layouts` does to weights is done here to
low-rank pairs, with B (rows, rank) and A (rank, columns) of an update scale · B A:

    one fused layer → several   each gets its rows of B, and the whole A
    several layers → one fused  ranks add up: the As one above the other, the Bs block by block
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivl.model.layouts import LAYOUTS, Group, groups
from ivl.types import UserError

if TYPE_CHECKING:
    from ivl.model.internvl import InternVL

_PREFIX = "base_model.model."
_LOW_RANK = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
_ALONE = {"model.layers.": "language_model.", "encoder.layers.": "vision_model.", "encoder.layer.": "vision_tower."}
"""How names begin where a part was adapted by itself → what is missing before them"""


@dataclass
class _Pair:
    """A low-rank update of one layer."""

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None
    """(rows,) of DoRA"""


@dataclass
class Adapter:
    """An adapter in this model's names: what `peft.LoraConfig` needs, and the tensors of its file."""

    ranks: dict[str, int] = field(default_factory=dict)
    """Layer → rank; the layers that are adapted"""
    alphas: dict[str, float] = field(default_factory=dict)
    """Layer → alpha; the update is multiplied by alpha / rank"""
    dora: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)
    """Under peft's names"""

    def add(self, layer: str, pair: _Pair) -> None:
        self.ranks[layer] = len(pair.A)
        self.alphas[layer] = pair.scale * len(pair.A)
        self.state |= {f"{_PREFIX}{layer}.lora_A.weight": pair.A, f"{_PREFIX}{layer}.lora_B.weight": pair.B}
        if pair.magnitude is not None:
            self.state[f"{_PREFIX}{layer}.lora_magnitude_vector"] = pair.magnitude


def translated(model: InternVL, state: dict[str, Tensor], settings: dict[str, Any]) -> Adapter | None:
    """An adapter file's tensors in this model's names; None where they are in these already.

    `settings`: its adapter_config.json. Raises UserError where it names a layer that the model has in no layout.
    """
    own = [name for name, _ in model.named_parameters()]
    tensors = {_full_name(key): key for key in state}
    low_rank = {name: (found[1], found[2]) for name in tensors if (found := _LOW_RANK.fullmatch(name))}
    weights = {low_rank[name][0] + ".weight" if name in low_rank else name for name in tensors}
    if weights <= set(own) and all(key == _PREFIX + name for name, key in tensors.items()):
        return None
    table = _groups(own, weights)
    adapter = Adapter(dora=bool(settings.get("use_dora")))
    pairs = _pairs({half: (tensors[name], state[tensors[name]]) for name, half in low_rank.items()}, settings)
    for group in {id(table[n]): table[n] for n in weights}.values():
        inside = [name.removesuffix(".weight") for name in group.stored]
        if any(name in pairs for name in inside):
            for name, pair in _moved(model, group, [pairs.get(name) for name in inside]):
                adapter.add(name, pair)
        else:
            if missing := [name for name in group.stored if name not in tensors]:
                raise UserError(f"the adapter has {group.stored[0]} without {missing[0]}; they are one tensor here")
            whole = group.read([state[tensors[name]] for name in group.stored], model.config)
            adapter.state |= {_PREFIX + name: tensor for name, tensor in zip(group.module, whole)}
    return adapter


def part_of(key: str) -> str:
    """The part of the model that a tensor of an adapter file belongs to."""
    name = _full_name(key).removeprefix("model.")
    top, *inside = name.split(".")
    if top == "mlp1" or top == "multi_modal_projector":
        return "mlp1"
    if top in ("vision_model", "vision_tower"):
        return "vision_model"
    ends = {"embed_tokens": "embeddings", "tok_embeddings": "embeddings", "lm_head": "head", "output": "head"}
    return next((ends[word] for word in (top, *inside) if word in ends), "language_model")


def _full_name(key: str) -> str:
    """A key without peft's wrappings (one around the model, or one around each part), and with the part's name."""
    name = key.replace(_PREFIX, "")
    return next((part + name for start, part in _ALONE.items() if name.startswith(start)), name)


def _groups(own: Iterable[str], wanted: set[str]) -> dict[str, Group]:
    """Name of an adapter's tensor → how the model has it, in the layout that knows all of them."""
    unknown: list[str] = []
    for layout in LAYOUTS:
        table = {name: group for group in groups(own, layout) for name in group.stored}
        if not (missing := sorted(wanted - table.keys())):
            return table
        if not unknown or len(missing) < len(unknown):
            unknown = missing
    raise UserError(
        f"the adapter does not fit this model: {len(unknown)} of its {len(wanted)} layers are not in it in any layout, "
        f"{unknown[0]} among them; is it for another model?"
    )


def _pairs(halves: dict[tuple[str, str], tuple[str, Tensor]], settings: dict[str, Any]) -> dict[str, _Pair]:
    """Layer → its low-rank pair, scaled as its own program would; `halves`: (layer, kind) → key in the file, tensor.

    Raises UserError where a half is missing.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    named: dict[str, str] = {}
    for (layer, kind), (key, tensor) in halves.items():
        parts.setdefault(layer, {})[kind] = tensor
        named[layer] = key.rpartition(f".{kind}")[0].removeprefix(_PREFIX)
    pairs = {}
    for layer, found in parts.items():
        if missing := {"lora_A", "lora_B"} - found.keys():
            raise UserError(f"the adapter has {layer} without its {missing.pop()}; the file is damaged")
        A, B = found["lora_A"], found["lora_B"]
        patterns = settings.get("alpha_pattern") or {}
        known = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", named[layer]))
        alpha = next(known, settings.get("lora_alpha", len(A)))
        scale = alpha / (len(A) ** 0.5 if settings.get("use_rslora") else len(A))
        pairs[layer] = _Pair(A, B, scale, found.get("lora_magnitude_vector"))
    return pairs


def _moved(model: InternVL, group: Group, pairs: list[_Pair | None]) -> list[tuple[str, _Pair]]:
    """The pairs of a group's stored layers as those of the model's layers."""
    names = [name.removesuffix(".weight") for name in group.module]
    there = [pair for pair in pairs if pair is not None]
    if len(pairs) == 1:
        (pair,) = there
        halves = group.read([pair.B], model.config)
        magnitudes = [None] * len(halves) if pair.magnitude is None else group.read([pair.magnitude], model.config)
        return [(n, _Pair(pair.A.clone(), b, pair.scale, m)) for n, b, m in zip(names, halves, magnitudes)]
    if len(there) < len(pairs) and there[0].magnitude is not None:
        raise UserError(
            f"{names[0]}: a DoRA of some of the layers that are one layer here has no exact form; adapt all of them"
        )
    rows = len(model.get_parameter(group.module[0])) // len(pairs)
    scale = there[0].scale
    blocks = [torch.zeros(rows, 0) if p is None else p.B.float() * (p.scale / scale) for p in pairs]
    magnitudes = [pair.magnitude for pair in there if pair.magnitude is not None]
    magnitude = torch.cat(magnitudes) if magnitudes else None
    return [(names[0], _Pair(torch.cat([p.A.float() for p in there]), torch.block_diag(*blocks), scale, magnitude))]
