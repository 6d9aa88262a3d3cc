"""Linear layer whose frozen weight is in FP8 (e4m3), with a scale for each row.

Where a GPU multiplies FP8 (compute capability 9.0 and later), inputs are rounded to FP8 as well, with a scale for each
token, and the product is accumulated in float32. Elsewhere the weight is made again in the computing dtype for each
product. Gradients of inputs are always computed that way.

Needs no package beside torch. Source: FP8 formats (https://arxiv.org/abs/2209.05433).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ivl.model.layers import autocast_dtype

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
MULTIPLE = 16
"""Both sides of a weight must be multiples of this for the products of a GPU"""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of (..., N) to FP8. Returns the numbers, and the scales (..., 1) in float32."""
    scales = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-30) / LARGEST
    return (x.float() / scales).clamp(-LARGEST, LARGEST).to(FP8), scales


def dequantize(stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of FP8 that are stored as bytes, times the scales of their rows."""
    return stored.view(FP8).to(dtype).mul_(scales)


class FP8Linear(nn.Linear):
    """Linear layer with a frozen weight of 8 bits, (O, I), and scales (O, 1)."""

    def __init__(self, weight_OI: Tensor, bias: bool) -> None:
        """`weight_OI`: in any float type, on its device. The bias is put in later."""
        outputs, inputs = weight_OI.shape
        super().__init__(inputs, outputs, bias, device="meta")
        numbers_OI, scales_O1 = quantize(weight_OI)
        # As bytes: what looks at a weight's type takes it for quantised, and no change of dtype touches it.
        self.weight = nn.Parameter(numbers_OI.view(torch.uint8), requires_grad=False)
        self.register_buffer("scales", scales_O1, persistent=False)
        self.scales: Tensor

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (O, I)."""
        return dequantize(self.weight, self.scales, dtype)

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x.device.type) or x.dtype
        y = _Product.apply(x.to(dtype), self)
        return y if self.bias is None else y + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """Product x W'; nothing but the layer is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FP8Linear) -> Tensor:
        ctx.layer = layer
        if not multiplies_fp8(x, layer):
            return F.linear(x, layer.dequantized(x.dtype))
        return multiply(x.flatten(0, -2), layer).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.layer.dequantized(dy.dtype), None


def multiplies_fp8(x: Tensor, layer: FP8Linear) -> bool:
    """True if the device multiplies FP8 with a scale for each row, in the shapes and the dtype at hand."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or x.numel() == 0:
        return False
    sides = layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
    return sides and torch.cuda.get_device_capability(x.device) >= (9, 0)


def multiply(x_NI: Tensor, layer: FP8Linear) -> Tensor:
    """Return the product of bfloat16 inputs rounded to FP8, (N, O) in bfloat16."""
    numbers_NI, scales_N1 = quantize(x_NI)
    scales_1O = layer.scales.t()
    weight_IO = layer.weight.view(FP8).t()
    return torch._scaled_mm(
        numbers_NI, weight_IO, scale_a=scales_N1, scale_b=scales_1O, out_dtype=torch.bfloat16, use_fast_accum=True
    )
