"""Tiny checkpoints in the released layout, with random weights and a tokenizer trained on the spot, for every family.

    folder = write_checkpoint(tmp_path, architecture="InternLM2ForCausalLM", vision="6b")

Sizes: 56 pixels a side and patches of 14, so a tile is 4 tokens; 2 layers in the tower and 2 in the language model.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ivl.architecture.config import Config
from ivl.architecture.families import llm_family
from ivl.checkpoint.weights import save_weights, to_stored
from ivl.model.internvl import InternVL

T = TypeVar("T")

VISUAL = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
CHATML = ("<|im_start|>", "<|im_end|>")

TEXT = """Describe the image. What is in the picture? There are four sheep on the grass, and a small white cat.
Which digit is written here? It is a 7. How many are there? 0 1 2 3 4 5 6 7 8 9 10 11 12 100 2024
<ref>cat</ref><box>[[10, 20, 300, 999]]</box> You are an AI assistant. system user assistant Frame1: Frame-1:
请描述这张图片。 图中有四只羊。 你是书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。
The quick brown fox jumps over the lazy dog; read the handwriting, and answer with a single word or number!
"""

TOWERS: dict[str, dict[str, Any]] = {
    "300m": {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False, "initializer_factor": 1.0},
    "6b": {"norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True, "initializer_factor": 0.1},
}
"""The two variants of InternViT"""

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "InternLM2ForCausalLM": (
        "internlm2",
        "internlm2-chat",
        {"bias": False, "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "Qwen2ForCausalLM": (
        "qwen2",
        "Hermes-2",
        {"rope_theta": 1000000.0, "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 24},
    ),
    "Qwen3ForCausalLM": ("qwen3", "internvl2_5", {"rope_theta": 1000000, "head_dim": 16, "attention_bias": False}),
    "Qwen3MoeForCausalLM": (
        "qwen3",
        "internvl2_5",
        {
            "rope_theta": 1000000,
            "head_dim": 16,
            "attention_bias": False,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "LlamaForCausalLM": ("yi", "Hermes-2", {"rope_theta": 5000000.0}),
    "Phi3ForCausalLM": (
        "phi3",
        "phi3-chat",
        {
            "rope_theta": 10000.0,
            "num_key_value_heads": 4,
            "sliding_window": 262144,
            "original_max_position_embeddings": 256,
            "rope_scaling": {
                "type": "su",
                "short_factor": [1.0 + 0.1 * n for n in range(8)],
                "long_factor": [1.5 + 1.7 * n for n in range(8)],
            },
        },
    ),
}
"""Architecture → its usual tokenizer, its template, and what its `llm_config` has beyond the common keys"""


def write_checkpoint(
    folder: Path,
    architecture: str = "Qwen2ForCausalLM",
    vision: str = "300m",
    template: str | None = None,
    tokenizer: str | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5 * 10**9,
    llm: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write config.json, generation_config.json, weights and tokenizer files; returns `folder`.

    `tokenizer`: a key of `TOKENIZERS`. `llm` and `overrides`: further keys of `llm_config` and of the top level.
    """
    style, usual_template, extra = FAMILIES[architecture]
    folder.mkdir(parents=True, exist_ok=True)
    added = write_tokenizer(folder, tokenizer or style)
    raw = config(architecture, vision, template or usual_template, added, extra | (llm or {}), overrides or {})
    _dump(folder / "config.json", raw)
    ends = [added[t] for t in ("<|im_end|>", "<|end|>", "</s>", "<|endoftext|>", "<|eot_id|>") if t in added]
    _dump(folder / "generation_config.json", {"_from_model_config": True, "eos_token_id": ends})
    parsed = Config.from_dict(raw)
    state = random_state(parsed, seed, dtype)
    save_weights(state, folder, llm_family(architecture).layout, parsed, max_shard_bytes)
    return folder


