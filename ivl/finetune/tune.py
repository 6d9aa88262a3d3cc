"""Tuning: each part of the model frozen, trained in full, or given a LoRA.

The parts carry the released names: `vision_model`, `mlp1` (the projector) and `language_model`; `embeddings` and `head`
are the two ends of the language model. Learning rates per part are in `ivl.finetune.param_groups`, adapter files in
`ivl.finetune.adapter.peft_adapter`. LoRA layers are peft's own (Hu et al. 2021, https://arxiv.org/abs/2106.09685):

                x  (inputs)
         +------+-------+
         |              |
    +----v-----+   +----v-----+
    |          |   | dropout  |
    |  W       |   +----v-----+
    |  frozen  |   |    A     |   rank x inputs,  random at first     A and B train:
    |          |   +----v-----+                                       rank x (inputs + outputs) numbers
    |          |   |    B     |   outputs x rank, zero at first       instead of inputs x outputs
    +----+-----+   +----v-----+
         |              | x alpha / rank
         +----> + <-----+
                |
                y = W x + (alpha / rank) B A x      merged: W + (alpha / rank) B A, a plain linear layer again
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ivl.architecture.families import llm_family
from ivl.checkpoint.quantized_experts import EXPERT_LAYERS
from ivl.model.parts import ADAPTER
from ivl.options.tuning import PARTS, Blocks, How, LoRA, Tune, scale_alpha
from ivl.types import UserError, text_table

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    from ivl.model.internvl import InternVL

EMBEDDINGS, HEAD = "language_model.model.embed_tokens", "language_model.lm_head"
FSDP_PREFIX = "_fsdp_wrapped_module."
"""Infix of classic FSDP in the names of wrapped parameters"""

_TARGETS = {"vision_model": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), "mlp1": ("1", "3"), "head": ("lm_head",)}


def part_of(name: str) -> str:
    """Return the part that a parameter or a module belongs to, by its full name."""
    for part, place in (("embeddings", EMBEDDINGS), ("head", HEAD)):
        if name == place or name.startswith(place + "."):
            return part
    return name.split(".")[0]


def is_tied(model: InternVL) -> bool:
    """True if embeddings and head are one tensor."""
    language = model.language_model
    return language.lm_head.weight is language.get_input_embeddings().weight


def modes(model: InternVL, tune: Tune) -> dict[str, How]:
    """Return each part's mode. Raises UserError where a mode cannot be applied to this model."""
    by_part = {part: tune.mode(part) for part in PARTS}
    if is_tied(model):
        typed: set[How] = {mode for mode in (tune.embeddings, tune.head) if mode is not None}
        if isinstance(tune.head, LoRA) or len(typed) > 1:
            raise UserError(
                "model.tune.head: this model's output layer shares its weights with the embeddings; "
                "leave one of the two unset, or give both the same value, frozen or full"
            )
        by_part |= dict.fromkeys(("embeddings", "head"), *(typed or {by_part["head"]}))
    loras = [mode for mode in by_part.values() if isinstance(mode, LoRA)]
    if len({mode.dora for mode in loras}) > 1:
        raise UserError("model.tune: dora is on for one part and off for another; an adapter file holds one kind only")
    for part, mode in by_part.items():
        floating = all(p.is_floating_point() for n, p in model.named_parameters() if part_of(n) == part)
        if mode == "full" and not floating:
            raise UserError(f"model.tune.{part}: full, but its weights are quantised; give it a LoRA, or load it whole")
        if isinstance(mode, LoRA) and mode.init == "pissa" and not floating:
            raise UserError(f"model.tune.{part}.init: pissa changes weights, and these are quantised; use default")
    blocks = used_blocks(model)
    if isinstance(last := by_part["vision_model"], Blocks) and not 0 < last.last <= blocks:
        raise UserError(f"model.tune.vision_model.last: expected 1 to {blocks} blocks, found {last.last}")
    return by_part


def used_blocks(model: InternVL) -> int:
    """Blocks of the vision encoder that are computed: those after `select_layer` are not, and cannot train."""
    return model.config.select_layer % (len(model.vision_model.encoder.layers) + 1)


