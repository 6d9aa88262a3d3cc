"""Translation of PEFT adapters: their names and shapes → this model's, exactly.

They name the layers of the model they were trained on: this one's, the releases' own code (InternLM2's fused `wqkv`),
transformers' class (the tower's q, k, v apart), or the language model alone. What `ivl.checkpoint.layouts` does to
weights is done here to low-rank pairs, with B (rows, rank) and A (rank, columns) of an update scale · B A:

    one fused layer → several   each gets its rows of B, and the whole A
    several layers → one fused  ranks add up: the As one above the other, the Bs block by block
    PiSSA and OLoRA             what peft takes out of the weight first is taken away by the update: twice the rank
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ivl.architecture.config import Config
from ivl.checkpoint.layouts import LAYOUTS, Group, groups
from ivl.checkpoint.quantized_experts import EXPERT_LAYERS
from ivl.finetune.adapter.adapter_config import AdapterConfig
from ivl.finetune.adapter.expert_adapters import stacked_pair, unstacked_names
from ivl.finetune.tune import EMBEDDINGS, is_tied, part_of
from ivl.model.parts import ADAPTER
from ivl.types import UserError, first_few

if TYPE_CHECKING:
    from ivl.model.internvl import InternVL

PREFIX = "base_model.model."
"""Start of peft's names"""
_WRAPPINGS = (".base_layer.", ".modules_to_save.default.", ".modules_to_save.")
"""Infixes of peft in names: around a weight under a LoRA, and around a module that is saved in full"""
_LOW_RANK = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector|lora_embedding_A|lora_embedding_B)(?:\.weight)?")
_PART_PREFIXES = {
    "model.layers.": "language_model.",
    "encoder.layers.": "vision_model.",
    "encoder.layer.": "vision_tower.",
}
"""Start of names where a part was adapted by itself → the prefix that they lack"""


@dataclass
class LowRank:
    """A low-rank update of one layer."""

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None
    """(rows,) of DoRA"""

    @property
    def rank(self) -> int:
        return self.A.shape[-2]


@dataclass
class Adapter:
    """Adapter in this model's names: the fields of `peft.LoraConfig`, and the tensors of its file."""

    config: AdapterConfig
    ranks: dict[str, int] = field(default_factory=dict)
    """Layer → rank; the layers that are adapted"""
    alphas: dict[str, float] = field(default_factory=dict)
    """Layer → alpha; the update is multiplied by alpha / rank"""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Tensors under peft's names"""

    def add(self, layer: str, pair: LowRank) -> None:
        self.ranks[layer] = pair.rank
        self.alphas[layer] = pair.scale * pair.rank
        self.state |= {f"{PREFIX}{layer}.lora_A.weight": pair.A, f"{PREFIX}{layer}.lora_B.weight": pair.B}
        if pair.magnitude is not None:
            self.state[f"{PREFIX}{layer}.lora_magnitude_vector"] = pair.magnitude

    @property
    def replaced(self) -> list[str]:
        """The parameters that the adapter brings in full: those of `modules_to_save`, biases, a tower beside it."""
        return [key.removeprefix(PREFIX) for key in self.state if ".lora_" not in key]


