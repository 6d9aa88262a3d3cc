"""Beam search: the answer of the highest log-likelihood per token among several beams.

The rules are those of transformers' beam search with `length_penalty` 1 and `early_stopping` False, so that the answers
are its answers: candidates are the likeliest continuations of all beams; those among the best `num_beams` that end an
answer are kept with their likelihood per token; the search stops when no running beam can become better than the worst
of the answers kept.

Shapes: N beams, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ivl.inference.sampling import StoppingCriteria, forbid, penalise_repetition

IMPOSSIBLE = -1e9


@dataclass(order=True)
class Hypothesis:
    """A finished answer and its mean log-probability."""

    score: float
    answer: list[int] = field(compare=False)


def beam_search(
    first_logits_1V: Tensor,
    next_logits: Callable[[Tensor, Tensor], Tensor],
    num_beams: int,
    max_new_tokens: int,
    criteria: StoppingCriteria,
    repetition_penalty: float = 1.0,
) -> list[int]:
    """Return the best answer's token ids, with the token that ended it.

    `first_logits_1V`: logits after the prompt. `next_logits(beams_N, ids_N)`: logits (N, V) after beam i has become
    beam `beams_N[i]` continued by token `ids_N[i]`. `repetition_penalty` is over the answer alone.
    Raises FloatingPointError where logits are not finite.
    """
    eos_ids = sorted(set(criteria.eos_ids))
    candidates = max(2, 1 + len(eos_ids)) * num_beams
    beams: list[list[int]] = [[] for _ in range(num_beams)]
    scores_N = first_logits_1V.new_tensor([0.0] + [IMPOSSIBLE] * (num_beams - 1), dtype=torch.float32)
    finished: list[Hypothesis] = []
    logits_NV = first_logits_1V.expand(num_beams, -1)
    for length in range(1, max_new_tokens + 1):
        log_probs_NV = _processed(logits_NV, beams, eos_ids, criteria.min_new_tokens, repetition_penalty)
        total_NV = log_probs_NV + scores_N[:, None]
        best_C, places_C = total_NV.flatten().topk(candidates)
        if not math.isfinite(best_C[0]):
            raise FloatingPointError("logits are not finite")
        parents, tokens = (places_C // total_NV.shape[1]).tolist(), (places_C % total_NV.shape[1]).tolist()
        answers = [[*beams[parent], token] for parent, token in zip(parents, tokens)]
        has_ended = [length == max_new_tokens or criteria.is_met(answer) for answer in answers]
        for answer, ended, score in zip(answers[:num_beams], has_ended, best_C.tolist()):
            if ended:
                finished.append(Hypothesis(score / length, answer))
        finished = sorted(finished, reverse=True)[:num_beams]
        if all(has_ended):
            break
        has_ended_C = torch.tensor(has_ended, device=best_C.device)
        best_N = (best_C + has_ended_C * IMPOSSIBLE).topk(num_beams).indices
        scores_N = (best_C + has_ended_C * IMPOSSIBLE)[best_N]
        if len(finished) == num_beams and float(scores_N[0]) / length <= finished[-1].score:
            break
        beams = [answers[n] for n in best_N.tolist()]
        logits_NV = next_logits(places_C[best_N] // total_NV.shape[1], places_C[best_N] % total_NV.shape[1])
    return max(finished).answer


def _processed(
    logits_NV: Tensor, beams: list[list[int]], eos_ids: list[int], min_new_tokens: int, penalty: float
) -> Tensor:
    """Log-probabilities after the repetition penalty, and with end tokens impossible in answers that are too short."""
    log_probs_NV = logits_NV.float().log_softmax(-1)
    device = log_probs_NV.device
    if penalty != 1.0:
        seen_NV = torch.zeros_like(log_probs_NV, dtype=torch.bool)
        for row, answer in enumerate(beams):
            seen_NV[row, torch.tensor(answer, dtype=torch.long, device=device)] = True
        penalty_N = torch.full((len(beams),), penalty, device=device)
        log_probs_NV = penalise_repetition(log_probs_NV, seen_NV, penalty_N)
    short_N = torch.tensor([len(answer) < min_new_tokens for answer in beams], device=device)
    if eos_ids and min_new_tokens:
        log_probs_NV = forbid(log_probs_NV, short_N, torch.tensor(eos_ids, device=device))
    return log_probs_NV