def config(
    architecture: str,
    vision: str,
    template: str,
    added: dict[str, int],
    llm: dict[str, Any],
    overrides: dict[str, Any],
) -> dict[str, Any]:
    """A config.json with the keys of a release."""
    vocabulary = 1 + max(added.values())
    llm_config = {
        "architectures": [architecture],
        "model_type": {"InternLM2ForCausalLM": "internlm2"}.get(architecture, llm_family(architecture).model_type),
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "attn_implementation": "eager",
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    vision_config = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "image_size": 56,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "drop_path_rate": 0.0,
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "initializer_range": 0.02,
        "use_flash_attn": True,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": template,
        "select_layer": -1,
        "ps_version": "v2",
        "downsample_ratio": 0.5,
        "force_image_size": 56,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "pad2square": False,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "llm_config": llm_config | llm,
        "vision_config": vision_config | TOWERS[vision],
    } | overrides


def random_state(parsed: Config, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of every parameter, scaled so that logits are of order one. Names are the module's."""
    generator = torch.Generator().manual_seed(seed)
    shapes = InternVL.from_config(parsed, device="meta").state_dict()
    state = {}
    for name, meta in shapes.items():
        noise = torch.randn(meta.shape, generator=generator)
        if "norm" in name or name.endswith((".ls1", ".ls2", "mlp1.0.weight")):
            value = 1 + 0.1 * noise
        elif meta.ndim < 2 or "embedding" in name:
            value = 0.1 * noise
        else:
            value = noise / (meta[0].numel() if meta.ndim != 3 else meta.shape[-1]) ** 0.5
        state[name] = value.to(dtype)
    return state


def transformers_names(values: Mapping[str, T]) -> dict[str, T]:
    """Values by name of a language model's parameters, under the names of transformers' own class."""
    fused = (".experts.gate_up_proj.weight", ".experts.down_proj.weight")
    return {name.removesuffix(".weight") if name.endswith(fused) else name: value for name, value in values.items()}


def stored_state(parsed: Config, seed: int = 0) -> dict[str, Tensor]:
    """The same weights as a release's file has them."""
    return to_stored(random_state(parsed, seed), llm_family(parsed.llm_architecture).layout, parsed)


def write_tokenizer(folder: Path, style: str) -> dict[str, int]:
    """Write a release's tokenizer files; returns the ids of the added tokens."""
    return TOKENIZERS[style](folder)


def _qwen2(folder: Path) -> dict[str, int]:
    """vocab.json and merges.txt, as Qwen2 and Qwen3 have them."""
    model = json.loads(_byte_level_bpe())["model"]
    _dump(folder / "vocab.json", model["vocab"])
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    tokens = ("<|endoftext|>", *CHATML, *VISUAL)
    added = {token: len(model["vocab"]) + n for n, token in enumerate(tokens)}
    _write_added(folder, added, "Qwen2Tokenizer", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, tokens)
    return added


QWEN3 = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Added tokens of Qwen3 that are no control tokens"""


def _qwen3(folder: Path) -> dict[str, int]:
    """The same with Qwen3's further tokens, and the chat template of InternVL3.5."""
    model = json.loads(_byte_level_bpe())["model"]
    _qwen2(folder)
    tokens = ("<|endoftext|>", *CHATML, "<|vision_start|>", *QWEN3, *VISUAL)
    added = {token: len(model["vocab"]) + n for n, token in enumerate(tokens)}
    special = tuple(token for token in tokens if token not in QWEN3)
    _write_added(folder, added, "Qwen2Tokenizer", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, special)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE_3_5, encoding="utf-8")
    return added