def translated(model: InternVL, state: dict[str, Tensor], config: AdapterConfig) -> Adapter:
    """Translate an adapter file's tensors into this model's names.

    Raises UserError where it names a layer that the model has in no layout, lacks one that its config names, or has a
    LoRA of a kind that is not computed here.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    mixture = model.language_model.config.experts
    state = unstacked_names(state, config.parameters, mixture.count if mixture else 0, config.where)
    keys = _full_names(state)
    tensors = _without_tied_head(model, keys, state)
    low_rank = {name: (match[1], match[2]) for name in tensors if (match := _LOW_RANK.fullmatch(name))}
    weights = {low_rank[name][0] + ".weight" if name in low_rank else name for name in tensors}
    table = _groups(names, weights, model.config)
    for name in tensors:
        layer, half = low_rank.get(name, (name.removesuffix(".weight"), ""))
        _refuse(model, layer, half, table[layer + ".weight" if half else name])
    adapter = Adapter(config)
    pairs = _pairs({half: (tensors[name], state[tensors[name]]) for name, half in low_rank.items()}, config)
    _check_names(config, weights | keys.keys(), table)
    for group in {id(table[n]): table[n] for n in sorted(weights)}.values():
        layers = [name.removesuffix(".weight") for name in group.stored]
        full = [name for name in group.stored if name in tensors and name not in low_rank]
        if any(layer in pairs for layer in layers):
            of_group = [pairs.get(layer) for layer in layers]
            _check_shapes(model, group, of_group)
            if config.init and not full:
                of_group = _with_start(model, group, of_group, config.init)
            for name, pair in _convert_group(model, group, of_group):
                adapter.add(name, pair)
        if full:
            # A part of a fused tensor may be missing (biases of some layers only): it is the base's.
            base = {} if len(full) == len(group.stored) else dict(zip(group.stored, _base_tensors(model, group)))
            parts = [state[tensors[name]] if name in full else base[name] for name in group.stored]
            try:
                adapter.state |= {PREFIX + n: t for n, t in zip(group.module, group.read(parts, model.config))}
            except RuntimeError as error:
                raise UserError(f"{full[0]} of the adapter has a shape that does not fit this model") from error
    return adapter


def _refuse(model: InternVL, layer: str, half: str, group: Group) -> None:
    """Raise UserError for a tensor that peft treats differently. `half`: of a LoRA; else empty."""
    if half and any(name.startswith(EMBEDDINGS) for name in group.module):
        raise UserError(
            f"it has a LoRA on the embeddings ({layer}), which is not computed here; merge it with peft "
            "(merge_and_unload) and give the merged checkpoint"
        )
    if is_tied(model) and any(part_of(name) == "head" for name in group.module):
        raise UserError(
            f"it has a LoRA or weights of the output layer ({layer}), which is the embeddings themselves in this "
            "model: both would change, so it cannot be used here"
        )


def _check_names(config: AdapterConfig, names: set[str], table: dict[str, Group]) -> None:
    """Raise UserError where the file has nothing of a layer or a module of the model that its config names.

    Names that the model does not have are passed over, as by peft: one list of names serves several models.
    """
    layers = [n for n in config.targets if (full := _full_name(n) + ".weight") in table and full not in names]
    modules = [n for n in config.saved if _has_module(n, table) and not _has_module(n, names)]
    for key, missing in (("target_modules", layers), ("modules_to_save", modules)):
        if missing:
            raise UserError(
                f"its config has {key} {first_few(missing)}, and the file has no tensor of it; is it complete?"
            )


def _has_module(module: str, names: Iterable[str]) -> bool:
    """True if any of these tensors belongs to a module, given by the end of its name."""
    return any(f".{module}." in f".{name}" for name in names)


def _check_shapes(model: InternVL, group: Group, pairs: list[LowRank | None]) -> None:
    layers = [model.get_submodule(name.removesuffix(".weight")) for name in group.module]
    sizes: list[tuple[int, ...]] = [(m.out_features, m.in_features) for m in layers if isinstance(m, nn.Linear)]
    sizes += [(m.num_experts, m.out_features, m.in_features) for m in layers if isinstance(m, EXPERT_LAYERS)]
    if len(sizes) < len(layers):
        raise UserError(f"it has a LoRA on {group.stored[0].removesuffix('.weight')}, which is no linear layer")
    weights = group.write([torch.empty(size, device="meta") for size in sizes], model.config)
    for name, weight, pair in zip(group.stored, weights, pairs):
        if pair is not None and (shape := (*pair.B.shape[:-1], pair.A.shape[-1])) != tuple(weight.shape):
            raise UserError(
                f"the adapter does not fit this model: {name}: expected {tuple(weight.shape)}, "
                f"found an update of {shape}"
            )


def _base_tensors(model: InternVL, group: Group) -> list[Tensor]:
    """Return the base's tensors of a group, in the adapter's layout. Raises UserError where they are quantised."""
    tensors = [model.get_parameter(name).detach() for name in group.module]
    if any(not tensor.is_floating_point() for tensor in tensors):
        raise UserError(
            f"it needs the base's own weight of {group.stored[0]}, and the model is quantised; load it without quantize"
        )
    return group.write(tensors, model.config)


def _with_start(model: InternVL, group: Group, pairs: list[LowRank | None], init: str) -> list[LowRank | None]:
    """Add to stored pairs the part that peft takes out of the base's weight at injection (PiSSA, OLoRA)."""
    from peft import LoraConfig, inject_adapter_in_model

    result: list[LowRank | None] = []
    for pair, weight in zip(pairs, _base_tensors(model, group)):
        if pair is None:
            result.append(None)
            continue
        rank = len(pair.A)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        linear.weight.data = weight.float().clone()
        settings = LoraConfig(r=rank, lora_alpha=pair.scale * rank, target_modules=["layer"], init_lora_weights=init)
        layer = inject_adapter_in_model(settings, nn.ModuleDict({"layer": linear}), ADAPTER)["layer"]
        A, B = (m[ADAPTER].weight.detach().float().to(pair.A.device) for m in (layer.lora_A, layer.lora_B))
        factors = torch.cat([pair.A.float(), A]), torch.cat([pair.B.float(), -B], dim=1)
        result.append(LowRank(*factors, pair.scale, pair.magnitude))
    return result


