"""What goes wrong in a step, said with names: losses that are not finite, memory that is not there."""

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
"""Of every process: the one that has a row names it"""

FLAG = "found_inf"
"""What torch's fused optimizers read: they skip the step where it is not 0"""


def named(rows: Sequence[Conversation]) -> str:
    """Rows as people find them again: where they stand, and their own id."""
    names = [f"{row.where} ({row.id})" if row.id and row.where else row.where or row.id or "?" for row in rows]
    return printable(some(names), " ")


@dataclass
class _Step:
    number: int
    bad: Tensor
    """Whether something was not finite; on the device"""
    skipped: bool
    """Whether the optimizer passes over it then"""
    parts: list[tuple[list[Conversation], Tensor]]
    """Each micro-batch's rows, and whether its loss was finite"""


@dataclass
class FiniteLoss:
    """Optimizer steps whose loss or gradients are not finite are skipped, their rows named, and the run stopped after
    `patience` of them in a row.

    Whether a step is skipped is decided from sums over all processes, so that all do the same. A fused optimizer skips
    on the device (the flag that torch's gradient scaler gives it too) and the flags are read `lag` steps later, all at
    once; any other is asked on the host, which on a GPU waits for the step's backward.
    """

    patience: int
    lag: int = 1
    """Optimizer steps between two readings of the flags"""
    _open: list[tuple[list[Conversation], Tensor]] = field(default_factory=list)
    _closed: list[_Step] = field(default_factory=list)
    _in_a_row: list[_Step] = field(default_factory=list)

    def add(self, rows: list[Conversation], loss: Tensor) -> None:
        """A micro-batch and its loss."""
        self._open.append((rows, torch.isfinite(loss.detach())))

    def close(self, number: int, bad: Tensor, optimizer: Optimizer) -> None:
        """The end of an optimizer step; `bad`: whether it must be skipped, equal on all processes.

        Raises UserError where too many steps in a row were bad.
        """
        own = isinstance(optimizer, Optimizer)  # DeepSpeed's is none, and can't be told to skip
        self._closed.append(_Step(number, bad, own, self._open))
        self._open = []
        if not own:
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
        """After the optimizer's step."""
        if hasattr(optimizer, FLAG):
            delattr(optimizer, FLAG)

    def read(self) -> None:
        """Look at the steps that were not looked at yet: one transfer."""
        steps, self._closed = self._closed, []
        if not steps:
            return
        flags = torch.stack([step.bad for step in steps]).tolist()
        for step, bad in zip(steps, flags):
            if not bad:
                self._in_a_row = []
                continue
            self._in_a_row.append(step)
            mine, rows = _guilty(step)
            if mine or getattr(rank_zero_only, "rank", 0) == 0:
                what = "skipped, as its" if step.skipped else "its"
                log.warning("step %d: %s loss or gradients are not finite; rows: %s", step.number, what, rows)
            if len(self._in_a_row) >= self.patience:
                raise UserError(
                    f"the loss or its gradients were not finite {self.patience} steps in a row, up to step "
                    f"{step.number}; rows: {rows}; look at them with `python -m ivl check`, lower the learning rate or "
                    "model.optimizer's betas, set trainer.gradient_clip_val, or train in bf16-mixed or 32"
                )


def _guilty(step: _Step) -> tuple[bool, str]:
    """Whether a micro-batch of this process was not finite, and its rows; where all were finite (gradients overflowed,
    or another process has it) the rows of the step."""
    guilty = [row for rows, finite in step.parts if not bool(finite) for row in rows]
    everything = [row for rows, _ in step.parts for row in rows]
    return bool(guilty), named(guilty or everything)


def scale(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place; one call for each device that they are on.

    Of a shard what is here: torch multiplies no two tensors at once whose shards lie on different meshes, as with
    layers shared by processes.
    """
    of_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        of_device.setdefault(own.device, []).append(own)
    for device, own_here in of_device.items():
        torch._foreach_mul_(own_here, factor.to(device))


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, over all shards, before clipping; on the device."""
    of_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        of_mesh.setdefault(getattr(gradient, "device_mesh", None), []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(own) for own in of_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))


def clip(gradients: list[Tensor], most: float, norm: Tensor) -> None:
    """Scale gradients of this norm down to `most`, as torch's `clip_grads_with_norm_` does."""
    scale(gradients, (most / (norm + 1e-6)).clamp(max=1.0))


def what_to_lower(data: Any, checkpointing: Mapping[str, bool]) -> str:
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
                f"tiles: {named(batch.rows)}"
            )
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"out of memory in {doing}, {size}; {advice} ({first})") from error