def apply(model: InternVL, tune: Tune) -> None:
    """Freeze everything, then make trainable what `tune` says; LoRA layers are put in place.

    Trainable parameters become float32, whatever the frozen weights are kept in.
    Raises UserError where nothing would train or a target names no linear layer.
    """
    by_part = modes(model, tune)
    for part, mode in by_part.items():
        if isinstance(mode, LoRA):
            names = target_names(model, part, mode)
            inject(model, lora_config(mode, names))
            if mode.init == "pissa":
                model.lora_start |= {n: _matrices(model.get_submodule(n)) for n in names}
    trained = {id(p) for part, mode in by_part.items() for p in parameters_of(model, part, mode)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
        if id(parameter) in trained and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    if not trained:
        raise UserError("model.tune: nothing trains; expected at least one of the parts to be full or a LoRA")
    _set_modes(model, by_part)


def parameters_of(model: InternVL, part: str, mode: How) -> list[nn.Parameter]:
    """The parameters of a part that train in a mode."""
    place = {"embeddings": EMBEDDINGS, "head": HEAD}.get(part, part)
    named = [(f"{place}.{n}", p) for n, p in model.get_submodule(place).named_parameters()]
    named = [(n, p) for n, p in named if part_of(n) == part]
    if mode == "frozen":
        return []
    if isinstance(mode, LoRA):
        return [p for n, p in named if "lora_" in n]
    if part == "vision_model":
        first = used_blocks(model) - mode.last if isinstance(mode, Blocks) else 0
        blocks = {f"vision_model.encoder.layers.{n}" for n in range(first, used_blocks(model))}
        stem = "vision_model.embeddings" if mode == "full" else None
        return [p for n, p in named if ".".join(n.split(".")[:4]) in blocks or (stem and n.startswith(stem + "."))]
    return [p for _, p in named]


def _set_modes(model: InternVL, by_part: dict[str, How]) -> None:
    """Set frozen parts to eval mode: no dropout, no drop path."""
    model.train()
    for part in ("vision_model", "mlp1", "language_model"):
        getattr(model, part).train(by_part[part] != "frozen")
    model.language_model.lm_head.train(by_part["head"] != "frozen")
    if isinstance(mode := by_part["vision_model"], Blocks):
        for layer in model.vision_model.encoder.layers[: used_blocks(model) - mode.last]:
            layer.eval()


def target_names(model: InternVL, part: str, lora: LoRA) -> list[str]:
    """Full names of the linear layers a LoRA of this part covers."""
    targets = lora.targets or _TARGETS.get(part) or llm_family(model.config.llm_architecture).lora_targets
    kinds = (nn.Linear, *EXPERT_LAYERS)
    names = [n for n, m in model.named_modules() if isinstance(m, kinds) and part_of(n) == part]
    matches = [n for n in names if any(n.endswith("." + w) for w in targets)]
    missing = [w for w in targets if not any(n.endswith("." + w) for n in matches)]
    if missing:
        ends = sorted({n.rsplit(".", 1)[-1] for n in names})
        raise UserError(
            f"model.tune.{part}.targets: no linear layer is named {', '.join(missing)}; there are {', '.join(ends)}"
        )
    experts = [n for n in matches if isinstance(model.get_submodule(n), EXPERT_LAYERS)]
    if experts and (lora.dora or lora.init == "pissa"):
        raise UserError(
            f"model.tune.{part}: {'dora' if lora.dora else 'init: pissa'} is not computed on experts ({experts[0]}); "
            "leave it out, or leave gate_up_proj and down_proj out of targets"
        )
    return matches


def adapted(model: InternVL) -> list[str]:
    """Full names of the layers that carry a LoRA."""
    ending = ".lora_A"
    return [n.removesuffix(ending) for n, _ in model.named_modules() if n.endswith(ending)]


def table(model: InternVL) -> str:
    """Table of parts with their trainable parameters, as text for the start of a run."""
    rows = [("part", "parameters", "trainable", "how")]
    layers = [part_of(n) for n in adapted(model)]
    for part in PARTS:
        parameters = [p for n, p in model.named_parameters() if part_of(n) == part]
        total, trained = (sum(map(count, ps)) for ps in (parameters, [p for p in parameters if p.requires_grad]))
        if not parameters:  # the head, where it is the embeddings
            continue
        how = "full" if trained == total else "partly" if trained else "frozen"
        how = f"LoRA on {layers.count(part)} layers" if part in layers else how
        rows.append((part, f"{total:,}", f"{trained:,}", how))
    total = sum(map(count, model.parameters()))
    trained = sum(count(p) for p in model.parameters() if p.requires_grad)
    rows.append(("all", f"{total:,}", f"{trained:,}", f"{100 * trained / total:.2f} %"))
    return text_table(rows, left=(0, 3))


def count(parameter: nn.Parameter) -> int:
    """Number of a parameter's elements, those of all processes together."""
    return getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed's third stage leaves an empty tensor


def trainable_state(model: InternVL) -> dict[str, Tensor]:
    """The tensors that train, by name: what a checkpoint of a run holds."""
    return {n.replace(FSDP_PREFIX, ""): p.detach() for n, p in model.named_parameters() if p.requires_grad}


def lora_config(lora: LoRA, targets: Iterable[str]) -> LoraConfig:
    """peft's settings of a LoRA on layers given by full names."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=scale_alpha(lora),
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=True if lora.init == "default" else lora.init,
    )


def inject(model: InternVL, config: LoraConfig) -> None:
    """Put the layers of a LoRA in place: peft's, and on experts `ivl.finetune.expert_lora`'s."""
    from peft import inject_adapter_in_model

    from ivl.finetune import expert_lora  # peft takes a second to import
    from ivl.model.efficient import lora_linear

    targets = set(config.target_modules or ())
    experts = [n for n, m in model.named_modules() if n in targets and isinstance(m, EXPERT_LAYERS)]
    expert_lora.put(model, experts, config, ADAPTER)
    if targets == set(experts):
        return
    config = copy.copy(config)
    config.target_modules = targets - set(experts)
    for name in ("rank_pattern", "alpha_pattern"):
        setattr(config, name, {key: v for key, v in getattr(config, name).items() if key not in experts})
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    del model.peft_config  # parts are injected one after the other; peft would take the next for a second adapter
    if model.efficient:
        lora_linear.install(model)


def _matrices(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    a, b = (m[ADAPTER].weight.detach().float().cpu().clone() for m in (layer.lora_A, layer.lora_B))
    return a, b
