"""Learning-rate finder: a short run whose rate grows at each step, and the rate at which the loss falls fastest."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ivl.lit.callbacks.checkpoint import Checkpoints
from ivl.lit.types import as_lit
from ivl.storage.files import write_text
from ivl.types import UserError

TABLE = "learning_rates.csv"
"""File in the run's folder: each rate, its loss and the smoothed loss"""


class RateFinder(Callback):
    """Learning-rate range test, in place of training: no checkpoint is written.

    The rate grows by the same factor at each optimizer step; groups with rates of their own keep their proportion to
    the highest. The run ends where the smoothed loss is `stop_at` times its best.

    Args:
        lowest: Rate of the first step.
        highest: Rate of the last step.
        steps: Optimizer steps; fewer where the run's own limits come first.
        stop_at: Multiple of the best smoothed loss at which the run ends.
        smoothing: Weight of the earlier losses in the smoothed loss.
    """

    def __init__(
        self,
        lowest: float = 1e-7,
        highest: float = 0.1,
        steps: int = 100,
        stop_at: float = 4.0,
        smoothing: float = 0.9,
    ) -> None:
        if not 0 < lowest < highest:
            raise UserError(f"RateFinder: lowest, highest: expected 0 < lowest < highest, found {lowest}, {highest}")
        if steps < 2 or stop_at <= 1 or not 0 <= smoothing < 1:
            raise UserError(
                "RateFinder: expected at least 2 steps, stop_at above 1 and smoothing from 0 to below 1, found "
                f"{steps}, {stop_at}, {smoothing}"
            )
        self.lowest, self.highest, self.steps = lowest, highest, steps
        self.stop_at, self.smoothing = stop_at, smoothing
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self._mean, self._taken, self._step = 0.0, steps, 0

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.limit_val_batches = 0  # before the sanity check

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                callback.keep_nothing()
        self._taken = min(self.steps, as_lit(module).total_steps)
        (optimizer,) = trainer.optimizers
        if not isinstance(optimizer, Optimizer):
            raise UserError(
                f"RateFinder: {type(trainer.strategy).__name__} keeps the optimizer to itself; find the rate on one "
                "device, by DDP or by FSDP"
            )
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        top = max(group["initial_lr"] for group in optimizer.param_groups)
        trainer.lr_scheduler_configs[0].scheduler = LambdaLR(optimizer, lambda step: self.rate(step) / top)
        self._step = trainer.global_step

    def rate(self, step: int) -> float:
        """Rate of a step, from 0 on."""
        share = min(1.0, step / max(1, self._taken - 1))
        return self.lowest * (self.highest / self.lowest) ** share

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        if trainer.global_step == self._step:  # inside an accumulation window
            return
        self._step = trainer.global_step
        loss = float(trainer.callback_metrics["train/loss"])  # of all processes
        if math.isfinite(loss):
            self.add(self.rate(len(self.rates)), loss)
        best = min(self.smoothed, default=math.inf)
        diverged = not math.isfinite(loss) or self.smoothed[-1] > self.stop_at * best
        if diverged or len(self.rates) >= self._taken:
            trainer.should_stop = True

    def add(self, rate: float, loss: float) -> None:
        """Add a step."""
        self._mean = self.smoothing * self._mean + (1 - self.smoothing) * loss
        self.rates.append(rate)
        self.losses.append(loss)
        self.smoothed.append(self._mean / (1 - self.smoothing ** len(self.rates)))

    def suggestion(self) -> float | None:
        """Rate at which the smoothed loss falls fastest over the logarithm of the rate; None where it never falls.

        The first tenth of the steps is left out.
        """
        if len(self.rates) < 3:
            return None
        slopes = np.gradient(np.array(self.smoothed), np.log(np.array(self.rates)))
        first = len(slopes) // 10  # the first steps differ by their rows alone
        slopes = slopes[first : max(first, int(np.argmin(self.smoothed))) + 1]
        return self.rates[first + int(np.argmin(slopes))] if slopes.min() < 0 else None

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        folder = trainer.log_dir  # asks all ranks
        if folder is not None and trainer.is_global_zero:
            rows = zip(self.rates, self.losses, self.smoothed)
            lines = [f"{rate:.6g},{loss:.6g},{mean:.6g}" for rate, loss, mean in rows]
            write_text(Path(folder) / TABLE, "\n".join(["rate,loss,smoothed", *lines]) + "\n")
        place = f"; all in {Path(folder) / TABLE}" if folder is not None else ""
        suggested = self.suggestion()
        if suggested is None:
            rank_zero_info(f"learning rates: the loss never fell in {len(self.rates)} steps{place}")
            return
        lowest = self.rates[int(np.argmin(self.smoothed))]
        rank_zero_info(
            f"learning rates: {self.rates[0]:.2g} to {self.rates[-1]:.2g} in {len(self.rates)} steps; the loss falls "
            f"fastest at {suggested:.2g} and is lowest at {lowest:.2g}{place}\n  --model.optimizer.lr {suggested:.2g}"
        )


def check_tuners(callbacks: list[Callback]) -> None:
    """Raise UserError for callbacks of Lightning that run training with no other callback.

    Those that divide the loss by its tokens and skip steps that are not finite would be missing.
    """
    for callback in callbacks:
        if isinstance(callback, LearningRateFinder):
            raise UserError(
                "--trainer.callbacks: LearningRateFinder trains without the callbacks that normalise the loss; take "
                "--trainer.callbacks+=RateFinder"
            )
        if isinstance(callback, BatchSizeFinder):
            raise UserError(
                "--trainer.callbacks: BatchSizeFinder trains without the callbacks that normalise the loss; `python -m "
                "ivl plan` says what fits, see data.pack_tokens and data.batch_size"
            )
