"""Config of -hf folders (transformers' InternVLForConditionalGeneration), read as released.

`ivl.checkpoint.hf_layout` writes it. It names no template: `ivl.data.text.jinja_template.recognised` finds it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ivl.architecture.config import Config, read_json
from ivl.architecture.config_fields import LLM as LLM_FIELDS
from ivl.architecture.config_fields import VISION as VISION_FIELDS
from ivl.architecture.config_fields import check_part, shown
from ivl.architecture.families import LLMS
from ivl.errors import UserError

ARCHITECTURE = "InternVLForConditionalGeneration"

VISION = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "num_channels": "num_channels",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_act": "hidden_act",
    "attention_dropout": "attention_dropout",
    "dropout": "projection_dropout",
    "initializer_range": "initializer_range",
    "initializer_factor": "layer_scale_init_value",
}
"""Names in vision_config: released → transformers'."""


PROGRAM_KEYS = ("release", "system_turn")
"""Keys that this program's exports add to config.json, as no other key tells them."""


def is_hf(raw: dict[str, Any]) -> bool:
    """True for the config.json of a -hf folder."""
    return raw.get("model_type") == "internvl" or raw.get("architectures") == [ARCHITECTURE]


def released_config(raw: dict[str, Any]) -> dict[str, Any]:
    """Convert a -hf config.json to the released form, `template` empty. Raises UserError for values without one."""
    from transformers import InternVLConfig

    _check(raw)
    try:
        config = InternVLConfig(**{k: v for k, v in raw.items() if k not in ("architectures", "dtype", "torch_dtype")})
    except Exception as error:
        raise UserError(f"config.json: transformers cannot read it: {' '.join(str(error).split())[:300]}") from error
    vision, text = config.vision_config, config.text_config
    refuse(
        "config.json",
        {
            "vision_config.use_mean_pooling": (vision.use_mean_pooling, True),
            "vision_config.use_mask_token": (vision.use_mask_token, False),
            "vision_config.use_absolute_position_embeddings": (vision.use_absolute_position_embeddings, True),
            "vision_feature_select_strategy": (config.vision_feature_select_strategy, "default"),
            "projector_hidden_act": (config.projector_hidden_act, "gelu"),
        },
    )
    architecture = next((a for a, row in LLMS.items() if row.model_type == text.model_type and not row.renamed), None)
    if architecture is None:
        raise UserError(f"config.json: text_config.model_type {text.model_type!r} is not a language model known here")
    size, patch = vision.image_size[0], vision.patch_size[0]
    vision_config = {name: getattr(vision, hf_name) for name, hf_name in VISION.items()}
    vision_config |= {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "image_size": size,
        "patch_size": patch,
        "drop_path_rate": 0.0,
    }
    text_config = {k: v for k, v in text.to_dict().items() if k not in ("architectures", "dtype")}
    # A mixture's class calls its number of experts by another name in files, and knows no width of a head.
    text_config |= {k: getattr(text, k) for k in ("num_experts", "head_dim") if getattr(text, k, None) is not None}
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": "",
        "select_layer": config.vision_feature_layer,
        "ps_version": "v2",
        "downsample_ratio": config.downsample_ratio,
        "force_image_size": size,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "pad2square": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vision_config": vision_config,
        "llm_config": text_config
        | {"architectures": [architecture], "tie_word_embeddings": config.tie_word_embeddings},
    }


def read_config(folder: str | Path) -> Config:
    """Read the config of a checkpoint folder in either layout, with the tile limits of a -hf folder's image processor.

    Raises UserError where there is no config.json, or it is none of an InternVL chat model.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if is_hf(raw):
        released = released_config(raw) | _tile_limits(Path(folder)) | {k: raw[k] for k in PROGRAM_KEYS if k in raw}
        return replace(Config.from_dict(released, where=str(path)), layout="hf")
    return Config.from_dict(raw, where=str(path))


def _check(raw: dict[str, Any]) -> None:
    """Raise UserError for a value out of its range, before transformers reads it."""
    vision = {hf_name: VISION_FIELDS[name] for name, hf_name in VISION.items() if name != "initializer_factor"}
    text = {key: field for key, field in LLM_FIELDS.items() if key != "architectures"}
    for name, table in (("vision_config", vision), ("text_config", text)):
        part = raw.get(name)
        if not isinstance(part, dict):
            raise UserError(f"config.json: {name}: expected an object, found {shown(part)}")
        check_part(part, table, "config.json", f"{name}.", partial=True)
    for key in ("image_size", "patch_size"):
        sides = raw["vision_config"].get(key, 1)
        sides = sides if isinstance(sides, list) else [sides]
        if not sides or len(set(map(repr, sides))) > 1 or not VISION_FIELDS[key].holds(sides[0]):
            expected = VISION_FIELDS[key].expected()
            raise UserError(f"config.json: vision_config.{key}: expected {expected} (squares only), found {sides}")


def _tile_limits(folder: Path) -> dict[str, int]:
    for name, inner in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        if (folder / name).is_file():
            values = read_json(folder / name)
            values = values.get(inner) or {} if inner else values
            keys = {"min_dynamic_patch": "min_patches", "max_dynamic_patch": "max_patches"}
            if limits := {key: values[hf_key] for key, hf_key in keys.items() if isinstance(values.get(hf_key), int)}:
                return limits
    return {}


def refuse(where: str, values: dict[str, tuple[Any, Any]]) -> None:
    """Raise UserError listing the differences. `values`: name → (actual value, required value)."""
    wrong = [f"{name} must be {need!r}, found {have!r}" for name, (have, need) in values.items() if have != need]
    if wrong:
        raise UserError(f"{where}: {'; '.join(wrong)}")
