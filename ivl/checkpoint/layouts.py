"""Layouts of checkpoints: names and cuts of tensors, a table each, read in both directions.

Module names are the released ones, with transformers' names inside `language_model`; so "native" has no rules,
InternLM2 has some inside it, and "hf" (transformers' InternVLForConditionalGeneration) renames the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ivl.config import Config
from ivl.families import llm_family

Tensors = list[Tensor]


@dataclass(frozen=True)
class Rule:
    """Rule from tensors of a file to tensors of the module; names may hold {n}, a layer, and {p}: weight, bias, or SCB,
    the scales of an 8-bit weight's rows.

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


def _renames(stored_prefix: str, module_prefix: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule((stored_prefix + s,), (module_prefix + m,)) for s, m in names.items())


_LLM, _LLM_LAYER = "language_model.model.", "language_model.model.layers.{n}."
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


def _hf(tower: str, projector: str, llm: str, head: str) -> tuple[Rule, ...]:
    """Rules of transformers' names; its files have had two sets of prefixes."""
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
        Rule((llm + "{rest}",), (_LLM + "{rest}",)),
    )


LAYOUTS: dict[str, tuple[Rule, ...]] = {
    "native": (),
    "internlm2": _INTERNLM2,
    "hf": _hf("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", ""),
    "hf-4": _hf("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model."),
}
"""Rules of each layout. hf-4: transformers 4 wrote it, and the published -hf folders hold it."""


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


def groups(module_keys: Iterable[str], layout: str) -> list[Group]:
    """Match a module's tensors with the stored ones they come from; a name without a rule is stored as it is."""
    patterns = [(rule, _pattern(name)) for rule in LAYOUTS[layout] for name in rule.module]
    by_name: dict[str, Group] = {}
    for key in module_keys:
        for rule, pattern in patterns:
            if match := pattern.fullmatch(key):
                holes = match.groupdict()
                names = [name.format(**holes) for name in rule.stored]
                by_name.setdefault(names[0], Group(names, [name.format(**holes) for name in rule.module], rule))
                break
        else:
            by_name[key] = Group([key], [key])
    return list(by_name.values())


def to_stored(state: Mapping[str, Tensor], layout: str, config: Config) -> dict[str, Tensor]:
    """Convert a module's state to the names and shapes of a file."""
    stored: dict[str, Tensor] = {}
    for group in groups(state, layout):
        stored |= zip(group.stored, group.write([state[name] for name in group.module], config))
    return stored


def layout_of(names: Iterable[str], config: Config) -> str:
    """Return the key of `LAYOUTS` for a checkpoint's tensor names."""
    tops = {".".join(name.split(".")[:2]) for name in names}
    if "model.vision_tower" in tops:
        return "hf"
    if any(top.startswith("vision_tower.") for top in tops):
        return "hf-4"
    return llm_family(config.llm_architecture).layout
