"""Fields of a checkpoint's config.json: types, ranges and dependencies.

A folder may come from anyone: a value that no loadable model could have is refused here, in one line and before
anything is built from it. The bounds are far above the largest release.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ivl.errors import UserError


@dataclass(frozen=True)
class Field:
    """Range of a field: type, bounds and choices."""

    kind: type
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    needed: bool = False
    null: bool = False
    """Allow null: no value."""
    several: bool = False
    """Allow a list of such values as well."""

    def expected(self) -> str:
        """Describe the range in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", dict: "an object"}
        text = words[self.kind]
        if self.high < math.inf:
            text += f" from {self.low:g} to {self.high:g}"
        return text + (" or a list of them" if self.several else "") + (" or null" if self.null else "")

    def holds(self, value: Any) -> bool:
        """True if a value is in the range."""
        if value is None:
            return self.null
        if self.several and isinstance(value, list):
            return all(replace(self, several=False, null=False).holds(item) for item in value)
        if self.kind in (int, float):
            kinds = (int,) if self.kind is int else (int, float)
            return isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high
        return isinstance(value, self.kind) and (not self.choices or value in self.choices)


def _size(high: int, needed: bool = False, null: bool = False) -> Field:
    return Field(int, 1, high, needed=needed, null=null)


LAYERS, WIDTH = 1024, 1 << 17
_ID = Field(int, 0, (1 << 31) - 1, null=True)
_SHARE, _EPSILON, _FLAG = Field(float, 0, 1), Field(float, 0, 1), Field(bool)
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu")

TOP: dict[str, Field] = {
    "vision_config": Field(dict, needed=True),
    "llm_config": Field(dict, needed=True),
    "template": Field(str, needed=True),
    "system_message": Field(str, null=True),
    "system_turn": _FLAG,
    "answer_prefill": Field(str),
    "release": Field(str, null=True),
    "select_layer": Field(int, -LAYERS, LAYERS),
    "ps_version": Field(str, choices=("v1", "v2")),
    "downsample_ratio": Field(float, 1 / 16, 1),
    "force_image_size": _size(1 << 13, null=True),
    "dynamic_image_size": _FLAG,
    "use_thumbnail": _FLAG,
    "min_dynamic_patch": _size(1000),
    "max_dynamic_patch": _size(1000),
    "pad2square": _FLAG,
    "quantization_config": Field(dict, null=True),
}

VISION: dict[str, Field] = {
    "hidden_size": _size(WIDTH, needed=True),
    "num_hidden_layers": _size(LAYERS, needed=True),
    "num_attention_heads": _size(WIDTH, needed=True),
    "intermediate_size": _size(WIDTH * 8, needed=True),
    "image_size": _size(1 << 13),
    "patch_size": _size(1 << 13),
    "num_channels": Field(int, 3, 3),
    "qkv_bias": _FLAG,
    "qk_normalization": _FLAG,
    "norm_type": Field(str, choices=("layer_norm", "rms_norm")),
    "layer_norm_eps": _EPSILON,
    "hidden_act": Field(str, choices=ACTIVATIONS),
    "drop_path_rate": Field(float, 0, 0.999),
    "attention_dropout": _SHARE,
    "dropout": _SHARE,
    "initializer_range": _SHARE,
    "initializer_factor": Field(float, -1e3, 1e3),
}

