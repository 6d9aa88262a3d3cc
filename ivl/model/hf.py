"""config.json of transformers' InternVLForConditionalGeneration ("-hf" folders) to and from the released one.

Only pixel shuffle v2 can be said there, and no template: the published -hf folders are InternVL3 and later, whose
template is internvl2_5.
"""

from __future__ import annotations

from typing import Any

from ivl.config import Config
from ivl.families import LLMS
from ivl.model.llm import llm_config
from ivl.types import UserError

ARCHITECTURE = "InternVLForConditionalGeneration"
TEMPLATE = "internvl2_5"

_VISION = {
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
"""Released name → transformers' name, within vision_config"""

_QK_NORM_EPS = 1e-6
"""What transformers' class uses for q and k, whatever the config says"""


def is_hf(raw: dict[str, Any]) -> bool:
    return raw.get("model_type") == "internvl" or raw.get("architectures") == [ARCHITECTURE]


def released_config(raw: dict[str, Any]) -> dict[str, Any]:
    """A -hf config.json in the released form. Raises UserError for what the released form cannot say."""
    from transformers import InternVLConfig

    whole = InternVLConfig(**{k: v for k, v in raw.items() if k not in ("architectures", "dtype", "torch_dtype")})
    vision, text = whole.vision_config, whole.text_config
    _refuse(
        "config.json",
        {
            "vision_config.use_mean_pooling": (vision.use_mean_pooling, True),
            "vision_config.use_mask_token": (vision.use_mask_token, False),
            "vision_config.use_absolute_position_embeddings": (vision.use_absolute_position_embeddings, True),
            "vision_feature_select_strategy": (whole.vision_feature_select_strategy, "default"),
            "projector_hidden_act": (whole.projector_hidden_act, "gelu"),
        },
    )
    architecture = next((a for a, row in LLMS.items() if row.model_type == text.model_type and not row.renamed), None)
    if architecture is None:
        raise UserError(f"config.json: text_config.model_type {text.model_type!r} is not a language model known here")
    size, patch = vision.image_size[0], vision.patch_size[0]
    vision_config = {ours: getattr(vision, theirs) for ours, theirs in _VISION.items()}
    vision_config |= {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "image_size": size,
        "patch_size": patch,
        "drop_path_rate": 0.0,
    }
    text_config = {k: v for k, v in text.to_dict().items() if k not in ("architectures", "dtype")}
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": TEMPLATE,
        "select_layer": whole.vision_feature_layer,
        "ps_version": "v2",
        "downsample_ratio": whole.downsample_ratio,
        "force_image_size": size,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "pad2square": False,
        "tie_word_embeddings": whole.tie_word_embeddings,
        "vision_config": vision_config,
        "llm_config": text_config | {"architectures": [architecture], "tie_word_embeddings": whole.tie_word_embeddings},
    }


def hf_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """The config.json of a -hf folder. Raises UserError for what it cannot say."""
    vision = config.vision
    qk_eps = vision.layer_norm_eps if vision.qk_normalization else _QK_NORM_EPS
    _refuse(
        "the hf layout",
        {"ps_version": (config.ps_version, "v2"), "layer_norm_eps with qk_normalization": (qk_eps, _QK_NORM_EPS)},
    )
    text = llm_config(config)
    size = [config.image_size, config.image_size]
    vision_config = {theirs: getattr(vision, ours) for ours, theirs in _VISION.items()}
    vision_config |= {
        "model_type": "internvl_vision",
        "image_size": size,
        "patch_size": [vision.patch_size, vision.patch_size],
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
    }
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "internvl",
        "image_token_id": image_token_id,
        "image_seq_length": config.tokens_per_tile,
        "downsample_ratio": config.downsample_ratio,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": text.tie_word_embeddings,
        "vision_config": vision_config,
        "text_config": {k: v for k, v in text.to_dict().items() if not k.startswith("_")},
    }


def _refuse(where: str, values: dict[str, tuple[Any, Any]]) -> None:
    wrong = [f"{name} must be {need!r}, found {have!r}" for name, (have, need) in values.items() if have != need]
    if wrong:
        raise UserError(f"{where}: {'; '.join(wrong)}")
