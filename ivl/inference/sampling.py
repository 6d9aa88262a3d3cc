"""Sampling of the next token: penalties, temperature, top-k, top-p; a seed for each row.

Everything is a function of tensors on the device of the logits: nothing is read back, so a decoding step can be
compiled whole or captured as a CUDA graph. Random numbers come from a hash of (seed, step). They are the same on every
device, whoever a row's neighbours are, and need no state.

Shapes: R rows, V vocabulary, E end tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ivl.types import UserError

FinishReason = Literal["stop", "length", "context"]
"""Why an answer ended: an end token or stop text, its limit of new tokens, or the end of the model's context"""


class Answer(list[int]):
    """Token ids of an answer, with the token that ended it, and why it ended. Equal to a list of the same ids."""

    finish_reason: FinishReason = "length"
    logprobs: list[float] | None = None
    """Log-probability of each token under the model, before temperature and the like; None: not asked for"""


@dataclass(frozen=True)
class StoppingCriteria:
    """Conditions that end an answer."""

    eos_ids: Sequence[int] = ()
    """Token ids that end it."""
    stop: Sequence[Sequence[int]] = ()
    """Sequences of token ids that end it."""
    stopped: Callable[[list[int]], bool] | None = None
    """Function of the answer's token ids, for conditions on its text."""
    min_new_tokens: int = 0
    """Least length: nothing ends an answer before it, and end tokens are not chosen."""

    def __post_init__(self) -> None:
        if self.min_new_tokens < 0:
            raise UserError(f"min_new_tokens: expected at least 0, found {self.min_new_tokens}")

    def reason(self, answer: list[int], room: int, max_new_tokens: int) -> FinishReason | None:
        """Return why the answer ends with its last token; None: it goes on. `room`: the most tokens it can have."""
        if answer and self.is_met(answer):
            return "stop"
        if len(answer) < room:
            return None
        return "length" if len(answer) >= max_new_tokens else "context"

    def is_met(self, answer: list[int]) -> bool:
        """Return True if the last token of `answer` ends it."""
        if answer[-1] in self.eos_ids:
            return True
        if len(answer) <= self.min_new_tokens:
            return False
        if any(answer[-len(ids) :] == list(ids) for ids in self.stop):
            return True
        return self.stopped is not None and self.stopped(answer)


def uniform(seeds_R: Tensor, steps_R: Tensor) -> Tensor:
    """Return one number in [0, 1) for each pair of seed and step: (R,) float32, the same on every device.

    A 32-bit integer hash (T. Mueller's constant) of the seed's two halves and the step, in int64 that never overflows.
    """

    def mix(x_R: Tensor) -> Tensor:
        for _ in range(2):
            x_R = ((x_R ^ (x_R >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return x_R ^ (x_R >> 16)

    hash_R = mix((seeds_R & 0xFFFFFFFF) ^ 0x9E3779B9)
    hash_R = mix(hash_R ^ ((seeds_R >> 32) & 0xFFFFFFFF))
    hash_R = mix(hash_R ^ ((steps_R + 0x7F4A7C15) & 0xFFFFFFFF))
    return (hash_R >> 8).float() / (1 << 24)


def penalise_repetition(logits_RV: Tensor, seen_RV: Tensor, penalty_R: Tensor) -> Tensor:
    """Return logits with the tokens of `seen_RV` (bool) made less likely, as transformers' processor does."""
    penalty_R1 = penalty_R[:, None]
    return torch.where(seen_RV, torch.where(logits_RV < 0, logits_RV * penalty_R1, logits_RV / penalty_R1), logits_RV)


def forbid(logits_RV: Tensor, rows_R: Tensor, ids_E: Tensor) -> Tensor:
    """Return logits with the tokens `ids_E` impossible in the rows where `rows_R` (bool) is True."""
    forbidden_V = torch.zeros(logits_RV.shape[1], dtype=torch.bool, device=logits_RV.device)
    forbidden_V = forbidden_V.index_fill(0, ids_E, True)
    return logits_RV.masked_fill(rows_R[:, None] & forbidden_V, -torch.inf)


def sample(logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, uniform_R: Tensor) -> Tensor:
    """Return one token id for each row, (R,) int64; the most likely one where its temperature is 0.

    The token is found by inversion: `uniform_R` picks a place in the cumulative probabilities, likeliest tokens first.
    """
    greedy_R = logits_RV.argmax(-1)
    heat_R1 = torch.where(temperature_R > 0, temperature_R, 1.0)[:, None]
    sorted_RV, ids_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    sorted_RV = (sorted_RV - sorted_RV[:, :1]) / heat_R1  # the largest is 0: no temperature makes it infinite
    rank_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    sorted_RV = sorted_RV.masked_fill((top_k_R[:, None] > 0) & (rank_V >= top_k_R[:, None]), -torch.inf)
    p_RV = sorted_RV.softmax(-1)
    p_RV = p_RV.masked_fill(p_RV.cumsum(-1) - p_RV >= top_p_R[:, None], 0.0)
    mass_RV = p_RV.cumsum(-1)
    rank_R1 = (mass_RV <= uniform_R[:, None] * mass_RV[:, -1:]).sum(-1, keepdim=True)
    sampled_R = ids_RV.gather(1, rank_R1.clamp(max=logits_RV.shape[1] - 1))[:, 0]
    return torch.where(temperature_R > 0, sampled_R, greedy_R)


class NotFinite(UserError):
    """Logits of a row are NaN or infinite. `row`: index in the batch."""

    def __init__(self, row: int, dtype: torch.dtype) -> None:
        super().__init__(not_finite(dtype))
        self.row = row


def not_finite(dtype: torch.dtype) -> str:
    """Return the message about logits that are not finite, with the remedy."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        return (
            "the model's logits are not finite in float16, whose largest number is 65504; compute in bfloat16 or "
            "float32 (chat: --dtype bfloat16; predict, validate and fit: --trainer.precision bf16-true or 32-true)"
        )
    return (
        f"the model's logits are not finite in {name}: its weights hold NaN or are far too large, as after a training "
        "that diverged; use an earlier checkpoint, or read the weights again from their source"
    )
