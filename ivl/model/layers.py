"""Layers of both encoder and decoder: RMSNorm, activations; helpers for shards and autocast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_fast": lambda: nn.GELU(approximate="tanh"),
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": lambda: QuickGELU(),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}
"""`hidden_act` of a config.json → the layer"""


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), as CLIP has it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Gated(nn.Module):
    """The activation of a gated MLP: act(gate) · up."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        return self.act(gate_BTF) * up_BTF


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 up to the product with the weights.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = x_BTD.float()
        unit_BTD = wide_BTD * torch.rsqrt(wide_BTD.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * unit_BTD.to(x_BTD.dtype)


def is_sharded(parameter: Tensor) -> bool:
    """True if this process holds a shard of a weight alone: a DTensor, or a parameter under DeepSpeed's third stage,
    gathered by hooks during its layer's forward and backward."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Autocast's dtype on a type of device; None where autocast is off."""
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def adopted(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return a module of a subclass that shares another's parameters, children and settings."""
    new = kind.__new__(kind)
    new.__dict__.update(module.__dict__)
    return new
