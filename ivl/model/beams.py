"""Beam search: the most likely answers are carried on side by side, and the best that has ended wins.

The rules are those of transformers' `generate` with `length_penalty` 1 and no early stopping, which the tests compare
with: a likelihood is a mean over the answer's tokens; of the best `num_beams` continuations those that end are
finished; the search is over when no open beam is more likely than the least likely of `num_beams` finished answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ivl.model.decoder import LanguageModel
    from ivl.model.generate import Choice, Ends


@torch.no_grad()
def beam_search(
    language_model: LanguageModel,
    embeds_1TD: Tensor,
    num_beams: int,
    max_new_tokens: int,
    ends: Ends,
    repetition_penalty: float = 1.0,
) -> list[int]:
    """The most likely answer that `num_beams` beams find, with the token that ended it; [-1] where logits were not
    finite.

    `repetition_penalty` is over the answer alone.
    """
    from ivl.model.generate import Choice, Memory, read

    memory, penalty = Memory(), Choice(repetition_penalty=repetition_penalty)
    mask = torch.ones(embeds_1TD.shape[:2], dtype=torch.bool, device=embeds_1TD.device)
    log_probs_BV = _log_probs(read(language_model, embeds_1TD, mask, memory), [[]], ends, penalty)
    beams: list[list[int]] = [[]]
    scores_B1 = log_probs_BV.new_zeros(1, 1)
    finished: list[tuple[float, list[int]]] = []
    # So many, as each beam may end in every way.
    candidates = max(2, 1 + len(set(ends.eos_ids))) * num_beams
    for length in range(1, max_new_tokens + 1):
        total = (log_probs_BV + scores_B1).flatten()
        top, places = total.topk(min(candidates, len(total)))
        if not top[0].isfinite():  # NaN is the largest of all
            return [-1]
        vocabulary = log_probs_BV.shape[1]
        open_beams: list[tuple[float, int, list[int]]] = []
        for rank, (score, place) in enumerate(zip(top.tolist(), places.tolist())):
            answer = [*beams[place // vocabulary], place % vocabulary]
            if not ends.over(answer) and length < max_new_tokens:
                open_beams.append((score, place // vocabulary, answer))
            elif rank < num_beams:
                finished.append((score / length, answer))
        finished = sorted(finished, key=lambda found: -found[0])[:num_beams]
        open_beams = open_beams[:num_beams]
        if not open_beams or (len(finished) == num_beams and open_beams[0][0] / length <= finished[-1][0]):
            break
        beams = [answer for *_, answer in open_beams]
        scores_B1 = top.new_tensor([score for score, *_ in open_beams])[:, None]
        memory.select([parent for _, parent, _ in open_beams])
        ids_B1 = torch.tensor([[answer[-1]] for answer in beams], device=embeds_1TD.device)
        embeds_B1D = language_model.get_input_embeddings()(ids_B1)
        logits_BV = read(language_model, embeds_B1D, torch.ones_like(ids_B1, dtype=torch.bool), memory)
        log_probs_BV = _log_probs(logits_BV, beams, ends, penalty)
    return finished[0][1]


def _log_probs(logits_BV: Tensor, answers: list[list[int]], ends: Ends, penalty: Choice) -> Tensor:
    log_probs_BV = logits_BV.float().log_softmax(-1)
    if penalty.repetition_penalty != 1.0:
        log_probs_BV = penalty._penalised(log_probs_BV, answers)
    ends.hold_back(log_probs_BV, answers)
    return log_probs_BV
