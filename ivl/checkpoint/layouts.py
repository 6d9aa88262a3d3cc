"""Layouts of checkpoints: names and cuts of tensors, a table each, read in both directions.

Module names are the released ones, with transformers' names inside `language_model`; so "native" has no rules but for
experts, InternLM2 has some inside it, and "hf" (transformers' InternVLForConditionalGeneration) renames the rest.

The experts of a mixture are one tensor here. Files have one for each expert, gate and up apart: the releases, vLLM and
lmdeploy, and what transformers writes. "fused" layouts have the tensors of transformers 5's own module instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ivl.architecture.config import Config
from ivl.architecture.families import llm_family

Tensors = list[Tensor]


@dataclass(frozen=True)
class Rule:
    """Rule from tensors of a file to tensors of the module; names may hold {n}, a layer, and {p}: weight, bias, or SCB,
    the scales of an 8-bit weight's rows. Stored names with {e} stand for those of every expert.

    `read` and `write` change the tensors themselves, given the config; None: they are the same, one for one.
    """

    stored: tuple[str, ...]
    module: tuple[str, ...]
    read: Callable[[Tensors, Config], Tensors] | None = None
    write: Callable[[Tensors, Config], Tensors] | None = None


def _ungroup(tensors: Tensors, config: Config) -> Tensors:
    """InternLM2's wqkv → q, k, v: per key-value head its query heads, then its key, then its value."""
    heads, kv_heads, width = _heads(config)
    grouped = tensors[0].unflatten(0, (kv_heads, heads // kv_heads + 2, width))
    q, k, v = grouped.split([heads // kv_heads, 1, 1], dim=1)
    return [t.flatten(0, 2) for t in (q, k, v)]


def _group(tensors: Tensors, config: Config) -> Tensors:
    kv_heads, width = _heads(config)[1:]
    return [torch.cat([t.unflatten(0, (kv_heads, -1, width)) for t in tensors], dim=1).flatten(0, 2)]


def _heads(config: Config) -> tuple[int, int, int]:
    heads = config.llm["num_attention_heads"]
    kv_heads = config.llm.get("num_key_value_heads") or heads
    return heads, kv_heads, config.llm["hidden_size"] // heads


def _cat(tensors: Tensors, config: Config) -> Tensors:
    return [torch.cat(tensors)]


def _thirds(tensors: Tensors, config: Config) -> Tensors:
    return list(tensors[0].chunk(3))


def _stack(tensors: Tensors, config: Config) -> Tensors:
    """Matrices of each expert in turn, (F, I), one or several of an expert → one tensor, (E, several · F, I)."""
    experts = config.llm["num_experts"]
    return [torch.stack(tensors).unflatten(0, (experts, -1)).flatten(1, 2)]


def _unstack(tensors: Tensors, config: Config) -> Tensors:
    return list(tensors[0].unbind())


def _unstack_halves(tensors: Tensors, config: Config) -> Tensors:
    return list(tensors[0].unflatten(1, (2, -1)).flatten(0, 1).unbind())


def _renames(stored_prefix: str, module_prefix: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule((stored_prefix + s,), (module_prefix + m,)) for s, m in names.items())


_LLM, _LLM_LAYER = "language_model.model.", "language_model.model.layers.{n}."
_EXPERTS = _LLM_LAYER + "mlp.experts."
_PER_EXPERT = (
    Rule(
        (_EXPERTS + "{e}.gate_proj.{p}", _EXPERTS + "{e}.up_proj.{p}"),
        (_EXPERTS + "gate_up_proj.{p}",),
        _stack,
        _unstack_halves,
    ),
    Rule((_EXPERTS + "{e}.down_proj.{p}",), (_EXPERTS + "down_proj.{p}",), _stack, _unstack),
)
_FUSED = tuple(Rule((f"{_EXPERTS}{name}",), (f"{_EXPERTS}{name}.weight",)) for name in ("gate_up_proj", "down_proj"))
_INTERNLM2 = (
    Rule(("language_model.output.{p}",), ("language_model.lm_head.{p}",)),
    Rule((_LLM + "tok_embeddings.{p}",), (_LLM + "embed_tokens.{p}",)),
    Rule(
        (_LLM_LAYER + "attention.wqkv.{p}",),
        tuple(f"{_LLM_LAYER}self_attn.{x}_proj.{{p}}" for x in "qkv"),
        _ungroup,
        _group,
    ),
    *_renames(
        _LLM_LAYER,
        _LLM_LAYER,
        {
            "attention.wo.{p}": "self_attn.o_proj.{p}",
            "feed_forward.w1.{p}": "mlp.gate_proj.{p}",
            "feed_forward.w3.{p}": "mlp.up_proj.{p}",
            "feed_forward.w2.{p}": "mlp.down_proj.{p}",
            "attention_norm.{p}": "input_layernorm.{p}",
            "ffn_norm.{p}": "post_attention_layernorm.{p}",
        },
    ),
)


def _hf(tower: str, projector: str, llm: str, head: str, experts: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules of transformers' names; its files have had two sets of prefixes."""

    def placed(rule: Rule) -> Rule:
        return replace(rule, stored=tuple(llm + name.removeprefix(_LLM) for name in rule.stored))

    stored, module = tower + "encoder.layer.{n}.", "vision_model.encoder.layers.{n}."
    return (
        Rule(tuple(f"{stored}attention.{x}_proj.{{p}}" for x in "qkv"), (module + "attn.qkv.{p}",), _cat, _thirds),
        *_renames(
            stored,
            module,
            {
                "attention.q_norm.{p}": "attn.q_norm.{p}",
                "attention.k_norm.{p}": "attn.k_norm.{p}",
                "attention.projection_layer.{p}": "attn.proj.{p}",
                "layernorm_before.{p}": "norm1.{p}",
                "layernorm_after.{p}": "norm2.{p}",
                "mlp.fc1.{p}": "mlp.fc1.{p}",
                "mlp.fc2.{p}": "mlp.fc2.{p}",
                "lambda_1": "ls1",
                "lambda_2": "ls2",
            },
        ),
        *_renames(
            tower + "embeddings.",
            "vision_model.embeddings.",
            {
                "cls_token": "class_embedding",
                "position_embeddings": "position_embedding",
                "patch_embeddings.projection.{p}": "patch_embedding.{p}",
            },
        ),
        *_renames(projector, "mlp1.", {"layer_norm.{p}": "0.{p}", "linear_1.{p}": "1.{p}", "linear_2.{p}": "3.{p}"}),
        Rule((head + "lm_head.{p}",), ("language_model.lm_head.{p}",)),
        *map(placed, experts),
        Rule((llm + "{rest}",), (_LLM + "{rest}",)),
    )


_HF = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "")
_HF_4 = ("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.")

LAYOUTS: dict[str, tuple[Rule, ...]] = {
    "native": _PER_EXPERT,
    "internlm2": _INTERNLM2,
    "hf": _hf(*_HF, _PER_EXPERT),
    "hf-4": _hf(*_HF_4, _PER_EXPERT),
    "native-fused": _FUSED,
    "hf-fused": _hf(*_HF, _FUSED),
    "native-stacked": (),
    "hf-stacked": _hf(*_HF, ()),
}
"""Rules of each layout. hf-4: transformers 4 wrote it, and the published -hf folders hold it. The stacked ones are of
adapters alone: the experts' layers have the module's names."""


OUTPUT_LAYER = {"language_model.lm_head.weight", "language_model.output.weight", "lm_head.weight"}
"""Names of the output layer in the layouts"""


@dataclass
class Group:
    """One application of a rule: names in the file, names in the module."""

    stored: list[str]
    module: list[str]
    rule: Rule | None = None

    def read(self, tensors: Tensors, config: Config) -> Tensors:
        return self.rule.read(tensors, config) if self.rule and self.rule.read else tensors

    def write(self, tensors: Tensors, config: Config) -> Tensors:
        return self.rule.write(tensors, config) if self.rule and self.rule.write else tensors


def _pattern(name: str) -> re.Pattern[str]:
    text = re.escape(name)
    for hole, accepts in (("n", r"\d+"), ("p", "weight|bias|SCB"), ("rest", ".+")):
        text = text.replace(re.escape(f"{{{hole}}}"), f"(?P<{hole}>{accepts})")
    return re.compile(text)


def groups(module_keys: Iterable[str], layout: str, config: Config) -> list[Group]:
    """Match a module's tensors with the stored ones they come from; a name without a rule is stored as it is."""
    patterns = [(rule, _pattern(name)) for rule in LAYOUTS[layout] for name in rule.module]
    by_name: dict[str, Group] = {}
    for key in module_keys:
        for rule, pattern in patterns:
            if match := pattern.fullmatch(key):
                holes = match.groupdict()
                experts = range(config.llm["num_experts"]) if "{e}" in rule.stored[0] else (0,)
                names = [name.format(e=e, **holes) for e in experts for name in rule.stored]
                by_name.setdefault(names[0], Group(names, [name.format(**holes) for name in rule.module], rule))
                break
        else:
            by_name[key] = Group([key], [key])
    return list(by_name.values())


def to_stored(state: Mapping[str, Tensor], layout: str, config: Config) -> dict[str, Tensor]:
    """Convert a module's state to the names and shapes of a file."""
    stored: dict[str, Tensor] = {}
    for group in groups(state, layout, config):
        stored |= zip(group.stored, group.write([state[name] for name in group.module], config))
    return stored


def layout_of(names: Iterable[str], config: Config) -> str:
    """Return the key of `LAYOUTS` for a checkpoint's tensor names."""
    names = list(names)
    tops = {".".join(name.split(".")[:2]) for name in names}
    fused = "-fused" if any(name.endswith(".mlp.experts.gate_up_proj") for name in names) else ""
    if "model.vision_tower" in tops:
        return "hf" + fused
    if any(top.startswith("vision_tower.") for top in tops):
        return "hf-4"
    return llm_family(config.llm_architecture).layout + fused
