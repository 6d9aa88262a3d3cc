"""Objectives of training: supervised answers (sft), or preferences between two answers (DPO, MPO).

A preference objective sees log-probabilities alone: of the chosen and the rejected answer of each pair, each summed
over the answer's tokens, by the model and by the reference (the model as training began). With the rewards

    r = beta (log p - log p_ref)        of an answer

the loss of a pair is, averaged over the pairs of an optimizer step:

    dpo sigmoid   -log s(r_chosen - r_rejected)             Rafailov et al. 2023, https://arxiv.org/abs/2305.18290
    dpo hinge     max(0, 1 - (r_chosen - r_rejected))       https://arxiv.org/abs/2305.10425
    dpo ipo       (mean log-ratio of the chosen answer's tokens - of the rejected's - 1 / 2 beta)²
                                                            https://arxiv.org/abs/2310.12036
    bco           -log s(r_chosen - d) - log s(d - r_rejected), d the mean of all rewards so far
                                                            https://arxiv.org/abs/2404.04656
    sft           negative log-likelihood of the chosen answer, averaged over its tokens
    mpo           0.8 dpo sigmoid + 0.2 bco + 1.0 sft       Wang et al. 2024, https://arxiv.org/abs/2411.10442
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ivl.types import Conversation, UserError

Reduce = Callable[[Tensor], Tensor]
"""Sum of a tensor over all processes"""


@dataclass(frozen=True)
class DPO:
    """Direct preference optimization."""

    beta: float = 0.1
    """Scale of the rewards: the larger, the closer the model stays to the reference."""
    label_smoothing: float = 0.0
    """Share of the pairs taken to be the wrong way round (conservative DPO); of the sigmoid loss alone."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """Form of the loss."""


@dataclass(frozen=True)
class MPO:
    """Mixed preference optimization, as the InternVL releases since 2-MPO were trained: three losses at once."""

    beta: float = 0.1
    """Scale of the rewards."""
    dpo: float = 0.8
    """Weight of the preference loss: which of the two answers is better."""
    bco: float = 0.2
    """Weight of the quality loss: whether an answer is good by itself."""
    sft: float = 1.0
    """Weight of the generation loss: how the chosen answer is written."""
    shift: Literal["running", "none"] = "running"
    """Point that the quality loss tells good answers from bad ones by: the mean of all rewards so far, or 0."""


@dataclass(frozen=True)
class Preference:
    """Preference tuning on pairs of answers; one of the two."""

    dpo: DPO | None = None
    """Direct preference optimization."""
    mpo: MPO | None = None
    """Mixed preference optimization."""
    reference: Literal["auto", "live", "stored"] = "auto"
    """Log-probabilities by the model as training began. live: by a pass without the LoRA at each step; stored: computed
    once before training, and kept on disk for later runs; auto: live where a LoRA alone trains, else stored."""


def check(options: Preference) -> None:
    """Raise UserError for options that mean nothing."""
    dpo, mpo = options.dpo, options.mpo
    if (dpo is None) == (mpo is None):
        raise UserError("model.objective: expected sft, dpo or mpo, found both dpo and mpo or neither")
    for name, part in (("dpo", dpo), ("mpo", mpo)):
        if part is not None and not part.beta > 0:
            raise UserError(f"model.objective.{name}.beta: expected above 0, found {part.beta}")
    if dpo is not None and not 0 <= dpo.label_smoothing < 0.5:
        raise UserError(f"model.objective.dpo.label_smoothing: expected 0 to 0.5, found {dpo.label_smoothing}")
    if dpo is not None and dpo.label_smoothing and dpo.loss != "sigmoid":
        raise UserError(f"model.objective.dpo.label_smoothing: is of the sigmoid loss, found loss {dpo.loss}")
    if mpo is not None and (min(mpo.dpo, mpo.bco, mpo.sft) < 0 or not (mpo.dpo or mpo.bco or mpo.sft)):
        raise UserError("model.objective.mpo: expected weights of at least 0, and one of them above")


class PairLogProbs(NamedTuple):
    """Log-probabilities of the answers of pairs, each (P,), summed over the tokens of an answer."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    """Number of tokens of each chosen answer"""
    rejected_tokens: Tensor

    @classmethod
    def of(cls, row_losses: Tensor, reference: Tensor, row_tokens: Tensor) -> PairLogProbs:
        """From the negative log-likelihoods and tokens of rows 2i (chosen) and 2i + 1 (rejected), each (2 P,)."""
        policy, base = (-losses.view(-1, 2) for losses in (row_losses, reference))
        tokens = row_tokens.view(-1, 2)
        return cls(policy[:, 0], policy[:, 1], base[:, 0], base[:, 1], tokens[:, 0], tokens[:, 1])

    def rewards(self, beta: float) -> tuple[Tensor, Tensor]:
        """Rewards of the chosen and the rejected answers, each (P,)."""
        return beta * (self.chosen - self.reference_chosen), beta * (self.rejected - self.reference_rejected)


class PairOfAnswers(NamedTuple):
    """Held-out pair with the log-probabilities of its answers."""

    row: Conversation
    rejected: Conversation
    before: list[float]
    """Of the chosen and the rejected answer, by the reference"""
    now: list[float]
    beta: float

    @property
    def rewards(self) -> tuple[float, float]:
        """Rewards of the chosen and the rejected answer."""
        chosen, rejected = (self.beta * (now - before) for now, before in zip(self.now, self.before))
        return chosen, rejected


MEASURES = ("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy", "kl")
"""Names of what a preference run logs beside its loss. `kl`: estimate of the divergence from the reference, by the mean
log-ratio of a token of the answers"""


HELD_OUT = ("objective", *MEASURES)
"""Names of what is logged of held-out pairs. `objective`: the loss that is trained, by the mean of rewards so far"""


class PreferenceObjective:
    """Loss of pairs, with the state that it carries from batch to batch."""

    def __init__(self, options: Preference) -> None:
        """Raises UserError for options that mean nothing."""
        check(options)
        self.options = options
        self.beta = options.dpo.beta if options.dpo else options.mpo.beta if options.mpo else 0.0
        self._rewards: Tensor | None = None
        """(2,) float64: sum and number of all rewards so far, of all processes"""

    def losses(self, pairs: PairLogProbs, reduce: Reduce = lambda values: values) -> Tensor:
        """Loss of each pair: (P,). All processes call it together where `reduce` sums over them."""
        if self.options.dpo is not None:
            return self._dpo(pairs, self.options.dpo)
        assert self.options.mpo is not None, "one of the two is set"
        return self._mpo(pairs, self.options.mpo, reduce)

    def _dpo(self, pairs: PairLogProbs, options: DPO) -> Tensor:
        chosen, rejected = pairs.rewards(self.beta)
        margin = chosen - rejected
        if options.loss == "hinge":
            return torch.relu(1 - margin)
        if options.loss == "ipo":
            means = chosen / pairs.chosen_tokens.clamp(min=1) - rejected / pairs.rejected_tokens.clamp(min=1)
            return (means / self.beta - 1 / (2 * self.beta)) ** 2
        smoothing = options.label_smoothing
        return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)

    def _mpo(self, pairs: PairLogProbs, options: MPO, reduce: Reduce) -> Tensor:
        chosen, rejected = pairs.rewards(self.beta)
        shift = self._shift(chosen, rejected, reduce) if options.bco and options.shift == "running" else 0.0
        preference = -F.logsigmoid(chosen - rejected)
        quality = -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)
        generation = -pairs.chosen / pairs.chosen_tokens.clamp(min=1)
        return options.dpo * preference + options.bco * quality + options.sft * generation

    def _shift(self, chosen: Tensor, rejected: Tensor, reduce: Reduce) -> Tensor:
        """Mean of all rewards so far, these included. In validation nothing is added."""
        rewards = torch.cat([chosen, rejected]).detach().double()
        if self._rewards is None:
            self._rewards = torch.zeros(2, dtype=torch.float64)
        self._rewards = self._rewards.to(rewards.device)
        if torch.is_grad_enabled():
            finite = torch.isfinite(rewards)  # a step that is skipped leaves no trace here either
            self._rewards = self._rewards + reduce(torch.stack([rewards[finite].sum(), finite.sum().double()]))
        return (self._rewards[0] / self._rewards[1].clamp(min=1)).float()

    def measures(self, pairs: PairLogProbs) -> Tensor:
        """Sums over pairs of MEASURES, and the number of pairs: (6,), without gradient."""
        with torch.no_grad():
            chosen, rejected = pairs.rewards(self.beta)
            tokens = (pairs.chosen_tokens + pairs.rejected_tokens).clamp(min=1)
            divergence = -(chosen + rejected) / self.beta / tokens
            values = (chosen, rejected, chosen - rejected, (chosen > rejected).float(), divergence)
            return torch.stack([*(value.sum() for value in values), chosen.new_tensor(float(len(chosen)))])

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {} if self._rewards is None else {"rewards": self._rewards.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rewards = state.get("rewards")
