"""Requests to the inference engine.

Shapes: T tokens of a prompt, N tiles, S pixels a side of a tile.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ivl.inference.sampling import Answer
from ivl.model.decoder import LanguageModel
from ivl.options.generation import check_max_new_tokens
from ivl.types import UserError


@dataclass
class Request:
    """A prompt, and its answer as it grows."""

    key: Any
    """Name of the request, for the caller"""
    input_ids: Tensor
    """(T,) int64"""
    tiles: Tensor
    """(N, 3, S, S) uint8"""
    max_new_tokens: int | None = None
    """Most tokens of the answer; None: the engine's"""
    seed: int = 0
    """Seed of this row's sampling"""
    answer: Answer = field(default_factory=Answer)
    """Token ids so far, with the one that ended it, and the reason"""
    error: str = ""
    """Reason why there is no answer"""
    is_finished: bool = False
    room: int = 0
    """Most tokens of its answer, set by `submit`: `max_new_tokens`, or what the model's context has left"""

    def __len__(self) -> int:
        return len(self.input_ids)


def row_seed(seed: int, row: int) -> int:
    """Return the seed of a row, the same however rows are batched and shared out."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {row}".encode(), digest_size=7).digest(), "big")


def answer_room(model: LanguageModel, prompt: int, max_new_tokens: int) -> int:
    """Return the most tokens of an answer to a prompt of that many: `max_new_tokens`, or what the context has left.

    Raises UserError where it has none, and for an answer of no tokens.
    """
    check_max_new_tokens(max_new_tokens)
    limit = model.config.max_position_embeddings
    if prompt >= limit:
        raise UserError(
            f"generate: a prompt of {prompt} tokens and its answer exceed the model's context of {limit}; use fewer "
            "tiles or a shorter prompt"
        )
    return min(max_new_tokens, limit - prompt)
