"""Position of a run after an optimizer step, for a checkpoint written later."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

VALIDATION_DUE = "validation_due"
"""Key of a checkpoint: true if it was written between a step and the validation after it"""


@dataclass
class Position:
    """Counters and random numbers at the end of an optimizer step. Weights stay as they are until the next one."""

    step: int
    epoch: int
    loops: dict[str, Any]
    random: dict[str, Any]
    validation_due: bool

    @classmethod
    def of(cls, trainer: Trainer, random: dict[str, Any]) -> Position:
        loops = deepcopy(trainer.fit_loop.state_dict())
        return cls(trainer.global_step, trainer.current_epoch, loops, random, validation_due(trainer))

    def put(self, checkpoint: dict[str, Any]) -> None:
        """Set the counters of a checkpoint to this position."""
        checkpoint["global_step"], checkpoint["epoch"] = self.step, self.epoch
        checkpoint["loops"]["fit_loop"] = self.loops


def micro_batches_pending(trainer: Trainer) -> int:
    """Number of micro-batches since the last optimizer step; 0 between accumulation windows."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    ready = progress.current.ready
    last = progress.is_last_batch or ready == trainer.num_training_batches
    return 0 if last else ready % trainer.accumulate_grad_batches


def validation_due(trainer: Trainer) -> bool:
    """Return true if a validation follows the batch that has just ended."""
    loop: Any = trainer.fit_loop
    counts = loop.epoch_loop.batch_progress.current
    return counts.processed > counts.completed and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def is_cut_short(trainer: Trainer, step_end: Position | None) -> bool:
    """Return true if max_steps, max_time or early stopping ended the epoch at its last step, before its last batch.

    Lightning counts that epoch as ended; a longer run that is resumed would leave out its other rows.
    """
    counts: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return step_end is not None and step_end.step == trainer.global_step and counts.ready < trainer.num_training_batches


def begin_with_validation(loops: dict[str, Any]) -> None:
    """Change a checkpoint's counters so that Lightning begins with the validation, instead of skipping it."""
    for counts in (loops["epoch_loop.batch_progress"][name] for name in ("total", "current")):
        counts["completed"] = counts["processed"]
    for counts in (loops["epoch_loop.val_loop.batch_progress"][name] for name in ("total", "current")):
        counts |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
