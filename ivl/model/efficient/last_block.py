"""The last layer's MLP for supervised tokens alone: the loss reads no others.

No other token's last hidden state is read by anything, and about one token in fifteen is supervised; so the last MLP is
computed for those. `DecoderLayer.forward` takes their positions as `outputs_M`.

Saves: most of one layer's MLP. `benchmarks/efficient.py` (60 M parameters, 8 layers, one token in fifteen supervised)
without it: 8 % more kept for backward (168 MB for 156) and 9 % more time with a LoRA, 5 % and 5 % with full tuning.
Proof: losses and gradients equal those of the plain model up to rounding, since products have other shapes
(`tests/model/test_attention.py`); `ivl.estimate.flops` counts it, against torch's own counter.
Off: `model.efficient: false`, or leave the file's line out of `ivl.model.efficient.install`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ivl.model.parts import ModelParts


def install(model: ModelParts) -> None:
    """Let the last layer select the positions, instead of the decoder behind it."""
    model.language_model.model.last_layer_selects = True
