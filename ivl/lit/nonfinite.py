"""Guards of a step: non-finite losses and lack of memory, reported with their rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ivl.types import Batch, Conversation, UserError, printable, some

log = logging.getLogger(__name__)
"""Logger of every process, since only the process that has a row can name it"""

FLAG = "found_inf"
"""Attribute read by torch's fused optimizers: they skip the step where it is not 0"""


def row_names(rows: Sequence[Conversation]) -> str:
    """List rows by file, line and id."""
    names = [f"{row.where} ({row.id})" if row.id and row.where else row.where or row.id or "?" for row in rows]
    return printable(some(names), " ")


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


def scale(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place, in one call per device.

    Shards are multiplied as local tensors, since torch takes no two tensors on different meshes in one call.
    """
    of_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        of_device.setdefault(local.device, []).append(local)
    for device, tensors in of_device.items():
        torch._foreach_mul_(tensors, factor.to(device))


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Norm of all gradients together, over all shards, before clipping; on the device."""
    of_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        of_mesh.setdefault(getattr(gradient, "device_mesh", None), []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(tensors) for tensors in of_mesh.values()]
    totals = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return totals[0] if len(totals) == 1 else torch.linalg.vector_norm(torch.stack(totals))


def clip(gradients: list[Tensor], most: float, norm: Tensor) -> None:
    """Scale gradients down to a norm of `most`, as torch's `clip_grads_with_norm_` does."""
    scale(gradients, (most / (norm + 1e-6)).clamp(max=1.0))


def memory_advice(data: Any, checkpointing: Mapping[str, bool]) -> str:
    """Advice for a training step that did not fit, with the present values of a data module."""
    size = f"data.pack_tokens ({data.pack_tokens})" if data.packing else f"data.batch_size ({data.batch_size})"
    limits = f"data.max_length ({data.processor.max_length}) or data.max_tiles ({data.processor.max_tiles})"
    off = " and ".join(f"model.checkpointing.{part}: true" for part, on in checkpointing.items() if not on)
    return f"lower {size} and raise trainer.accumulate_grad_batches, or lower {limits}" + (
        f", or set {off}" if off else ""
    )


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
