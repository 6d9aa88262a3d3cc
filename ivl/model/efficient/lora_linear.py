"""LoRA on a linear layer as one autograd operation: peft's layer in less memory and time.

peft's own forward keeps for backward, of each layer, the input after dropout and a mask as wide and as precise as the
input; here layers share one input, and a mask is one byte a value. `tune.inject` puts it in peft's place.
`ivl.finetune.tune` has a drawing of LoRA.

Saves: what peft keeps of each layer beside its input. `benchmarks/efficient.py` (60 M parameters, rank 16 with dropout)
without it: 2.1 times as much kept for backward (335 MB for 156), 12 % more time.
Proof: equal to peft's own layer, gradients included, up to rounding (`tests/model/test_lora.py`).
Off: `model.efficient: false`.

Shapes: N tokens, I and O features in and out, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ivl.model.layers import adopted, autocast_dtype, is_sharded


def dropout_mask(shape: torch.Size, dropout: float, device: torch.device) -> tuple[Tensor, float]:
    """Dropout mask of 0 and 1, and the share of ones: 16 random bits a value, so to the next 1 / 65536.

    Drawn four values at a time: on a CPU Bernoulli numbers cost as much as a layer's product with its weight.
    """
    dropped = round(dropout * 2**16)
    words = torch.empty(shape.numel() // 4 + 1, dtype=torch.int64, device=device)
    words.random_(torch.iinfo(torch.int64).min, None)
    bits = words.view(torch.int16)[: shape.numel()].view(shape)
    return (bits >= dropped - 2**15).view(torch.uint8), 1 - dropped / 2**16


def _masked(x_NI: Tensor, mask_NI: Tensor | None) -> Tensor:
    return x_NI if mask_NI is None else x_NI * mask_NI


class LoRAProduct(torch.autograd.Function):
    """Product x W' + bias + scale · dropout(x) A' B', W and bias frozen; in autocast's dtype where that is on."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        dropout: float,
    ) -> Tensor:
        dtype = autocast_dtype(x_NI.device.type) or x_NI.dtype
        mask_NI = None
        if dropout:
            mask_NI, share = dropout_mask(x_NI.shape, dropout, x_NI.device)
            scale = scale / share
        masked_NI = _masked(x_NI, mask_NI)
        low_NR = F.linear(masked_NI.to(dtype), a_RI.to(dtype))
        y_NO = F.linear(x_NI.to(dtype), weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))
        y_NO.addmm_(low_NR, b_OR.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR, mask_NI, low_NR)
        ctx.scale = scale
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, a_RI, b_OR, mask_NI, low_NR = ctx.saved_tensors
        dtype, dx_NI = dy_NO.dtype, None
        db_OR = (dy_NO.t() @ low_NR).to(b_OR.dtype) * ctx.scale
        dlow_NR = (dy_NO @ b_OR.to(dtype)) * ctx.scale
        da_RI = (dlow_NR.t() @ _masked(x_NI, mask_NI).to(dtype)).to(a_RI.dtype)
        if ctx.needs_input_grad[0]:
            dx_NI = dlow_NR @ a_RI.to(dtype)
            dx_NI = dx_NI if mask_NI is None else dx_NI.mul_(mask_NI)
            dx_NI = dx_NI.addmm_(dy_NO, weight_OI.to(dtype)).to(x_NI.dtype)
        return dx_NI, None, None, da_RI, db_OR, None, None


class LoRALinear(lora.Linear):
    """LoRA layer of peft with another forward; its parameters and files are unchanged."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The compiler sees through peft's own operations, and arranges what is kept by itself.
        compiling = torch.compiler.is_compiling()
        if compiling or args or kwargs or self.disable_adapters or self.merged or not self._is_plain():
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        base, dropout = self.base_layer, self.lora_dropout[adapter]
        share = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        tensors = (base.weight, base.bias, self.lora_A[adapter].weight, self.lora_B[adapter].weight)
        y_NO = LoRAProduct.apply(x.flatten(0, -2), *tensors, self.scaling[adapter], share)
        return y_NO.unflatten(0, x.shape[:-1])

    def _is_plain(self) -> bool:
        """True if the fused path applies: one active adapter, frozen weights, no shards."""
        if len(self.active_adapters) != 1 or self.lora_variant or self.lora_bias.get(self.active_adapters[0]):
            return False
        (adapter,) = self.active_adapters
        base = self.base_layer
        if not base.weight.is_floating_point():  # quantised, it computes by itself
            return False
        frozen = [base.weight] if base.bias is None else [base.weight, base.bias]
        weights = [*frozen, self.lora_A[adapter].weight, self.lora_B[adapter].weight]
        return not any(map(is_sharded, weights)) and not any(p.requires_grad for p in frozen)


def install(model: nn.Module) -> None:
    """Put this layer in the place of peft's on linear layers; those on other layers, quantised ones too, stay."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is lora.Linear and type(child.base_layer) is nn.Linear:
                setattr(parent, name, adopted(child, LoRALinear))
