"""Beam search, by transformers' own `generate` on the embeddings of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

if TYPE_CHECKING:
    from ivl.model.generate import Ends
    from ivl.model.llm import LanguageModel


class _Over(StoppingCriteria):
    """`Ends` as transformers asks for it."""

    def __init__(self, ends: Ends) -> None:
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.tensor([self.ends.over(row) for row in input_ids.tolist()], device=input_ids.device)


class _Finite(LogitsProcessor):
    """Notes scores that are not finite, on their device: the search goes on, and its end is asked once."""

    def __init__(self) -> None:
        self.bad: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = ~scores.max().isfinite()
        self.bad = bad if self.bad is None else self.bad | bad
        return scores


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

    Likelihood is per token, as in transformers with `length_penalty` 1. `repetition_penalty` is over the answer alone.
    """
    eos_ids = sorted(set(ends.eos_ids))
    settings = GenerationConfig(
        num_beams=num_beams,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=ends.min_new_tokens or None,
        eos_token_id=eos_ids or None,
        pad_token_id=eos_ids[0] if eos_ids else 0,
        repetition_penalty=repetition_penalty,
    )
    finite = _Finite()
    ids = language_model.generate(
        inputs_embeds=embeds_1TD,
        attention_mask=torch.ones(embeds_1TD.shape[:2], dtype=torch.long, device=embeds_1TD.device),
        generation_config=settings,
        logits_processor=LogitsProcessorList([finite]),
        stopping_criteria=StoppingCriteriaList([_Over(ends)]) if ends.stop or ends.stopped else None,
    )[0].tolist()
    if finite.bad is not None and bool(finite.bad):
        return [-1]
    # What follows the end of the best beam is padding.
    return ids[: next((n for n in range(1, len(ids)) if ends.over(ids[:n])), len(ids))]