def part_in_file(key: str) -> str:
    """The part of the model that a tensor of an adapter file belongs to."""
    name = _full_name(key).removeprefix("model.")
    top, *inside = name.split(".")
    if top == "mlp1" or top == "multi_modal_projector":
        return "mlp1"
    if top in ("vision_model", "vision_tower"):
        return "vision_model"
    ends = {"embed_tokens": "embeddings", "tok_embeddings": "embeddings", "lm_head": "head", "output": "head"}
    return next((ends[word] for word in (top, *inside) if word in ends), "language_model")


def _full_names(keys: Iterable[str]) -> dict[str, str]:
    """Full name → key of a file. Raises UserError where two keys have one."""
    names = {key: _full_name(key) for key in keys}
    if any(name.startswith("language_model.model.layers.") for name in names.values()):
        # Adapted by itself: what stands beside its blocks has lost the same prefix.
        prefixes = ("lm_head.", "output.", "model.embed_tokens.", "model.tok_embeddings.", "model.norm.")
        names |= {key: f"language_model.{name}" for key, name in names.items() if name.startswith(prefixes)}
    result = {name: key for key, name in names.items()}
    if len(result) < len(names):
        twice = next(name for key, name in names.items() if result[name] != key)
        raise UserError(f"it has {twice} twice, under names that peft's wrapping tells apart")
    return result


def _full_name(key: str) -> str:
    """A key without peft's wrappings (one around the model, or one around each part), and with the part's name."""
    name = key.replace(PREFIX, "")
    for wrapping in _WRAPPINGS:
        name = name.replace(wrapping, ".")
    return next((part + name for start, part in _PART_PREFIXES.items() if name.startswith(start)), name)


def _groups(model_names: Iterable[str], weights: set[str], config: Config) -> dict[str, Group]:
    """Map names of an adapter's tensors to groups of the model, in the layout that knows all of them."""
    unknown: list[str] = []
    for layout in LAYOUTS:
        table = {name: group for group in groups(model_names, layout, config) for name in group.stored}
        if not (missing := sorted(weights - table.keys())):
            return table
        if not unknown or len(missing) < len(unknown):
            unknown = missing
    raise UserError(
        f"the adapter does not fit this model: {len(unknown)} of its {len(weights)} layers are not in it in any "
        f"layout, {unknown[0]} among them; is it for another model?"
    )


