"""Denominator of the loss over an optimizer step: all its supervised tokens, over micro-batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ivl.lit.strategies.classic_fsdp import shards_norm
from ivl.lit.strategies.deepspeed import is_zero, micro_batch_mean

LOSS_UNIT = 1024.0
"""Backward runs on the sum of token losses divided by this (a power of two, so it costs no rounding); the gradients
are divided by the weight of all supervised tokens of the optimizer step once that is known."""


class LossNormalizer(Callback):
    """Mean of the loss over an optimizer step, however it is cut into micro-batches and spread over processes.

        training_step              loss = normalizer.add(trainer, loss sum, weight sum)      of a micro-batch
        on_before_optimizer_step   gradients / weight of all supervised tokens of the step; train/loss, train/grad_norm

    DeepSpeed keeps gradients to itself: there each micro-batch is a mean over the tokens of all processes in it.
    """

    def __init__(self) -> None:
        self.norm: Tensor | None = None
        """Norm of all gradients of the step, before clipping"""
        self.is_bad: Tensor | None = None
        """True if the loss or a gradient of the step is not finite; on the device, equal on all processes"""

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._loss = torch.zeros((), device=module.device)
        self._weight = torch.zeros((), device=module.device)
        self.norm = self.is_bad = None

    def add(self, trainer: Trainer, loss_sum: Tensor, weight_sum: Tensor, *means: Tensor) -> Tensor:
        """Add a micro-batch. Returns the loss for backward.

        `loss_sum`: weighted sum over its supervised tokens. `weight_sum`: sum of their weights. `means`: further terms
        of the loss, each a mean over the micro-batch; they weigh as much as its tokens, and are not in `train/loss`.
        """
        self._loss += loss_sum.detach()
        self._weight += weight_sum
        for term in means:
            loss_sum = loss_sum + term * weight_sum
        if is_zero(trainer.strategy):
            return micro_batch_mean(trainer, loss_sum, weight_sum)
        # Lightning divides by the number of micro-batches; the right denominator follows before the step.
        return loss_sum * (trainer.accumulate_grad_batches / LOSS_UNIT)

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        totals = torch.stack([self._loss, self._weight])
        ranks = trainer.world_size
        if ranks > 1:
            torch.distributed.all_reduce(totals)
        loss, weight = totals
        weight = torch.where(weight > 0, weight, 1.0)  # 0 where nothing is supervised
        self.norm, bad = None, ~torch.isfinite(loss)
        if (grads := gradients(module)) and not is_zero(trainer.strategy):
            scale(grads, LOSS_UNIT * ranks / weight)
            norm = shards_norm(trainer.strategy)
            self.norm = (total_norm(grads) if norm is None else norm).to(loss.device)
            module.log("train/grad_norm", self.norm, batch_size=1)
            if getattr(trainer.precision_plugin, "scaler", None) is None:  # which looks for overflow itself
                bad |= ~torch.isfinite(self.norm)
        module.log("train/loss", loss / weight, batch_size=1)
        self._loss.zero_()
        self._weight.zero_()
        self.is_bad = bad

    def clip(self, module: LightningModule, most: float) -> None:
        """Scale gradients down to a norm of `most`, by the norm that is known already."""
        if most and self.norm is not None:
            clip(gradients(module), most, self.norm)


def gradients(module: torch.nn.Module) -> list[Tensor]:
    """Gradients of a module's parameters that have one."""
    return [p.grad for p in module.parameters() if p.grad is not None]


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
