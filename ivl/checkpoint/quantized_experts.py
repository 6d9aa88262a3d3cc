"""Experts of a mixture in 8 or 4 bits: their weights are made again for each product.

bitsandbytes' layers hold a matrix each; a mixture has all its experts in one tensor. It is kept in bitsandbytes' nf4,
or in 8 bits (whole numbers or FP8) with a scale for each row, and stands in the computing dtype only while its layer is
computed: in forward, and once more in backward. Inputs are not quantised, in any of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ivl.checkpoint.fp8_linear import dequantize, quantize
from ivl.model.layers import autocast_dtype
from ivl.model.moe.experts import GroupedLinear
from ivl.model.moe.grouped import grouped_linear, input_gradient
from ivl.options import Quantize

BLOCK = 64
"""Weights that share a scale in nf4"""


class _Product(torch.autograd.Function):
    """`grouped_linear` by a weight that is made from its layer, and not kept for backward."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, ends_E: Tensor, layer: QuantizedExperts) -> Tensor:
        ctx.save_for_backward(ends_E)
        ctx.layer = layer
        return grouped_linear(x_SI, layer.dequantized(x_SI.dtype), ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SO: Tensor) -> tuple[Tensor, None, None]:
        (ends_E,) = ctx.saved_tensors
        return input_gradient(dy_SO, ctx.layer.dequantized(dy_SO.dtype), ends_E), None, None


class QuantizedExperts(nn.Module):
    """A frozen `GroupedLinear` in fewer bits."""

    bias = None

    def __init__(self, like: GroupedLinear, weight: Tensor, scales: Tensor, kind: Quantize) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = like.num_experts, like.in_features, like.out_features
        self.kind = kind
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scales", scales, persistent=False)
        self.scales: Tensor

    @classmethod
    def of(cls, like: GroupedLinear, weight_EOI: Tensor, kind: Quantize) -> QuantizedExperts:
        """Quantise a weight, on its device."""
        if kind == "nf4":
            from bitsandbytes.functional import quantize_4bit

            packed, state = quantize_4bit(weight_EOI.contiguous(), blocksize=BLOCK, quant_type="nf4")
            return cls(like, packed, state.absmax, kind)
        if kind == "fp8":
            numbers_EOI, scales_EO1 = quantize(weight_EOI)
            return cls(like, numbers_EOI.view(torch.uint8), scales_EO1, kind)
        scales_EO1 = weight_EOI.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return cls(like, (weight_EOI / scales_EO1).round().to(torch.int8), scales_EO1, kind)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight: (E, O, I)."""
        if self.kind == "int8":
            return self.weight.to(dtype).mul_(self.scales)
        if self.kind == "fp8":
            return dequantize(self.weight, self.scales, dtype)
        from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

        shape = torch.Size((self.num_experts, self.out_features, self.in_features))
        code = get_4bit_type("nf4", device=self.weight.device)
        state = QuantState(self.scales, shape, code, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
        return dequantize_4bit(self.weight, state)

    def forward(self, x_SI: Tensor, ends_E: Tensor) -> Tensor:
        dtype = autocast_dtype(x_SI.device.type) or x_SI.dtype
        return _Product.apply(x_SI.to(dtype), ends_E, self)


EXPERT_LAYERS = (GroupedLinear, QuantizedExperts)
"""Classes of layers that hold a matrix for each expert"""
