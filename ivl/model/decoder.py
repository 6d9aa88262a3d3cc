"""Decoder: the language model of every release (RMSNorm, GQA, rotary positions, SwiGLU).

    ids → `embed_tokens` → layers: x + attention(norm(x)), x + mlp(norm(x)) → `norm` → `lm_head`

What differs between families is data: a row of `ivl.architecture.families.LLMS` fills `DecoderConfig`. Names of
parameters are those of the released checkpoints and of transformers, which the tests compare with.

Shapes: B rows, T tokens of this call, S keys (those of a cache included), D width, H heads, G heads of keys and values,
K width of a head, F width inside the MLP, V vocabulary, M positions whose result is read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ivl.architecture.families import LLMFamily
from ivl.model.attention import Join, Layout, attend, joined, visible
from ivl.model.layers import ACTIVATIONS, Gated, RMSNorm
from ivl.model.moe.experts import ExpertMLP, ExpertsConfig, GroupedLinear, Router, RouterLoads, sparse_layers
from ivl.model.rotary import Rope, RotaryEmbedding, rotate
from ivl.types import SequenceLayout, UserError


class KVCache(Protocol):
    """Keys and values of the tokens before this call."""

    def update(self, layer: int, keys_BGTK: Tensor, values_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of this call. Returns those that its queries meet, (B, G, S, K); a mask hides some."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shapes and variants of a decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope: Rope = field(default_factory=Rope)
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of attention's output layer"""
    mlp_bias: bool = False
    qk_norm: bool = False
    """True: queries and keys are normalised head by head"""
    fused: bool = False
    """True: fused layers, one for queries, keys and values, one for the MLP's gate and up"""
    mlp: str = "gated"
    """A key of `MLPS`"""
    experts: ExpertsConfig | None = None
    """Experts of a mixture; layers without them have the MLP `gated`"""
    sliding_window: int | None = None
    """Tokens that a token looks back at, itself included; None: to the beginning"""
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    """Dropout on what attention and the MLP add to the residual stream"""
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    attention: str = "sdpa"
    """The kernel, one of `ivl.model.attention.KERNELS`"""

    @classmethod
    def from_llm(cls, raw: dict[str, Any], family: LLMFamily, attention: str = "sdpa") -> DecoderConfig:
        """Read the fields of an `llm_config` that `ivl.architecture.config_fields` has checked.

        Raises UserError for a setting that no release has.
        """
        raw = dict(family.defaults) | {new: raw[raw_key] for raw_key, new in family.renamed if raw_key in raw} | raw
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if raw.get("use_sliding_window"):
            raise UserError("llm_config.use_sliding_window: true is not supported; expected false, as in every release")
        same = ("max_position_embeddings", "rms_norm_eps", "hidden_act", "mlp_bias", "attention_dropout")
        values = {key: raw[key] for key in (*sizes, *same, "initializer_range", "pad_token_id") if key in raw}
        experts = ExpertsConfig.from_llm(raw) if family.mlp == "experts" and sparse_layers(raw) else None
        heads, biased = raw["num_attention_heads"], bool(raw.get("attention_bias", False))
        return cls(
            **values,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rope=Rope.from_llm(raw),
            qkv_bias={"config": biased, "qkv": True, "none": False}[family.bias],
            output_bias=biased and family.bias == "config",
            qk_norm=family.qk_norm,
            fused=family.fused,
            mlp="gated" if family.mlp == "experts" and experts is None else family.mlp,
            experts=experts,
            sliding_window=raw.get("sliding_window") if family.windowed else None,
            residual_dropout=raw.get("resid_pdrop", 0.0),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
            attention=attention,
        )


