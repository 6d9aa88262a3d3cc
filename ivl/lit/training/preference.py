"""Preference tuning in a run: reference pass, loss and measures of a batch of pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from ivl.finetune.objectives import MEASURES, PairLogProbs, Preference, PreferenceObjective
from ivl.finetune.reference import Reference
from ivl.finetune.tune import PARTS, LoRA
from ivl.lit.types import RunModule
from ivl.model.loss import Output
from ivl.types import Batch, UserError


class PairLoss(NamedTuple):
    """Loss of a batch of pairs."""

    loss_sum: Tensor
    """Sum over its pairs"""
    pairs: Tensor
    """Number of its pairs"""
    measures: Tensor
    """Sums over its pairs of `ivl.finetune.objectives.MEASURES`, and their number, (6,)"""


class PreferenceTuning:
    """Loss of pairs by a preference objective, and the reference that it compares with."""

    def __init__(self, options: Preference) -> None:
        self.objective = PreferenceObjective(options)
        self._reference: Reference | None = None
        self._shares_features = False

    def set_up(self, lit: RunModule) -> None:
        """Take the model, as training begins, for the reference. Raises UserError where it cannot be had again."""
        if lit.label_smoothing or lit.loss_reduction != "token":
            option = "label_smoothing" if lit.label_smoothing else "loss_reduction"
            raise UserError(f"model.{option}: is of objective sft; model.objective dpo or mpo weighs pairs alike")
        model = lit.model
        starts = {mode.init for part in PARTS if isinstance(mode := lit.tune.mode(part), LoRA)}
        is_fresh = lit.adapter is None and "pissa" not in starts
        if not is_fresh and model.always_run_vision:
            raise UserError(
                "model.objective: under a strategy that splits the model the reference is the base model; expected a "
                "new LoRA (no model.adapter, no pissa), or trainer.strategy ddp"
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
        assert self._reference is not None, "set up with the model"
        if self._shares_features and batch.features is None and len(batch.tiles):
            with torch.no_grad():
                batch = replace(batch, features=lit.model.tile_features(batch.tiles), tiles=batch.tiles[:0])
        return batch, self._reference.row_losses(lit.model, batch)

    def loss(self, trainer: Trainer, out: Output, reference: Tensor | None) -> PairLoss:
        """Loss of a batch, from the model's forward. All processes call it together."""

        def total(values: Tensor) -> Tensor:
            if trainer.world_size > 1:
                torch.distributed.all_reduce(values)
            return values

        pairs = _pairs(out, reference)
        losses = self.objective.losses(pairs, total)
        count = torch.full((), float(len(losses)), device=losses.device)
        return PairLoss(losses.sum(), count, self.objective.measures(pairs))

    def held_out(self, out: Output, reference: Tensor | None) -> Tensor:
        """Measures of held-out pairs, as in PairLoss; those of padding are left out."""
        pairs = _pairs(out, reference)
        used = pairs.chosen_tokens > 0
        return self.objective.measures(PairLogProbs(*(values[used] for values in pairs)))

    def state_dict(self) -> dict[str, Any]:
        return self.objective.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state)


def _pairs(out: Output, reference: Tensor | None) -> PairLogProbs:
    assert out.row_losses is not None and out.row_tokens is not None and reference is not None, "there are labels"
    return PairLogProbs.of(out.row_losses, reference, out.row_tokens)


def means(sums: Tensor, ranks: int = 1) -> dict[str, float]:
    """Means of MEASURES from their sums, over all processes (each must call it)."""
    sums = sums.clone()
    if ranks > 1:
        torch.distributed.all_reduce(sums)
    *values, count = sums.tolist()
    return {name: value / count for name, value in zip(MEASURES, values)} if count else {}
