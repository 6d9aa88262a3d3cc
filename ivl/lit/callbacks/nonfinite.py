"""Guard against losses and gradients that are not finite: their steps are skipped, and their rows named."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from ivl.lit.training.loss_normalizer import LossNormalizer
from ivl.types import Batch, Conversation, UserError, row_names

log = logging.getLogger(__name__)
"""Logger of every process, since only the process that has a row can name it"""

FLAG = "found_inf"
"""Attribute read by torch's fused optimizers: they skip the step where it is not 0"""


@dataclass
class _Step:
    number: int
    bad: Tensor
    """True if the loss or a gradient was not finite; on the device"""
    skipped: bool
    """True if the optimizer skips such a step"""
    parts: list[tuple[list[Conversation], Tensor]]
    """Rows of each micro-batch, and a flag: its loss was finite"""


@dataclass
class FiniteLoss:
    """Guard that skips optimizer steps with a loss or gradients that are not finite, and logs their rows.

    The run stops after `patience` such steps in a row. The decision comes from sums over all processes, so that all do
    the same. A fused optimizer skips on the device, by the flag that torch's gradient scaler uses too; the flags are
    read `lag` steps later, all at once. For any other optimizer the host decides, and waits for the step's backward.
    """

    patience: int
    lag: int = 1
    """Optimizer steps between two readings of the flags"""
    _open: list[tuple[list[Conversation], Tensor]] = field(default_factory=list)
    _closed: list[_Step] = field(default_factory=list)
    _in_a_row: list[_Step] = field(default_factory=list)

    def add(self, rows: list[Conversation], loss: Tensor) -> None:
        """Add a micro-batch and its loss."""
        self._open.append((rows, torch.isfinite(loss.detach())))

    def close(self, number: int, bad: Tensor, optimizer: Optimizer) -> None:
        """End an optimizer step. `bad`: true if it must be skipped, equal on all processes.

        Raises UserError where too many steps in a row were bad.
        """
        can_skip = isinstance(optimizer, Optimizer)  # DeepSpeed's is no torch optimizer, and never skips
        self._closed.append(_Step(number, bad, can_skip, self._open))
        self._open = []
        if not can_skip:
            self.read()
        elif optimizer.defaults.get("fused"):
            setattr(optimizer, FLAG, bad.float())
            if bad.device.type == "cpu" or len(self._closed) >= self.lag:
                self.read()
        else:
            if bool(bad):
                optimizer.zero_grad(set_to_none=True)  # an optimizer passes over what has no gradient
            self.read()

    @staticmethod
    def release(optimizer: Optimizer) -> None:
        """Remove the flag after the optimizer's step."""
        if hasattr(optimizer, FLAG):
            delattr(optimizer, FLAG)

    def read(self) -> None:
        """Read the flags of the steps that ended since the last reading, in one transfer."""
        steps, self._closed = self._closed, []
        if not steps:
            return
        flags = torch.stack([step.bad for step in steps]).tolist()
        for step, bad in zip(steps, flags):
            if not bad:
                self._in_a_row = []
                continue
            self._in_a_row.append(step)
            is_here, rows = _nonfinite_rows(step)
            if is_here or getattr(rank_zero_only, "rank", 0) == 0:
                effect = "skipped, as its" if step.skipped else "its"
                log.warning("step %d: %s loss or gradients are not finite; rows: %s", step.number, effect, rows)
            if len(self._in_a_row) >= self.patience:
                raise UserError(
                    f"the loss or its gradients were not finite {self.patience} steps in a row, up to step "
                    f"{step.number}; rows: {rows}; look at them with `python -m ivl check`, lower the learning rate or "
                    "model.optimizer's betas, set trainer.gradient_clip_val, or train in bf16-mixed or 32"
                )


def _nonfinite_rows(step: _Step) -> tuple[bool, str]:
    """Rows of the micro-batches of this process that were not finite, and true if there are any.

    Where all were finite (gradients overflowed, or another process has the rows) these are the rows of the step.
    """
    nonfinite = [row for rows, finite in step.parts if not bool(finite) for row in rows]
    rows_of_step = [row for rows, _ in step.parts for row in rows]
    return bool(nonfinite), row_names(nonfinite or rows_of_step)


class NonFiniteGuard(Callback):
    """Skips the optimizer steps that `FiniteLoss` finds; `normalizer` knows which, so it comes before this one."""

    def __init__(self, normalizer: LossNormalizer, patience: int) -> None:
        self.normalizer, self.patience = normalizer, patience
        self._rows: list[Conversation] = []

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._finite = FiniteLoss(self.patience, getattr(trainer, "log_every_n_steps", 1))

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._rows = batch.rows

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        self._finite.add(self._rows, loss)

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        assert self.normalizer.is_bad is not None, "the normalizer has ended the step"
        self._finite.close(trainer.global_step, self.normalizer.is_bad, optimizer)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        for optimizer in trainer.optimizers:
            FiniteLoss.release(optimizer)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._finite.read()