class Attention(nn.Module):
    """Causal self-attention whose heads of keys and values each serve a group of query heads."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.kernel, self.head_dim = layer, config.attention, config.head_dim
        self.window, self.dropout = config.sliding_window, config.attention_dropout
        self.join: Join = joined
        """Function that makes one sequence of rows computed one by one (`ivl.model.efficient.recompute`)"""
        self.queries_per_key = config.num_attention_heads // config.num_key_value_heads
        q_width, kv_width = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        width, bias = config.hidden_size, config.qkv_bias
        self.fused = config.fused
        if config.fused:
            self.qkv_proj = nn.Linear(width, q_width + 2 * kv_width, bias=bias)
        else:
            self.q_proj = nn.Linear(width, q_width, bias=bias)
            self.k_proj = nn.Linear(width, kv_width, bias=bias)
            self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.o_proj = nn.Linear(q_width, width, bias=config.output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout, cache: KVCache | None = None
    ) -> Tensor:
        if self.fused:
            qkv = self.qkv_proj(x_BTD)
            part = qkv.shape[-1] // (self.queries_per_key + 2)
            q, k, v = qkv.split([qkv.shape[-1] - 2 * part, part, part], dim=-1)
        else:
            q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        q_BTHK, k_BTGK, v_BTGK = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        q_BHTK, k_BGSK, v_BGSK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        q_BHTK, k_BGSK = rotate(q_BHTK, *rotary), rotate(k_BGSK, *rotary)
        if cache is not None:
            k_BGSK, v_BGSK = cache.update(self.layer, k_BGSK, v_BGSK)
        settings = self.kernel, self.dropout if self.training else 0.0, self.window, self.join
        return self.o_proj(attend(q_BHTK, k_BGSK, v_BGSK, layout, *settings).flatten(2))


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)), SwiGLU where act is silu (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.act, self.fused = Gated(ACTIVATIONS[config.hidden_act]()), config.fused
        if config.fused:
            self.gate_up_proj = nn.Linear(width, 2 * inner, bias=bias)
        else:
            self.gate_proj = nn.Linear(width, inner, bias=bias)
            self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x_BTD).chunk(2, -1) if self.fused else (self.gate_proj(x_BTD), self.up_proj(x_BTD))
        return self.down_proj(self.act(gate, up))


def _experts(config: DecoderConfig) -> ExpertMLP:
    assert config.experts is not None, "the family of a mixture of experts has their shapes"
    return ExpertMLP(config.hidden_size, config.experts, ACTIVATIONS[config.hidden_act])


MLPS: dict[str, Callable[[DecoderConfig], nn.Module]] = {"gated": GatedMLP, "experts": _experts}
"""Makers of MLPs, (B, T, D) → (B, T, D), by the name that an entry of `ivl.architecture.families.LLMS` gives"""


def mlp_of(config: DecoderConfig, layer: int) -> str:
    """Key of `MLPS` for a layer: in a mixture of experts some may have none."""
    return "gated" if config.experts is not None and layer not in config.experts.layers else config.mlp


class DecoderLayer(nn.Module):
    """A transformer block with its norms in front."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLPS[mlp_of(config, layer)](config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        layout: Layout,
        cache: KVCache | None = None,
        outputs_M: Tensor | None = None,
        counted_BT: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`outputs_M`: positions in the one sequence; only theirs are computed behind attention, (1, M, D).

        `counted_BT`: the tokens to count at a mixture of experts, whose `router_load` is returned as well.
        """
        x_BTD = x_BTD + self.dropout(self.self_attn(self.input_layernorm(x_BTD), rotary, layout, cache))
        if counted_BT is not None and isinstance(self.mlp, ExpertMLP):
            y_BTD, load_2E = self.mlp.with_load(self.post_attention_layernorm(x_BTD), counted_BT, outputs_M)
            x_BTD = x_BTD if outputs_M is None else x_BTD.index_select(1, outputs_M)
            return x_BTD + self.dropout(y_BTD), load_2E
        if outputs_M is not None:
            x_BTD = x_BTD.index_select(1, outputs_M)
        return x_BTD + self.dropout(self.mlp(self.post_attention_layernorm(x_BTD)))


class Decoder(nn.Module):
    """The layers between the embeddings and the output layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope, config.head_dim)
        self.checkpointing = False
        """Activation checkpointing: save only the input of each layer in training, recompute the rest in backward"""
        self.around_layer: Callable[[], AbstractContextManager[None]] = nullcontext
        """Context of each layer's forward in training (`ivl.model.efficient.recompute`)"""
        self.last_layer_selects = False
        """True: the last layer computes `outputs_M` alone (`ivl.model.efficient.last_block`)"""

    def forward(
        self,
        embeds_BTD: Tensor,
        positions_BT: Tensor,
        layout: Layout = None,
        cache: KVCache | None = None,
        outputs_M: Tensor | None = None,
        loads: RouterLoads | None = None,
    ) -> Tensor:
        """The last hidden states: (B, T, D), or (1, M, D) of the positions `outputs_M` of the one sequence.

        `layout`: rows that follow one another in the one sequence, or a mask of the keys that each token sees, or None:
        each row sees itself up to the token. With a `cache`, a mask over its S keys. `loads`: filled layer by layer.
        """
        x_BTD, rotary = embeds_BTD, self.rotary_emb(embeds_BTD, positions_BT)
        counted_BT = None if loads is None else loads.mask(embeds_BTD)
        training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        for n, layer in enumerate(self.layers):
            only = outputs_M if self.last_layer_selects and n == len(self.layers) - 1 else None
            inputs = (x_BTD, rotary, layout, cache, only, counted_BT)
            if self.checkpointing and torch.is_grad_enabled():
                result = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                with self.around_layer() if training else nullcontext():
                    result = layer(*inputs)
            if isinstance(result, tuple):
                assert loads is not None, "a layer counts for it alone"
                result = loads.take(*result)
            x_BTD = result
        if outputs_M is not None and not self.last_layer_selects:
            x_BTD = x_BTD.index_select(1, outputs_M)
        return self.norm(x_BTD)


