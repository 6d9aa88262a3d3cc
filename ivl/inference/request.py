"""Requests to the inference engine, and limits of a batch.

Shapes: T tokens of a prompt, N tiles, S pixels a side of a tile.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ivl.inference.sampling import Answer
from ivl.model.decoder import LanguageModel
from ivl.types import UserError


@dataclass(frozen=True)
class Batching:
    """Limits of the rows that are decoded at the same time. Answers are the same for any values."""

    rows: int = 32
    """Most rows that are decoded together."""
    tokens: int = 32768
    """Most tokens in the key-value cache, room for the answers included; one row is always taken."""
    prefill_tokens: int = 8192
    """Most tokens of prompts that are read together; the vision encoder runs once over their tiles."""
    graphs: Literal["auto", "off"] = "auto"
    """auto: the decoding step as CUDA graphs where the model is on one GPU; off: never."""

    def __post_init__(self) -> None:
        for name in ("rows", "tokens", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"batching: {name}: expected at least 1, found {getattr(self, name)}")
        if self.graphs not in ("auto", "off"):
            raise UserError(f"batching: graphs: expected auto or off, found {self.graphs!r}")


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


def check_max_new_tokens(max_new_tokens: int) -> None:
    """Raise UserError for an answer of no tokens."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")


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
