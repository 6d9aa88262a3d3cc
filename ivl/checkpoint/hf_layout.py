"""Writer of config.json and weights in transformers' layout ("-hf" folders).

The class there is InternVLForConditionalGeneration. `ivl.architecture.hf_config` reads the config,
`ivl.checkpoint.layouts` has the names of the weights.

Its config knows pixel shuffle v2 alone, and no template.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ivl.architecture.config import Config
from ivl.architecture.config_fields import LLM as LLM_FIELDS
from ivl.architecture.families import llm_family
from ivl.architecture.hf_config import ARCHITECTURE, VISION, refuse
from ivl.finetune.tune import EMBEDDINGS, HEAD
from ivl.model.decoder import DecoderConfig
from ivl.model.rotary import rope_parameters
from ivl.model.vision import Embeddings

_QK_NORM_EPS = 1e-6
"""Epsilon of q and k norms in transformers' class, which ignores the config's"""


_NOT_COPIED = ("architectures", "dtype", "torch_dtype", "rope_parameters", "rope_scaling", "rope_theta")


def llm_config(config: Config) -> Any:
    """Return `config.llm` as the transformers config of the family's class."""
    from transformers import CONFIG_MAPPING

    raw = config.llm
    family = llm_family(config.llm_architecture)
    kind = CONFIG_MAPPING[family.model_type]
    names = signature(kind).parameters.keys() & LLM_FIELDS.keys() & raw.keys() - set(_NOT_COPIED)
    values = {n: float(raw[n]) if LLM_FIELDS[n].kind is float else raw[n] for n in names if raw[n] is not None}
    values |= {new: raw[old] for old, new in family.renamed if old in raw}
    # The classes' defaults are ids of some other vocabulary.
    values |= {name: raw.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    head = DecoderConfig.from_llm(raw, family).head_dim
    if head != raw["hidden_size"] // raw["num_attention_heads"]:
        values["head_dim"] = head  # the class of a mixture has no field for it, and reads it all the same
    return kind(**values, rope_parameters=rope_parameters(raw))


def hf_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """Return the config.json of a -hf folder. Raises UserError for settings that it cannot express."""
    vision = config.vision
    qk_eps = vision.layer_norm_eps if vision.qk_normalization else _QK_NORM_EPS
    refuse(
        "the hf layout",
        {"ps_version": (config.ps_version, "v2"), "layer_norm_eps with qk_normalization": (qk_eps, _QK_NORM_EPS)},
    )
    text = llm_config(config)
    size = [config.image_size, config.image_size]
    vision_config = {hf_key: getattr(vision, key) for key, hf_key in VISION.items()}
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


VOCABULARY = (EMBEDDINGS + ".weight", HEAD + ".weight")
"""Weights that have a row for each token"""


def hf_tensor(name: str, tensor: Tensor, config: Config, image_token_id: int, vocab_size: int) -> Tensor:
    """Convert a weight of the model for transformers' class; most are unchanged. `name`: the module's.

    Its processor adds the token `<video>`: tokens without a row get that of the image token, which a model never
    answers with; on a tie the first wins. The tower has positions for tiles of its own size only.
    """
    if name in VOCABULARY and len(tensor) < vocab_size:
        return torch.cat([tensor, tensor[image_token_id].expand(vocab_size - len(tensor), -1)])
    if name == "vision_model.embeddings.position_embedding" and config.image_size != config.vision.image_size:
        embeddings = Embeddings(config.vision)
        embeddings.position_embedding = nn.Parameter(tensor, requires_grad=False)
        side = config.image_size // config.vision.patch_size
        return embeddings.positions(side, side)
    return tensor
