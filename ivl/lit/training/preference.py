"""Preference tuning in a run: reference pass, loss and measures of a batch of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from ivl.finetune.objectives import MEASURES, PairLogProbs, PairOfAnswers, Preference, PreferenceObjective
from ivl.finetune.reference import Reference, is_fresh_lora, reference_way, trained_beside_lora
from ivl.lit.training.reference_cache import store_references
from ivl.lit.types import RunModule
from ivl.model.loss import Output
from ivl.types import Batch, Conversation, UserError


class PairLoss(NamedTuple):
    """Loss of a batch of pairs."""

    loss_sum: Tensor
    """Sum over its pairs, each times the weight of its row"""
    pairs: Tensor
    """Number of its pairs, each counted by its weight"""
    measures: Tensor
    """Sums over its pairs of `ivl.finetune.objectives.MEASURES`, and their number, (6,)"""


class PreferenceTuning:
    """Loss of pairs by a preference objective, and the reference that it compares with."""

    def __init__(self, options: Preference) -> None:
        self.options, self.objective = options, PreferenceObjective(options)
        self._reference: Reference | None = None
        self._shares_features = False

    def set_up(self, lit: RunModule) -> None:
        """Take the model, as training begins, for the reference. All processes call it together.

        Raises UserError where it cannot be had again.
        """
        if lit.label_smoothing or lit.loss_reduction != "token":
            option = "label_smoothing" if lit.label_smoothing else "loss_reduction"
            raise UserError(f"model.{option}: is of objective sft; model.objective dpo or mpo weighs pairs alike")
        model = lit.model
        is_fresh, splits = is_fresh_lora(lit.tune, lit.adapter), model.always_run_vision
        beside_lora = trained_beside_lora(model) is not None
        if reference_way(self.options.reference, beside_lora, splits, is_fresh) == "stored":
            store_references(lit, is_fresh)
            return
        if splits and not is_fresh:
            raise UserError(
                "model.objective.reference: live, under a strategy that splits the model, is the base model; expected "
                "stored (or auto), a new LoRA (no model.adapter, no pissa), or trainer.strategy ddp"
            )
        self._reference = Reference(model, is_fresh)
        frozen = [not any(p.requires_grad for p in part.parameters()) for part in (model.vision_model, model.mlp1)]
        model.features_projected = frozen[1]
        self._shares_features = all(frozen) and not model.always_run_vision

    def reference(self, lit: RunModule, batch: Batch) -> tuple[Batch, Tensor]:
        """Return the batch, with features of its tiles where they are the same in both passes, and the reference's
        losses of its rows."""
        if not batch.paired:
            raise UserError("model.objective: expected batches of pairs; make them by a processor with pairs = True")
        if batch.reference is not None:
            return batch, batch.reference
        if self._reference is None:
            raise UserError(
                "model.objective: where more than a LoRA trains, batches of a loader of your own need `reference`, the "
                "losses of their rows by the untouched model (`model(**batch).row_losses`); IvlData brings them"
            )
        if self._shares_features and batch.features is None and len(batch.tiles):
            with torch.no_grad():
                batch = replace(batch, features=lit.model.tile_features(batch.tiles), tiles=batch.tiles[:0])
        return batch, self._reference.row_losses(lit.model, batch)

    def loss(
        self, trainer: Trainer, out: Output, reference: Tensor | None, row_weights: Tensor | None = None
    ) -> PairLoss:
        """Loss of a batch, from the model's forward. All processes call it together."""

        def total(values: Tensor) -> Tensor:
            if trainer.world_size > 1:
                torch.distributed.all_reduce(values)
            return values

        pairs = _pairs(out, reference)
        losses = self.objective.losses(pairs, total)
        weights = torch.ones_like(losses) if row_weights is None else row_weights[::2].to(losses)
        return PairLoss((losses * weights).sum(), weights.sum(), self.objective.measures(pairs))

    def held_out(self, out: Output, reference: Tensor | None) -> Tensor:
        """Sums over held-out pairs of `ivl.finetune.objectives.HELD_OUT`, and their number; padding is left out."""
        pairs = _pairs(out, reference)
        used = pairs.chosen_tokens > 0
        pairs = PairLogProbs(*(values[used] for values in pairs))
        with torch.no_grad():
            loss = self.objective.losses(pairs).sum()
        return torch.cat([loss[None], self.objective.measures(pairs)])

    def answered(self, rows: Sequence[Conversation], out: Output, reference: Tensor | None) -> list[PairOfAnswers]:
        """Both answers of each held-out pair, for people."""
        before, now = (losses.view(-1, 2).tolist() for losses in (-_given(reference), -_given(out.row_losses)))
        beta = self.objective.beta
        return [PairOfAnswers(*numbers, beta) for numbers in zip(rows[::2], rows[1::2], before, now)]

    def state_dict(self) -> dict[str, Any]:
        return self.objective.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state)


def _given(losses: Tensor | None) -> Tensor:
    assert losses is not None, "there are labels"
    return losses


def _pairs(out: Output, reference: Tensor | None) -> PairLogProbs:
    return PairLogProbs.of(_given(out.row_losses), _given(reference), _given(out.row_tokens))


def means(sums: Tensor, ranks: int = 1, names: Sequence[str] = MEASURES) -> dict[str, float]:
    """Means of values of these names from their sums and number, over all processes (each must call it)."""
    sums = sums.clone()
    if ranks > 1:
        torch.distributed.all_reduce(sums)
    *values, count = sums.tolist()
    return {name: value / count for name, value in zip(names, values)} if count else {}
