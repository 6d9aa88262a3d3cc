"""The last block of a language model in training: what follows its attention, for the tokens that the loss reads.

No other token's last hidden state is read by anything, and about one token in fifteen is supervised.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from ivl.model.llm import LanguageModel

WANTED = "wanted_places"
"""Argument of a body's forward, which transformers hands on to every block: (M,) places in its one sequence"""


class LastBlock(nn.Module):
    """A block of transformers that gives, asked for, only some tokens: (1, M, D) of (1, T, D)."""

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, wanted_places: Tensor | None = None, **given: Any) -> Tensor:
        if wanted_places is None:
            return super().forward(hidden_states, *args, **given)
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)[0]
        # dropout on both branches is Phi-3's
        hidden_1TD = hidden_states + getattr(self, "resid_attn_dropout", nn.Identity())(attended)
        hidden_1MD = hidden_1TD.index_select(1, wanted_places)
        made = self.mlp(self.post_attention_layernorm(hidden_1MD))
        return hidden_1MD + getattr(self, "resid_mlp_dropout", nn.Identity())(made)


@cache
def _class(of: type[nn.Module]) -> type[nn.Module]:
    return type(of.__name__, (LastBlock, of), {})


def mark(model: LanguageModel) -> None:
    """Let the last block of a causal language model be a `LastBlock`."""
    last = model.model.layers[-1]
    kind: Any = type(last)
    last.__class__ = _class(kind)
