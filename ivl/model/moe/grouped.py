"""Grouped matrix products: rows sorted into groups, each with a weight of its own.

    rows (S, I), sorted by group          weights (E, O, I)          result (S, O)
    [0, ends[0])         x W[0]' ;  [ends[0], ends[1])     x W[1]' ;  …          a group may be empty

torch's own kernel (`torch.nn.functional.grouped_mm`) computes all groups at once and never waits for the host; it takes
bfloat16 on a GPU from Ampere on, rows of a multiple of 16 bytes. Everywhere else a loop goes over the groups in use.
Both are one operation to torch: the compiler, fake tensors and the counter of operations see `ivl::grouped_linear`, of
fixed shapes.

Shapes: S rows of all groups, E groups, I and O features in and out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

ALIGNED = 8
"""Numbers of bfloat16 in the 16 bytes that the kernel wants rows to be a multiple of"""


def has_kernel(rows: Tensor, *features: int) -> bool:
    """True where torch's kernel takes such rows, and widths of weights."""
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16 or any(width % ALIGNED for width in features):
        return False
    major, _ = torch.cuda.get_device_capability(rows.device)
    return major >= 8 if hasattr(F, "grouped_mm") else hasattr(torch, "_grouped_mm") and major == 9


def kernel(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """torch's grouped product, under its present name or its first."""
    return F.grouped_mm(a, b, offs=ends_E) if hasattr(F, "grouped_mm") else torch._grouped_mm(a, b, offs=ends_E)


def _spans(ends_E: Tensor) -> list[tuple[int, int, int]]:
    """(group, begin, end) of the groups in use. Waits for the device."""
    ends = ends_E.tolist()
    return [(n, start, end) for n, (start, end) in enumerate(zip([0, *ends], ends)) if end > start]


def _products(rows: Tensor, weights: Tensor, ends_E: Tensor) -> Tensor:
    """(S, X) rows by (E, X, Y) weights: (S, Y)."""
    if has_kernel(rows, *weights.shape[1:]):
        return kernel(rows, weights, ends_E)
    result = rows.new_empty(len(rows), weights.shape[2])
    for group, start, end in _spans(ends_E):
        torch.mm(rows[start:end], weights[group], out=result[start:end])
    return result


@torch.library.custom_op("ivl::grouped_linear", mutates_args=())
def grouped_linear(x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the weight of its group, transposed, in the dtype of the rows: (S, O).

    `ends_E`: int32, where each group ends among the rows; the last is S.
    """
    return _products(x_SI.contiguous(), weight_EOI.to(x_SI.dtype).transpose(1, 2), ends_E)


@torch.library.custom_op("ivl::grouped_linear_input", mutates_args=())
def input_gradient(dy_SO: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Gradient of the rows of a `grouped_linear`: (S, I)."""
    return _products(dy_SO.contiguous(), weight_EOI.to(dy_SO.dtype), ends_E)


@torch.library.custom_op("ivl::grouped_linear_weight", mutates_args=())
def _weight_gradient(dy_SO: Tensor, x_SI: Tensor, ends_E: Tensor) -> Tensor:
    """(E, O, I), zero for a group without rows."""
    dy_SO, x_SI = dy_SO.contiguous(), x_SI.contiguous()
    groups, outputs, inputs = len(ends_E), dy_SO.shape[1], x_SI.shape[1]
    if has_kernel(x_SI, outputs, inputs):
        weight_EOI = kernel(dy_SO.t(), x_SI, ends_E)
        empty_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0
        return weight_EOI.masked_fill_(empty_E[:, None, None], 0)  # the kernel does not promise to write those
    weight_EOI = x_SI.new_zeros(groups, outputs, inputs)
    for group, start, end in _spans(ends_E):
        torch.mm(dy_SO[start:end].t(), x_SI[start:end], out=weight_EOI[group])
    return weight_EOI


@grouped_linear.register_fake
def _(x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return x_SI.new_empty(x_SI.shape[0], weight_EOI.shape[1])


@input_gradient.register_fake
def _(dy_SO: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return dy_SO.new_empty(dy_SO.shape[0], weight_EOI.shape[2])


@_weight_gradient.register_fake
def _(dy_SO: Tensor, x_SI: Tensor, ends_E: Tensor) -> Tensor:
    return x_SI.new_empty(ends_E.shape[0], dy_SO.shape[1], x_SI.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x_SI, weight_EOI, ends_E = inputs
    of_input, of_weight = ctx.needs_input_grad[:2]
    # A frozen weight needs no input for backward, and a layer in front of everything that trains no weight.
    ctx.save_for_backward(x_SI if of_weight else None, weight_EOI if of_input else None, ends_E)
    ctx.weight_dtype = weight_EOI.dtype


def _backward(ctx: Any, dy_SO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_SI, weight_EOI, ends_E = ctx.saved_tensors
    dx_SI = None if weight_EOI is None else input_gradient(dy_SO, weight_EOI, ends_E)
    dw_EOI = None if x_SI is None else _weight_gradient(dy_SO, x_SI, ends_E).to(ctx.weight_dtype)
    return dx_SI, dw_EOI, None


grouped_linear.register_autograd(_backward, setup_context=_setup)


@register_flop_formula([torch.ops.ivl.grouped_linear, torch.ops.ivl.grouped_linear_input])
def _product_flops(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    """A product and a sum for each row and each number of one group's weight."""
    return 2 * rows[0] * weight[1] * weight[2]


@register_flop_formula([torch.ops.ivl.grouped_linear_weight])
def _weight_flops(dy: Any, x: Any, *_: Any, **__: Any) -> int:
    return 2 * dy[0] * dy[1] * x[1]
