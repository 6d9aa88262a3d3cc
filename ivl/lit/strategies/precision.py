"""Precision of a run: 16-bit frozen weights, float32 trainable weights, autocast.

Under any 16-bit precision frozen weights are kept in 16 bits, trainable ones in float32, and products are computed in
16 bits (autocast). Lightning's own `bf16-true` would round the trainable ones as well: small updates would be lost.
"""

from __future__ import annotations

import torch

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