LLM: dict[str, Field] = {
    "architectures": Field(str, needed=True, several=True),
    "hidden_size": _size(WIDTH, needed=True),
    "num_hidden_layers": _size(LAYERS, needed=True),
    "num_attention_heads": _size(WIDTH, needed=True),
    "intermediate_size": _size(WIDTH * 8, needed=True),
    "vocab_size": _size(1 << 24, needed=True),
    "max_position_embeddings": _size(1 << 31, needed=True),
    "num_key_value_heads": _size(WIDTH, null=True),
    "head_dim": _size(1 << 13, null=True),
    "hidden_act": Field(str, choices=ACTIVATIONS),
    "rms_norm_eps": _EPSILON,
    "initializer_range": _SHARE,
    "attention_dropout": _SHARE,
    "resid_pdrop": _SHARE,
    "embd_pdrop": _SHARE,
    "bias": _FLAG,
    "attention_bias": _FLAG,
    "mlp_bias": _FLAG,
    "tie_word_embeddings": _FLAG,
    "use_sliding_window": _FLAG,
    "sliding_window": _size(1 << 31, null=True),
    "rope_theta": Field(float, 1, 1e15),
    "rope_scaling": Field(dict, null=True),
    "rope_parameters": Field(dict, null=True),
    "original_max_position_embeddings": Field(int, 2, 1 << 31, null=True),
    "bos_token_id": _ID,
    "eos_token_id": replace(_ID, several=True),
    "pad_token_id": _ID,
    "num_experts": _size(1 << 14),
    "num_experts_per_tok": _size(1 << 14),
    "moe_intermediate_size": _size(WIDTH * 8),
    "norm_topk_prob": _FLAG,
    "decoder_sparse_step": _size(LAYERS),
    "mlp_only_layers": Field(int, 0, LAYERS, several=True, null=True),
    "output_router_logits": _FLAG,
    "router_aux_loss_coef": Field(float, 0, 1e6),
}

ROPE: dict[str, Field] = {
    "type": Field(str, choices=("default", "linear", "dynamic", "su", "longrope", "yarn"), null=True),
    "rope_type": Field(str, choices=("default", "linear", "dynamic", "su", "longrope", "yarn")),
    "rope_theta": Field(float, 1, 1e15),
    "factor": Field(float, 1, 1e6),
    "attention_factor": Field(float, 1e-3, 1e3, null=True),
    "partial_rotary_factor": Field(float, 1, 1),
    "original_max_position_embeddings": Field(int, 2, 1 << 31, null=True),
    "short_factor": Field(float, 1e-6, 1e6, several=True),
    "long_factor": Field(float, 1e-6, 1e6, several=True),
}


def check(raw: Mapping[str, Any], where: str) -> None:
    """Raise UserError for the first field of a released config.json that no model could have."""
    check_part(raw, TOP, where)
    check_part(raw["vision_config"], VISION, where, "vision_config.")
    check_part(raw["llm_config"], LLM, where, "llm_config.")
    for name in ("rope_scaling", "rope_parameters"):
        check_part(raw["llm_config"].get(name) or {}, ROPE, where, f"llm_config.{name}.")
    llm = raw["llm_config"]
    vision_problems = _vision_conflicts(raw, raw["vision_config"])
    for problem in itertools.chain(vision_problems, _llm_conflicts(llm), _rope_faults(llm)):
        raise UserError(f"{where}: {problem}")


def check_part(
    values: Mapping[str, Any], table: Mapping[str, Field], where: str, prefix: str = "", partial: bool = False
) -> None:
    """Raise UserError for the first field that is missing or out of its range. `partial`: none is missing."""
    for key, field in table.items():
        if key not in values:
            if field.needed and not partial:
                raise UserError(f"{where}: no {prefix + key!r}; expected {field.expected()}, as in every InternVL")
        elif not field.holds(values[key]):
            raise UserError(f"{where}: {prefix}{key}: expected {field.expected()}, found {shown(values[key])}")