def _pairs(halves: dict[tuple[str, str], tuple[str, Tensor]], config: AdapterConfig) -> dict[str, LowRank]:
    """Map layers to low-rank pairs with the config's scale; `halves`: (layer, kind) → key in the file, tensor.

    Raises UserError where a half is missing.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    named: dict[str, str] = {}
    for (layer, kind), (key, tensor) in halves.items():
        parts.setdefault(layer, {})[kind] = tensor
        named[layer] = key.rpartition(f".{kind}")[0].removeprefix(PREFIX)
    pairs = {}
    for layer, tensors in parts.items():
        if missing := {"lora_A", "lora_B"} - tensors.keys():
            raise UserError(f"the adapter has {layer} without its {missing.pop()}; the file is damaged")
        A, B = tensors["lora_A"], tensors["lora_B"]
        if A.ndim != B.ndim or A.ndim not in (2, 3) or A.shape[-2] != B.shape[-1] or A.shape[-2] == 0:
            raise UserError(f"the adapter's {layer} has shapes {list(A.shape)} and {list(B.shape)}; they are no pair")
        scale = config.scale(named[layer], A.shape[-2])
        pairs[layer] = LowRank(A, B, scale, tensors.get("lora_magnitude_vector"))
    return pairs


def _ranks(halves: list[Tensor], dora: bool) -> list[Tensor]:
    """Masks of the ranks that each layer of a fused one needs: its share where each rank belongs to one layer, as
    `ivl.finetune.adapter.adapter_writer` fuses them; otherwise all.

    No rank for a layer that is not adapted; all under `dora`, which has a magnitude for each layer."""
    used = torch.stack([half.ne(0).any(0) for half in halves])
    if (used.sum(0) != 1).any():
        return [torch.ones_like(used[0]) for _ in halves]
    return [ranks if ranks.any() or not dora else ~ranks for ranks in used]


def _without_tied_head(model: InternVL, tensors: dict[str, str], state: dict[str, Tensor]) -> dict[str, str]:
    """Drop the output layer from full name → key where it is the embeddings, here and in the file.

    Raises UserError where it is another.
    """
    full = {part_in_file(name): name for name in tensors if ".lora_" not in name}
    if not is_tied(model) or not {"embeddings", "head"} <= full.keys():
        return tensors
    if not torch.equal(*(state[tensors[full[part]]] for part in ("embeddings", "head"))):
        raise UserError("its output layer differs from its embeddings; they are one tensor in this model")
    return {name: key for name, key in tensors.items() if name != full["head"]}


def _stacked(model: InternVL, pairs: list[LowRank | None]) -> LowRank:
    """The pairs of all experts of a layer as one. Raises UserError for a DoRA, or several ranks."""
    present = [pair for pair in pairs if pair is not None]
    if any(pair.magnitude is not None for pair in present):
        raise UserError("it has a DoRA on experts, which is not computed here; merge it with peft (merge_and_unload)")
    if len(pairs) == 1 and present[0].A.ndim == 3:
        return present[0]
    mixture = model.language_model.config.experts
    assert mixture is not None, "a layer of experts is there"
    parts = [None if pair is None else (pair.A, pair.B, pair.scale) for pair in pairs]
    return LowRank(*stacked_pair(parts, mixture.count))


def _convert_group(model: InternVL, group: Group, pairs: list[LowRank | None]) -> list[tuple[str, LowRank]]:
    """The pairs of a group's stored layers as those of the model's layers."""
    names = [name.removesuffix(".weight") for name in group.module]
    present = [pair for pair in pairs if pair is not None]
    if isinstance(model.get_submodule(names[0]), EXPERT_LAYERS):
        return [(names[0], _stacked(model, pairs))]
    if len(pairs) == 1:
        (pair,) = present
        halves = group.read([pair.B], model.config)
        magnitudes = [None] * len(halves) if pair.magnitude is None else group.read([pair.magnitude], model.config)
        return [
            (n, LowRank(pair.A[ranks], b[:, ranks], pair.scale, m))
            for n, b, m, ranks in zip(names, halves, magnitudes, _ranks(halves, pair.magnitude is not None))
            if ranks.any()
        ]
    if len(present) < len(pairs) and present[0].magnitude is not None:
        raise UserError(
            f"{names[0]}: a DoRA of some of the layers that are one layer here has no exact form; adapt all of them"
        )
    rows = len(model.get_parameter(group.module[0])) // len(pairs)
    scale = next((pair.scale for pair in present if pair.scale), 1.0)
    blocks = [torch.zeros(rows, 0) if p is None else p.B.float() * (p.scale / scale) for p in pairs]
    magnitudes = [pair.magnitude for pair in present if pair.magnitude is not None]
    magnitude = torch.cat(magnitudes) if magnitudes else None
    return [(names[0], LowRank(torch.cat([p.A.float() for p in present]), torch.block_diag(*blocks), scale, magnitude))]
