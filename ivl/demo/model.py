"""Checkpoint of the demo: a tiny InternVL with random weights and a tokenizer of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ivl.architecture.config import Config
from ivl.checkpoint.weights import save_weights
from ivl.model.internvl import InternVL
from ivl.storage.files import write_json

VISUAL = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
NAMED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WIDTH, LLM_WIDTH, LAYERS = 96, 128, 2


def write_tokenizer(folder: Path, texts: Iterable[str]) -> dict[str, int]:
    """Write tokenizer.json and its companions: byte-level BPE, a number is one token. Returns the added tokens' ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    cut = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cut), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    ids = {token: len(state["model"]["vocab"]) + n for n, token in enumerate((*NAMED, *VISUAL))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    state["added_tokens"] = [{"id": number, "content": token} | flags for token, number in ids.items()]
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    decoder = {str(number): {"content": token} | flags for token, number in ids.items()}
    write_json(folder / "tokenizer.json", state)
    write_json(folder / "added_tokens.json", ids)
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": list(ids)} | named)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(
        folder / "tokenizer_config.json", {"added_tokens_decoder": decoder, "model_max_length": 1024} | kind | named
    )
    return ids


def config(ids: dict[str, int]) -> dict[str, Any]:
    """Content of config.json: a tile of 32 pixels is 16 patches and 4 tokens, one for each place of a picture."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": "Hermes-2",
        "system_message": "",
        "select_layer": -1,
        "ps_version": "v2",
        "downsample_ratio": 0.5,
        "force_image_size": 32,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 2,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "torch_dtype": "float32",
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "intermediate_size": 3 * WIDTH,
            "image_size": 32,
            "patch_size": 8,
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
            "vocab_size": max(ids.values()) + 1,
            "hidden_size": LLM_WIDTH,
            "intermediate_size": 3 * LLM_WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 1024,
            "rope_theta": 100.0,  # conversations are short; with the usual base the small heads hardly tell positions
            "tie_word_embeddings": False,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": None,
        },
    }


def write_checkpoint(folder: Path, texts: Iterable[str], seed: int = 0) -> None:
    """Write a checkpoint folder, weights random by `seed`, the tokenizer trained on `texts`."""
    folder.mkdir(parents=True)
    ids = write_tokenizer(folder, texts)
    raw = config(ids)
    write_json(folder / "config.json", raw)
    write_json(folder / "generation_config.json", {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]})
    parsed = Config.from_dict(raw)
    model = InternVL.from_config(parsed, image_token_id=ids["<IMG_CONTEXT>"])
    initialise(model, torch.Generator().manual_seed(seed))
    save_weights(model.state_dict(), folder, "native", parsed)


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Set weights with which so small a model learns in minutes.

    They keep the scale of activations; but the output of attention shall be large beside a token's own embedding,
    since a digit is first seen through attention spread over the whole row: values are doubled, embeddings
    kept small. With all at 1 the model takes four times as many rows before it begins to read.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".ls1", ".ls2")):
                parameter.fill_(1)
            elif "embed_tokens" in name or name.endswith(("position_embedding", "class_embedding")):
                parameter.normal_(0, 0.3, generator=generator)
            elif parameter.ndim > 1:
                scale = 1 / math.sqrt(parameter[0].numel())
                if name.endswith("v_proj.weight"):
                    scale *= 2
                elif name.endswith("down_proj.weight"):
                    scale /= math.sqrt(2 * LAYERS)
                parameter.normal_(0, scale, generator=generator)
            elif name.endswith(".bias"):
                parameter.zero_()
