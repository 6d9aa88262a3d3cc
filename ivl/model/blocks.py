"""The blocks of a language model in training: less is kept for backward, and the last computes what is read.

The result of norms and activations is computed again in backward (`ivl.model.again`). What follows the last block's
attention is computed for the tokens that the loss reads: no other token's last hidden state is read by anything, and
about one token in fifteen is supervised.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ivl.model.again import again, normed, small

if TYPE_CHECKING:
    from ivl.model.llm import LanguageModel

WANTED = "wanted_places"
"""Argument of a body's forward, which transformers hands on to every block: (M,) places in its one sequence"""


class Block(nn.Module):
    """A block of transformers, as it is computed in training; the last, asked to, gives only some tokens: (1, M, D)."""

    is_last = False
    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, wanted_places: Tensor | None = None, **given: Any) -> Tensor:
        training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        wanted_places = wanted_places if self.is_last else None
        if args or (wanted_places is None and not training):
            assert wanted_places is None, "transformers gives blocks what follows their input by name"
            return super().forward(hidden_states, *args, **given)
        recomputed = self.gradient_checkpointing and self.training  # all of it
        keeping: AbstractContextManager[None] = small() if training and not recomputed else nullcontext()
        with keeping:
            read = normed(self.input_layernorm, hidden_states)
            attended = self.self_attn(hidden_states=read, **given)[0]
            # dropout on both branches is Phi-3's
            hidden_states = hidden_states + getattr(self, "resid_attn_dropout", nn.Identity())(attended)
            if wanted_places is not None:
                hidden_states = hidden_states.index_select(1, wanted_places)
            made = self.mlp(normed(self.post_attention_layernorm, hidden_states))
            return hidden_states + getattr(self, "resid_mlp_dropout", nn.Identity())(made)


class GatedMLP(nn.Module):
    """The MLP of a block of transformers: gate and up are two layers, or, in Phi-3, one."""

    act_fn: Callable[[Tensor], Tensor]
    gate_proj: nn.Module
    up_proj: nn.Module
    gate_up_proj: nn.Module
    activation_fn: Callable[[Tensor], Tensor]
    down_proj: nn.Module

    def forward(self, x_BTD: Tensor) -> Tensor:
        if hasattr(self, "gate_up_proj"):
            act, (gate, up) = self.activation_fn, self.gate_up_proj(x_BTD).chunk(2, dim=-1)
        else:
            act, gate, up = self.act_fn, self.gate_proj(x_BTD), self.up_proj(x_BTD)

        def gated(gate: Tensor, up: Tensor) -> Tensor:
            return again(act, gate) * up

        return self.down_proj(again(gated, gate, up))


class RMSNorm(nn.Module):
    """The norm of a block of transformers, in float32 up to the weights whatever these are kept in."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.weight * again(self._unit, x_BTD)

    def _unit(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = again(Tensor.float, x_BTD)
        return (wide_BTD * torch.rsqrt(wide_BTD.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x_BTD.dtype)


@cache
def _class(ours: type[nn.Module], theirs: type[nn.Module]) -> type[nn.Module]:
    return type(theirs.__name__, (ours, theirs), {})


def use(model: LanguageModel) -> None:
    """Let the blocks of a causal language model compute this way."""
    for layer in model.model.layers:
        norms = [(m, RMSNorm) for m in layer.modules() if hasattr(m, "variance_epsilon")]
        for module, ours in ((layer, Block), (layer.mlp, GatedMLP), *norms):
            kind: Any = type(module)
            module.__class__ = _class(ours, kind)
    last: Any = model.model.layers[-1]
    last.is_last = True