def shown(value: Any) -> str:
    """Write a value for a message, cut where it is long."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _vision_conflicts(raw: Mapping[str, Any], vision: Mapping[str, Any]) -> Iterator[str]:
    """Conflicts between fields of the tower and of image tiling."""
    width, heads, depth = vision["hidden_size"], vision["num_attention_heads"], vision["num_hidden_layers"]
    image_size, patch = vision.get("image_size", 448), vision.get("patch_size", 14)
    size, ratio = raw.get("force_image_size") or image_size, raw.get("downsample_ratio", 0.5)
    side, layer = round(1 / ratio), raw.get("select_layer", -1)
    least, most = raw.get("min_dynamic_patch", 1), raw.get("max_dynamic_patch", 12)
    if width % heads:
        yield f"vision_config: hidden_size {width} is not a multiple of num_attention_heads {heads}"
    if side * ratio != 1:
        yield f"downsample_ratio: expected 1 divided by a whole number, found {ratio}"
    if image_size % patch:
        yield f"vision_config: image_size {image_size} is not a multiple of patch_size {patch}"
    if size % (patch * side):
        yield f"force_image_size: expected a multiple of {patch * side} ({side} patches to a token), found {size}"
    if not -depth - 1 <= layer <= depth:
        yield f"select_layer: expected one of the {depth} layers of vision_config, found {layer}"
    if least > most:
        yield f"min_dynamic_patch {least} is above max_dynamic_patch {most}"


def _llm_conflicts(llm: Mapping[str, Any]) -> Iterator[str]:
    """Conflicts between fields of the language model."""
    width, heads, names = llm["hidden_size"], llm["num_attention_heads"], llm["architectures"]
    groups = llm.get("num_key_value_heads") or heads
    if not names or not isinstance(names, list):
        yield f"llm_config.architectures: expected a list of one name, found {names!r}"
    if not llm.get("head_dim") and width % heads:
        yield f"llm_config: hidden_size {width} is not a multiple of num_attention_heads {heads}"
    if heads % groups:
        yield f"llm_config: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
    yield from _expert_conflicts(llm)
    if (pad := llm.get("pad_token_id")) is not None and pad >= llm["vocab_size"]:
        yield f"llm_config: pad_token_id {pad} is not below vocab_size {llm['vocab_size']}"
    if (head := _head_width(llm)) % 2:
        yield f"llm_config: the width of a head is {head}; rotary positions need an even one"


MIXTURES = ("Qwen3MoeForCausalLM",)
"""Architectures with experts"""


def _expert_conflicts(llm: Mapping[str, Any]) -> Iterator[str]:
    """Conflicts between fields of a mixture of experts."""
    if llm["architectures"][0] not in MIXTURES:
        return
    for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        if key not in llm:
            yield f"llm_config: no {key!r}; expected {LLM[key].expected()}, as in every mixture of experts"
            return
    if llm["num_experts_per_tok"] > llm["num_experts"]:
        yield f"llm_config: num_experts_per_tok {llm['num_experts_per_tok']} is above num_experts {llm['num_experts']}"
    if not isinstance(llm.get("mlp_only_layers") or [], list):
        yield f"llm_config.mlp_only_layers: expected a list of layers, found {llm['mlp_only_layers']!r}"


def _head_width(llm: Mapping[str, Any]) -> int:
    return int(llm.get("head_dim") or llm["hidden_size"] // llm["num_attention_heads"])


def _rope_faults(llm: Mapping[str, Any]) -> Iterator[str]:
    """Faults of the scaling of rotary positions: missing fields, or sizes that do not fit the heads."""
    half = _head_width(llm) // 2
    for name in ("rope_scaling", "rope_parameters"):
        rope = llm.get(name) or {}
        where, kind = f"llm_config.{name}", rope.get("type") or rope.get("rope_type") or "default"
        factors = [rope.get("short_factor"), rope.get("long_factor")]
        original = llm.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        if kind in ("su", "longrope", "yarn") or factors != [None, None]:
            if [len(f) if isinstance(f, list) else None for f in factors] != [half, half]:
                yield f"{where}: {kind}: expected short_factor and long_factor of {half} numbers, half a head's width"
            if not original:
                yield f"{where}: {kind}: expected original_max_position_embeddings, found {original}"
        elif kind != "default" and "factor" not in rope:
            yield f"{where}: {kind}: expected a factor, found none"
        if kind == "dynamic" and half < 2:
            yield f"{where}: dynamic: the width of a head is {2 * half}; expected at least 4"