CHAT_TEMPLATE_3_5 = (
    "{%- for m in messages -%}{{ '<|im_start|>' ~ m['role'] ~ '\\n' }}{%- if m['content'] is string -%}"
    "{{ m['content'] }}{%- else -%}{%- for part in m['content'] -%}{%- if part['type'] == 'text' -%}{{ part['text'] }}"
    "{%- else -%}{{ '<' ~ part['type'] ~ '>\\n' }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
"""As the releases of 3.5 have it: no system turn of its own"""


def _llama3(folder: Path) -> dict[str, int]:
    """tokenizer.json alone, as Llama 3 has it."""
    whole = json.loads(_byte_level_bpe())
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", *CHATML, *VISUAL)
    added = {token: len(whole["model"]["vocab"]) + n for n, token in enumerate(names)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    whole["added_tokens"] = [{"id": number, "content": token} | flags for token, number in added.items()]
    _dump(folder / "tokenizer.json", whole)
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"}
    _write_added(folder, added, "PreTrainedTokenizerFast", named, names, write_ids=False)
    return added


def _sentencepiece(
    folder: Path, kind: str, names: tuple[str, ...], symbols: tuple[str, ...] = (), prefix: bool = True, **settings: Any
) -> dict[str, int]:
    """tokenizer.model with byte fallback, as InternLM2, Phi-3 and Yi have it."""
    model, size = _sentencepiece_model(symbols, prefix)
    (folder / "tokenizer.model").write_bytes(model)
    own = {"<unk>": 0, "<s>": 1, "</s>": 2}
    added = {token: size + n for n, token in enumerate(names)}
    end = "<|endoftext|>" if "<|endoftext|>" in added else "</s>"
    named = {"bos_token": "<s>", "eos_token": end, "pad_token": end, "unk_token": "<unk>"}
    _write_added(folder, added, kind, named, tuple(added), own, **settings)
    return own | added


def _internlm2(folder: Path) -> dict[str, int]:
    names = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", *reversed(CHATML), *VISUAL)
    return _sentencepiece(folder, "InternLM2Tokenizer", names)


def _phi3(folder: Path) -> dict[str, int]:
    names = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", *VISUAL)
    return _sentencepiece(folder, "LlamaTokenizer", names, add_bos_token=True, add_eos_token=False, legacy=False)


def _yi(folder: Path) -> dict[str, int]:
    names = (*CHATML, *VISUAL)
    return _sentencepiece(folder, "LlamaTokenizer", names, add_bos_token=False, add_eos_token=False, legacy=True)


SYMBOLS = ("<|im_start|>", "<fim_prefix>", "[UNUSED_TOKEN_3]", "Ｅ")


def _yi_symbols(folder: Path, prefix: bool = False) -> dict[str, int]:
    """Yi as released: `<|im_start|>` is a user-defined symbol of sentencepiece, and no added token."""
    names = ("<|im_end|>", *VISUAL)
    flags = {"add_bos_token": False, "add_eos_token": False, "legacy": True}
    return _sentencepiece(folder, "LlamaTokenizer", names, SYMBOLS, prefix, **flags)


def _yi_prefix(folder: Path) -> dict[str, int]:
    """The same where sentencepiece puts a blank before a text."""
    return _yi_symbols(folder, prefix=True)


TOKENIZERS = {
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "llama3": _llama3,
    "internlm2": _internlm2,
    "phi3": _phi3,
    "yi": _yi,
    "yi-symbols": _yi_symbols,
    "yi-prefix": _yi_prefix,
}
"""Shapes of tokenizer files that releases have"""


def _write_added(
    folder: Path,
    added: dict[str, int],
    kind: str,
    named: dict[str, str],
    special: tuple[str, ...],
    own: dict[str, int] | None = None,
    write_ids: bool = True,
    **settings: Any,
) -> None:
    """added_tokens.json, special_tokens_map.json and tokenizer_config.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    # Phi-3's role tokens swallow the blanks after them.
    rstrip = {t for t in added if t in ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")}
    decoder = {
        str(number): {"content": token} | flags | {"rstrip": token in rstrip, "special": token not in QWEN3}
        for token, number in ((own or {}) | added).items()
    }
    if write_ids:
        _dump(folder / "added_tokens.json", dict(sorted(added.items())))
    _dump(folder / "special_tokens_map.json", {"additional_special_tokens": list(special)} | named)
    _dump(
        folder / "tokenizer_config.json",
        {"added_tokens_decoder": decoder, "additional_special_tokens": list(special)}
        | named
        | {"clean_up_tokenization_spaces": False, "tokenizer_class": kind, "model_max_length": 8192}
        | settings,
    )


@lru_cache
def _byte_level_bpe() -> str:
    """A tokenizer.json with about 300 tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    cut = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cut), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return tokenizer.to_str()


@lru_cache
def _sentencepiece_model(symbols: tuple[str, ...] = (), prefix: bool = True) -> tuple[bytes, int]:
    """The bytes of a tokenizer.model, and how many pieces it has."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=written,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,
        split_digits=True,
        add_dummy_prefix=prefix,
        user_defined_symbols=list(symbols),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = written.getvalue()
    return model, sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
