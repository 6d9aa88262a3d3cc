"""Dimensions of the language models inside the releases.

`ivl.architecture.families` names the releases.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Backbone:
    """Dimensions of a language model as it stands inside the releases; its fields are keys of `llm_config`."""

    architecture: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    """Size of the vocabulary, with the visual tokens the release added."""
    rope_theta: float
    dynamic_factor: float | None = None
    """Factor of dynamic NTK; None: none"""
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    head_dim: int | None = None
    """Width of a head; None: hidden_size / num_attention_heads."""
    num_experts: int | None = None
    """Experts of each layer, in the place of its MLP; None: no mixture of experts."""
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    unverified: tuple[str, ...] = ()
    """Fields inferred, not read in the release's own config.json. Only `vocab_size` among them is a shape, and its
    count is the base tokenizer's with the added tokens, as the released trainer resizes it"""

    @property
    def parameters(self) -> int:
        """Weights of the language model, input and output embeddings apart."""
        return self._count(self.num_experts)

    @property
    def active_parameters(self) -> int:
        """Weights that a token is multiplied with: those of its own experts alone, where there are any."""
        return self._count(self.num_experts_per_tok)

    def _count(self, experts: int | None) -> int:
        head = self.head_dim or self.hidden_size // self.num_attention_heads
        q, kv = self.num_attention_heads * head, 2 * self.num_key_value_heads * head
        mlp = 3 * self.intermediate_size
        if experts and self.num_experts and self.moe_intermediate_size:
            mlp = 3 * self.moe_intermediate_size * experts + self.num_experts
        layer = self.hidden_size * (2 * q + kv + mlp + 2)
        norms = {"Qwen2ForCausalLM": q + kv, "Qwen3ForCausalLM": 2 * head, "Qwen3MoeForCausalLM": 2 * head}
        layer += norms.get(self.architecture, 0)
        return self.num_hidden_layers * layer + self.hidden_size * (1 + 2 * self.vocab_size)

    def config(self) -> dict[str, Any]:
        """Keys of `llm_config` that decide shapes and positions."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        skipped = ("architecture", "dynamic_factor", "unverified")
        values = {k: v for k, v in values.items() if k not in skipped and v is not None}
        scaling = {"type": "dynamic", "factor": self.dynamic_factor} if self.dynamic_factor else None
        values |= {"architectures": [self.architecture], "rope_scaling": scaling, "tie_word_embeddings": False}
        return values | _ALSO.get(self.architecture, {})


_ALSO: dict[str, dict[str, Any]] = {
    "InternLM2ForCausalLM": {"bias": False},
    "Qwen2ForCausalLM": {"use_sliding_window": False},
    "Qwen3ForCausalLM": {"use_sliding_window": False},
    "Qwen3MoeForCausalLM": {
        "use_sliding_window": False,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
    },
    # Its longrope factors, 96 numbers, are read from a checkpoint and not repeated here.
    "Phi3ForCausalLM": {"original_max_position_embeddings": 4096, "pad_token_id": 32000},
}

_SCALING = ("dynamic_factor",)


Sizes = tuple[int, int, int, int, int]
"""hidden_size, layers, heads, key-value heads, intermediate_size"""


def _internlm2(
    sizes: Sizes, vocab: int = 92553, theta: float = 1e6, factor: float = 2.0, unverified: tuple[str, ...] = ()
) -> Backbone:
    return Backbone("InternLM2ForCausalLM", *sizes, vocab, theta, factor, 32768, 1e-5, unverified=unverified)


def _qwen2(
    sizes: Sizes, vocab: int = 151674, factor: float | None = None, unverified: tuple[str, ...] = ()
) -> Backbone:
    return Backbone("Qwen2ForCausalLM", *sizes, vocab, 1e6, factor, unverified=unverified)


def _qwen3(sizes: Sizes) -> Backbone:
    return Backbone("Qwen3ForCausalLM", *sizes, 151936, 1e6, None, 40960, head_dim=128)


def _qwen3_moe(sizes: Sizes, moe_intermediate_size: int) -> Backbone:
    experts: dict[str, Any] = {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": moe_intermediate_size,
    }
    return Backbone("Qwen3MoeForCausalLM", *sizes, 151936, 1e6, None, 40960, head_dim=128, **experts)


# Each row is checked by the published size of its release.
BACKBONES: dict[str, Backbone] = {
    "internlm2-chat-1_8b": _internlm2((2048, 24, 16, 8, 8192)),
    "internlm2-chat-20b": _internlm2((6144, 48, 48, 8, 16384), factor=3.0),
    "internlm2_5-1_8b-chat": _internlm2((2048, 24, 16, 8, 8192), unverified=_SCALING),
    "internlm2_5-7b-chat": _internlm2((4096, 32, 32, 8, 14336), unverified=_SCALING),
    "internlm2_5-20b-chat": _internlm2((6144, 48, 48, 8, 16384), unverified=_SCALING),
    # InternLM3 in InternLM2's layout and class; vocabulary: 128512 and nine visual tokens.
    "internlm3-8b-instruct": _internlm2(
        (4096, 48, 32, 2, 10240), vocab=128521, theta=5e7, factor=6.0, unverified=("vocab_size", *_SCALING)
    ),
    "Phi-3-mini-128k-instruct": Backbone(
        "Phi3ForCausalLM", 3072, 32, 32, 32, 8192, 32020, 1e4, None, 131072, 1e-5, unverified=("rope_scaling",)
    ),
    # Yi's own vocabulary has <img> and </img>; seven of the nine visual tokens are added.
    "Nous-Hermes-2-Yi-34B": Backbone(
        "LlamaForCausalLM", 7168, 60, 56, 8, 20480, 64007, 5e6, None, 4096, 1e-5, unverified=("vocab_size",)
    ),
    "Hermes-2-Theta-Llama-3-70B": Backbone(
        "LlamaForCausalLM", 8192, 80, 64, 8, 28672, 128265, 5e5, None, 8192, 1e-5, unverified=("vocab_size",)
    ),
    "Qwen2-0.5B-Instruct": _qwen2((896, 24, 14, 2, 4864), vocab=151655),
    "Qwen2.5-0.5B-Instruct": _qwen2((896, 24, 14, 2, 4864)),
    "Qwen2.5-3B-Instruct": _qwen2((2048, 36, 16, 2, 11008)),
    "Qwen2.5-32B-Instruct": _qwen2((5120, 64, 40, 8, 27648), unverified=_SCALING),
    "Qwen2.5-72B-Instruct": _qwen2((8192, 80, 64, 8, 29568)),
    "Qwen2.5-0.5B": _qwen2((896, 24, 14, 2, 4864), factor=2.0, unverified=_SCALING),
    "Qwen2.5-1.5B": _qwen2((1536, 28, 12, 2, 8960), factor=2.0, unverified=_SCALING),
    "Qwen2.5-7B": _qwen2((3584, 28, 28, 4, 18944), factor=2.0),
    "Qwen2.5-14B": _qwen2((5120, 48, 40, 8, 13824), factor=2.0, unverified=_SCALING),
    "Qwen2.5-32B": _qwen2((5120, 64, 40, 8, 27648), factor=2.0, unverified=_SCALING),
    "Qwen2.5-72B": _qwen2((8192, 80, 64, 8, 29568), factor=2.0),
    "Qwen3-0.6B": _qwen3((1024, 28, 16, 8, 3072)),
    "Qwen3-1.7B": _qwen3((2048, 28, 16, 8, 6144)),
    "Qwen3-4B": _qwen3((2560, 36, 32, 8, 9728)),
    "Qwen3-8B": _qwen3((4096, 36, 32, 8, 12288)),
    "Qwen3-14B": _qwen3((5120, 40, 40, 8, 17408)),
    "Qwen3-32B": _qwen3((5120, 64, 64, 8, 25600)),
    "Qwen3-30B-A3B": _qwen3_moe((2048, 48, 32, 4, 6144), 768),
    "Qwen3-235B-A22B": _qwen3_moe((4096, 94, 64, 4, 12288), 1536),
}
