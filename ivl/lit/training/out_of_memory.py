"""Lack of memory in a step, as an error that names its rows and what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ivl.lit.types import as_lit, data_of
from ivl.types import Batch, UserError, row_names


class MemoryGuard(LightningModule):
    """Base of a module whose training steps end with a UserError where memory does not suffice."""

    batch: Batch | None = None
    """Current batch, set by the steps"""

    def memory(self, doing: str) -> AbstractContextManager[None]:
        """Guard a part of a training step, in the words of its error."""
        return out_of_memory(self.batch, memory_advice(self.trainer), doing)

    def backward(self, loss: Tensor) -> None:
        with self.memory("backward"):
            loss.backward()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        with self.memory("the optimizer's step"):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def memory_advice(trainer: Trainer) -> str:
    """Advice for a training step that did not fit, with the present values."""
    data, checkpointing = data_of(trainer), as_lit(trainer.lightning_module).checkpointing
    advice = "lower the batch size and raise accumulate_grad_batches, or lower the processor's max_length or max_tiles"
    if data is not None:
        options, size = data.options, f"data.batch_size ({data.options.rows_per_batch})"
        size = f"data.pack_tokens ({options.tokens_per_pack})" if options.is_packed else size
        limits = f"data.max_length ({data.processor.max_length}) or data.max_tiles ({data.processor.max_tiles})"
        advice = f"lower {size} and raise trainer.accumulate_grad_batches, or lower {limits}"
    off = [part for part in ("vision_model", "language_model") if not getattr(checkpointing, part)]
    return advice + (f", or set {' and '.join(f'model.checkpointing.{part}: true' for part in off)}" if off else "")


@contextmanager
def out_of_memory(batch: Batch | None, advice: str, doing: str) -> Iterator[None]:
    """Turn a lack of memory, the device's or the host's, into a UserError that names the rows, and what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        size = "before any batch"
        if batch is not None:
            longest = batch.input_ids.shape[1] if batch.lengths is None else int(batch.lengths.max())
            size = (
                f"with {len(batch)} rows of {batch.num_tokens} tokens (the longest {longest}) and {len(batch.tiles)} "
                f"tiles: {row_names(batch.rows)}"
            )
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"out of memory in {doing}, {size}; {advice} ({first})") from error