class LanguageModel(nn.Module):
    """A decoder and its output layer, on torch's default device (the meta device too), with random weights."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._initialise)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def packed(
        self,
        embeds_BTD: Tensor,
        layout: SequenceLayout,
        outputs_M: Tensor | None = None,
        loads: RouterLoads | None = None,
    ) -> Tensor:
        """The last hidden states of a batch, rows computed as one sequence without padding: (B, T, D), 0 at padding.

        `outputs_M`: flattened positions of tokens; only theirs are returned, (M, D).
        """
        shape, indices_R = embeds_BTD.shape[:2], layout.indices
        if outputs_M is None and indices_R is None and layout.lengths == (shape[1],) * shape[0]:
            # rows alike are one batch for the kernel
            return self.model(embeds_BTD, layout.positions.view(shape), loads=loads)
        flat_RD = embeds_BTD.flatten(0, 1)
        if indices_R is not None:
            flat_RD = flat_RD.index_select(0, indices_R)
            outputs_M = None if outputs_M is None else torch.searchsorted(indices_R, outputs_M)
        hidden_RD = self.model(flat_RD[None], layout.positions, layout, outputs_M=outputs_M, loads=loads)[0]
        if outputs_M is not None:
            return hidden_RD
        if indices_R is not None:
            empty = hidden_RD.new_zeros(shape.numel(), hidden_RD.shape[-1])
            hidden_RD = empty.index_copy(0, indices_R, hidden_RD)
        return hidden_RD.unflatten(0, shape)

    def padded(
        self,
        embeds_BTD: Tensor,
        mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        rows_BT: Tensor | None = None,
        outputs_M: Tensor | None = None,
        loads: RouterLoads | None = None,
    ) -> Tensor:
        """As `packed`, in any layout, by a square mask: for the eager kernel, and for padding inside rows.

        `rows_BT`: numbers of rows in packs.
        """
        if positions_BT is None:
            positions_BT = torch.arange(embeds_BTD.shape[1], device=embeds_BTD.device).expand(len(embeds_BTD), -1)
        keys_BT = positions_BT if mask_BT is None else positions_BT.masked_fill(~mask_BT, -1)
        seen_B1TT = visible(positions_BT, keys_BT, rows_BT, self.config.sliding_window)
        if loads is not None:
            loads.shown_BT = mask_BT if rows_BT is None else rows_BT >= 0
        hidden_BTD = self.model(embeds_BTD, positions_BT, seen_B1TT, loads=loads)
        return hidden_BTD if outputs_M is None else hidden_BTD.flatten(0, 1).index_select(0, outputs_M)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, Router, GroupedLinear)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
