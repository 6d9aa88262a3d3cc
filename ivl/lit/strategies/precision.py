"""Precision of a run: 16-bit frozen weights, float32 trainable weights, autocast.

Under any 16-bit precision frozen weights are kept in 16 bits, trainable ones in float32, and products are computed in
16 bits (autocast). Lightning's own `bf16-true` would round the trainable ones as well: small updates would be lost.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from ivl.lit.strategies.deepspeed import is_zero
from ivl.types import UserError

MASTERED = {"bf16-true": "bf16-mixed", "16-true": "16-mixed"}


def choose_precision(precision: str, bf16: bool) -> tuple[str, str | None]:
    """Return the trainer's precision, and a notice of a change. `bf16`: true if the device computes in bfloat16."""
    effective = MASTERED.get(precision, precision)
    notice = None
    if effective != precision:
        notice = f"precision {precision}: frozen weights in 16 bits, what trains in float32, as under {effective}"
    if effective == "bf16-mixed" and not bf16:
        effective = "16-mixed"
        notice = (
            f"precision {precision}: this device does not compute in bfloat16, so 16-mixed (float16 with a loss scale) "
            "is used; where losses become infinite, choose 32"
        )
    return effective, notice


def device_has_bf16(accelerator: str) -> bool:
    """Return true if the accelerator computes in bfloat16; a CPU does, slowly on some."""
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)


def weight_dtype(dtype: str, precision: str) -> str:
    """Type of frozen weights: `dtype`, or for `auto` what the trainer's precision computes in."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if "bf16" in precision else "float16" if precision.startswith("16") else "float32"


class PrecisionGuard(Callback):
    """Keeps batches as they are, and what trains in float32, under the precision plugins of all strategies."""

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        # DeepSpeed's and classic FSDP's plugins convert every field of a batch, its rows too, and fail on those.
        plugin: Any = trainer.precision_plugin
        plugin.convert_input = lambda batch: batch

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        dtypes = {p.dtype for p in module.parameters() if p.requires_grad} - {torch.float32}
        # DeepSpeed, which is a DDPStrategy to Lightning, keeps the float32 weights itself.
        torch_states = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy))
        if dtypes and torch_states and not is_zero(trainer.strategy):
            raise UserError(
                f"trainer.precision {trainer.precision}: it rounded what trains to {dtypes.pop()}, not float32. "
                "Choose bf16-mixed: frozen weights are kept in 16 bits there as well"
            )
