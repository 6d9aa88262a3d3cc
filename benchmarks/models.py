"""Checkpoints of random weights for the other benchmarks: in the released layout, and the same in transformers' own.

python benchmarks/models.py OUT         # OUT/60m, OUT/60m-hf and so on
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch

from ivl.architecture.config import Config
from ivl.architecture.families import config_for, find_model
from ivl.checkpoint.weights import save_weights
from ivl.demo.model import write_tokenizer
from ivl.model.internvl import InternVL
from ivl.storage.files import write_json

TEXT = "Describe the picture in a few words. What is it? How many are there? Read what is written. 0 1 2 3 4 5 6 7 8 9"

BASE: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "template": "Hermes-2",
    "system_message": "",
    "select_layer": -1,
    "ps_version": "v2",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 2,
    "torch_dtype": "float32",
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "patch_size": 14,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "drop_path_rate": 0.0,
    },
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "pad_token_id": None,
    },
}

_TINY = (
    {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96},
    {
        "vocab_size": 700,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
    },
)

_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

SIZES: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "60m": (
        224,
        {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "intermediate_size": 1536},
        {
            "vocab_size": 20000,
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 1536,
        },
    ),
    # InternVL2-1B's proportions: widths halved, a third of the blocks
    "vit-heavy": (
        224,
        {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048},
        {
            "vocab_size": 20000,
            "hidden_size": 448,
            "num_hidden_layers": 8,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "intermediate_size": 2432,
        },
    ),
    # 30B-A3B's proportions: width / 4, a quarter of the experts, the same number of them for a token
    "moe": (
        224,
        {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 1536},
        _MOE
        | {
            "vocab_size": 20000,
            "hidden_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 1536,
            "num_experts": 32,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 192,
        },
    ),
    "tiny": (56, *_TINY),
    "tiny-moe": (
        56,
        _TINY[0],
        _TINY[1] | _MOE | {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    # Good for nothing but making tiles of the releases' size
    "448": (448, *_TINY),
}
"""Name → pixels a side of a tile, the tower, the language model. A tile is 64 tokens, one of tiny 4, one of 448 256."""


def raw_config(size: str) -> dict[str, Any]:
    """A config.json of these dimensions, or of a released model's, for `ivl.architecture.config.Config.from_dict`.

    Raises ValueError for another name.
    """
    if (released := find_model(size)) is not None:
        return copy.deepcopy(dict(config_for(released)))
    if size not in SIZES:
        raise ValueError(f"--size: {size!r} is neither a released model nor one of {', '.join(SIZES)}")
    pixels, vision, llm = SIZES[size]
    raw = copy.deepcopy(BASE) | {"force_image_size": pixels}
    raw["vision_config"] |= {"image_size": pixels} | vision
    raw["llm_config"] |= llm
    return raw


def write(folder: Path, size: str, seed: int = 0, dtype: str = "float32", device: str = "cpu") -> Path:
    """A checkpoint in the released layout, random by `seed`; one that is there is kept. Returns `folder`.

    Prompts are those of `BASE`, whatever a released model's are. Weights are drawn on `device`.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True)
    ids = write_tokenizer(folder, [TEXT])
    end = ids["<|im_end|>"]
    raw = raw_config(size) | {key: BASE[key] for key in ("template", "system_message")} | {"torch_dtype": dtype}
    raw["llm_config"]["eos_token_id"] = end
    parsed = Config.from_dict(raw)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = InternVL.from_config(parsed, dtype, device, image_token_id=ids["<IMG_CONTEXT>"])
    save_weights({name: tensor.cpu() for name, tensor in model.state_dict().items()}, folder, "native", parsed)
    write_json(folder / "generation_config.json", {"eos_token_id": [end, ids["<|endoftext|>"]]})
    write_json(folder / "config.json", raw)
    return folder


def write_twin(folder: Path, base: Path) -> Path:
    """The same weights in transformers' layout, by `ivl export --layout hf`; one that is there is kept."""
    if not folder.is_dir():
        from ivl.commands.export import export

        export(str(folder), base=str(base), layout="hf")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for size in SIZES:
        base = write(out / size, size)
        write_twin(out / f"{size}-hf", base)
        model = InternVL.from_pretrained(base)
        counts = [sum(p.numel() for p in part.parameters()) for part in (model, model.vision_model)]
        print(f"{size}: {counts[0] / 1e6:.1f} M parameters, {counts[1] / 1e6:.1f} M of them in the tower")


if __name__ == "__main__":
    main()
