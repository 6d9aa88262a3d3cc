"""Linear layer and layer scale as one autograd operation, which saves less for backward.

y = s (x W' + b). autograd keeps x W' + b for the gradient of s, a tensor as wide as a block's input. But that gradient
follows from the product M = dy' x, from which that of W is made as well: dW = s M, and ds = rows of W M summed + b dy.

Saves: two tensors of a layer's width per layer of a vision encoder that trains. `benchmarks/efficient.py` (60 M
parameters, two tiles, full tuning) without it: 7 % more kept for backward (207 MB for 194), time within 3 %.
Proof: output bit for bit, gradients up to rounding (`tests/model/test_efficient.py`).
Off: `model.efficient: false`, or leave the file's line out of `ivl.model.efficient.install`.

Shapes: N tokens, I and O features in and out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ivl.model.layers import adopted, autocast_dtype, is_sharded
from ivl.model.vision import MLP, Attention, Layer

if TYPE_CHECKING:
    from ivl.model.parts import ModelParts


class ScaledProduct(torch.autograd.Function):
    """Product s (x W' + b); in autocast, x W' + b is in autocast's dtype."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor, scale_O: Tensor) -> Tensor:
        dtype = autocast_dtype(x_NI.device.type) or x_NI.dtype
        ctx.save_for_backward(x_NI, weight_OI, bias_O, scale_O)
        ctx.dtype = dtype
        return F.linear(x_NI.to(dtype), weight_OI.to(dtype), bias_O.to(dtype)) * scale_O

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor, ...]:
        x_NI, weight_OI, bias_O, scale_O = ctx.saved_tensors
        product_OI = (dy_NO.to(ctx.dtype).t() @ x_NI.to(ctx.dtype)).to(weight_OI.dtype)
        sum_O = dy_NO.sum(0).to(bias_O.dtype)
        dx_NI = (dy_NO * scale_O).to(ctx.dtype) @ weight_OI.to(ctx.dtype)
        dscale_O = (weight_OI * product_OI).sum(1) + bias_O * sum_O
        return dx_NI.to(x_NI.dtype), scale_O[:, None] * product_OI, scale_O * sum_O, dscale_O


def scaled(linear: nn.Module, x: Tensor, scale_O: Tensor) -> Tensor:
    """`linear(x) * scale_O`; saves less for backward where all three tensors train."""
    tensors = [getattr(linear, "weight", None), getattr(linear, "bias", None), scale_O]
    plain = type(linear) is nn.Linear and not torch.compiler.is_compiling()
    for p in tensors if plain else ():
        plain &= p is not None and p.requires_grad and not is_sharded(p)
    if not plain or not torch.is_grad_enabled():
        return linear(x) * scale_O
    return ScaledProduct.apply(x.flatten(0, -2), *tensors).unflatten(0, x.shape[:-1])


class ScaledAttention(Attention):
    """Attention times a layer scale."""

    def forward(self, x_NLD: Tensor, scale_D: Tensor) -> Tensor:  # type: ignore[override]
        return self.proj_drop(scaled(self.proj, self.mixed(x_NLD), scale_D))


class ScaledMLP(MLP):
    """The MLP times a layer scale."""

    def forward(self, x_NLD: Tensor, scale_D: Tensor) -> Tensor:  # type: ignore[override]
        return scaled(self.fc2, self.act(self.fc1(x_NLD)), scale_D)


class ScaledLayer(Layer):
    """Layer of the vision encoder whose two branches end in a `ScaledProduct`."""

    def forward(self, x_NLD: Tensor) -> Tensor:
        x_NLD = x_NLD + self.drop_path1(self.attn(self.norm1(x_NLD), self.ls1))
        return x_NLD + self.drop_path2(self.mlp(self.norm2(x_NLD), self.ls2))


def install(model: ModelParts) -> None:
    """Let the layers of the vision encoder compute this way."""
    layers = model.vision_model.encoder.layers
    layer: Any
    for n, layer in enumerate(layers):
        layer.attn, layer.mlp = adopted(layer.attn, ScaledAttention), adopted(layer.mlp, ScaledMLP)
        layers[n] = adopted(layer, ScaledLayer)
