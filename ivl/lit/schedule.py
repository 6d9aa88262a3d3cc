"""Learning-rate schedules over the optimizer steps of a run."""

from __future__ import annotations

import math
from typing import Literal

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ivl.types import UserError


class Warmup(LambdaLR):
    """Linear warm-up, then cosine or linear decay, or constant.

    Args:
        optimizer: Optimizer whose rates are scheduled; each group keeps its own peak.
        total_steps: Optimizer steps of the whole run.
        warmup: Share of the steps (below 1) or number of steps (1 and more) of the warm-up.
        decay: Form of the rate after the warm-up.
        floor: Share of the peak rate that the decay ends at.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.03,
        decay: Literal["cosine", "linear", "constant"] = "cosine",
        floor: float = 0.0,
    ):
        steps = int(warmup if warmup >= 1 else warmup * total_steps)

        def factor(step: int) -> float:
            if step < steps:
                return (step + 1) / (steps + 1)
            if decay == "constant":
                return 1.0
            done = min(1.0, (step - steps) / max(1, total_steps - steps))
            share = 0.5 * (1 + math.cos(math.pi * done)) if decay == "cosine" else 1 - done
            return floor + (1 - floor) * share

        super().__init__(optimizer, factor)


def estimated_steps(trainer: Trainer) -> int:
    """Optimizer steps of a run over a loader of the user's own. Raises UserError where it has no end."""
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise UserError(
            "Trainer: the schedule needs the number of steps; give max_steps, or max_epochs and rows of a length"
        )
    return int(steps)
