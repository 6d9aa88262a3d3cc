"""Layers that the vision encoder and the language model share: RMSNorm and activations by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ivl.model.again import again

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


class RMSNorm(nn.Module):
    """Root-mean-square norm, in float32 up to the weights whatever these are kept in.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.weight * again(self._unit, x_BTD)

    def _unit(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = again(Tensor.float, x_BTD)
        return (wide_BTD * torch.rsqrt(wide_BTD.pow(2).mean(-1, keepdim=True) + self.eps)).to(x_BTD.dtype)
