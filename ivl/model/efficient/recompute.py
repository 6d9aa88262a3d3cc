"""Selective recomputation of norms and activations in backward; results are not saved.

A linear layer keeps its input for backward. Where that came from a norm or an activation, what it was made from is kept
as well, so the result need not be:

    y = linear(norm(x))              autograd keeps x (for the norm) and norm(x) (for the linear layer)
    with recompute_region():         around a layer
        y = linear(recompute(norm, x))   keeps x alone; backward computes norm(x) once for all linear layers behind it

Unlike a checkpoint of a whole layer (`InternVL.set_checkpointing`), no matrix product is computed a second time.

Saves, of what forward leaves for backward (60 M parameters, a row of 768 tokens, two tiles; step on one CPU core):

| | all kept | this file | `autograd.Function` per norm and gate | torch's selective checkpointing |
| --- | --- | --- | --- | --- |
| LoRA | 275 MB, 1.94 s | 152 MB, 1.91 s | 231 MB, 1.89 s | 296 MB, 2.17 s (with PEFT's own LoRA layer) |
| full | 379 MB, 2.62 s | 202 MB, 2.76 s | 311 MB, 2.84 s | 243 MB, 2.73 s (language model only) |

A function's result is still kept by the layers behind it; selective checkpointing keeps the result of every product.

Proof: loss and gradients are bit for bit those of the plain model; in autocast gradients up to rounding, since the
result of a norm is cast once for all layers behind it (`tests/model/test_efficient.py`).
Off: `model.efficient: false`, or leave the file's line out of `ivl.model.efficient.install`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ivl.model import layers
from ivl.model.attention import joined
from ivl.model.layers import adopted, autocast_dtype, is_sharded
from ivl.model.moe import experts

if TYPE_CHECKING:
    from ivl.model.parts import ModelParts


class Recompute:
    """Function and inputs of a tensor, to compute it once in a backward for all that read it there."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], result: Tensor) -> None:
        self.function, self.inputs = function, tuple(x.detach() for x in inputs)
        self.alive = weakref.ref(result)
        self.device, self.autocast = result.device.type, autocast_dtype(result.device.type)
        self.readers = 0
        self.result: Tensor | None = None

    @torch.no_grad()
    def read(self) -> Tensor:
        result = self.result
        if result is None and self.autocast is None:
            result = self.function(*self.inputs)
        elif result is None:
            with torch.autocast(self.device, self.autocast, cache_enabled=False):
                result = self.function(*self.inputs)
        self.readers -= 1
        self.result = result if self.readers > 0 else None
        return result


_REGION: ContextVar[dict[int, Recompute] | None] = ContextVar("region", default=None)
"""Recomputed results of the current region, by their storage"""


def recompute(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return `function(*inputs)`; in a region autograd saves `inputs` instead of the result.

    The function gives the same for the same tensors, and changes none.
    """
    if torch.compiler.is_compiling():
        return function(*inputs)
    region = _REGION.get()
    result = function(*inputs)
    if region is None or any(isinstance(x, DTensor) for x in (result, *inputs)):
        return result
    storage = result.untyped_storage()._cdata
    if all(x.untyped_storage()._cdata != storage for x in inputs):
        region[storage] = Recompute(function, inputs, result)
    return result


@contextmanager
def recompute_region() -> Iterator[None]:
    """Context of a layer's forward in training: results of `recompute` are not saved for backward."""
    region: dict[int, Recompute] = {}

    def pack(tensor: Tensor) -> Any:
        if isinstance(tensor, DTensor):
            return tensor
        recipe = region.get(tensor.untyped_storage()._cdata)
        if recipe is None or recipe.alive() is None:  # its memory holds another tensor now
            return tensor
        recipe.readers += 1
        return recipe, tensor.size(), tensor.stride(), tensor.storage_offset()

    token = _REGION.set(region)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _REGION.reset(token)
        region.clear()  # what autograd has packed holds `pack`, and so this


def unpack(packed: Any) -> Tensor:
    """Return the packed tensor: the same view of the same numbers, recomputed where it was not saved."""
    if isinstance(packed, Tensor):
        return packed
    recipe, *view = packed
    return recipe.read().as_strided(*view)


# -- the layers whose results are recomputed ---------------------------------------------------------------------


class Recomputed(nn.Module):
    """Norm in front of linear layers alone, cast to autocast's dtype as these layers would cast it."""

    def forward(self, x: Tensor) -> Tensor:
        sharded = any(map(is_sharded, self.parameters()))
        return self.cast(x) if sharded or torch.compiler.is_compiling() else recompute(self.cast, x)

    def cast(self, x: Tensor) -> Tensor:
        """Run the layer, and cast its result."""
        dtype, result = autocast_dtype(x.device.type), super().forward(x)
        return result if dtype is None else result.to(dtype)


class RMSNorm(layers.RMSNorm):
    """RMSNorm whose float32 copy and normalised input are recomputed as well."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.weight * recompute(self._unit, x_BTD)

    def _unit(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = recompute(Tensor.float, x_BTD)
        return (wide_BTD * torch.rsqrt(wide_BTD.pow(2).mean(-1, keepdim=True) + self.eps)).to(x_BTD.dtype)


class InputRMSNorm(Recomputed, RMSNorm):
    """RMSNorm in front of linear layers."""


class InputLayerNorm(Recomputed, nn.LayerNorm):
    """LayerNorm in front of linear layers."""


class Activation(nn.Module):
    """Activation between two linear layers, recomputed in backward."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return recompute(self.act, x)


class Gated(layers.Gated):
    """Activation of a gated MLP; act(gate) and its product with up are recomputed."""

    def forward(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        return recompute(self._gated, gate_BTF, up_BTF)

    def _gated(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        return recompute(self.act, gate_BTF) * up_BTF


class Rows(experts.Rows):
    """Copies of tokens for their experts, many times the tokens themselves."""

    def forward(self, x_TD: Tensor, order_S: Tensor, inverse_S: Tensor) -> Tensor:
        return recompute(super().forward, x_TD, order_S, inverse_S)


class WeightedGate(experts.WeightedGate):
    """Activation of an expert; all but gate, up and the weights are recomputed."""

    def forward(self, gate_SF: Tensor, up_SF: Tensor, weights_S1: Tensor) -> Tensor:
        return recompute(self._weighted, gate_SF, up_SF, weights_S1)

    def _weighted(self, gate_SF: Tensor, up_SF: Tensor, weights_S1: Tensor) -> Tensor:
        gated_SF = recompute(self._gated, gate_SF, up_SF)
        return (gated_SF * weights_S1).to(gate_SF.dtype)

    def _gated(self, gate_SF: Tensor, up_SF: Tensor) -> Tensor:
        return recompute(self.act, gate_SF) * up_SF


_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: InputLayerNorm,
    layers.RMSNorm: InputRMSNorm,
    layers.Gated: Gated,
    experts.Rows: Rows,
    experts.WeightedGate: WeightedGate,
}


def install(model: ModelParts) -> None:
    """Let the layers of a model compute this way; for a model whose weights are not read yet."""
    vision, decoder = model.vision_model.encoder, model.language_model.model
    layer: Any
    for layer in vision.layers:
        for name in ("norm1", "norm2"):
            _replace(layer, name)
        layer.mlp.act = Activation(layer.mlp.act)
    for layer in decoder.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            _replace(layer, name)
        layer.self_attn.join = partial(recompute, joined)  # each row's result is kept by its own attention
        for name in ("q_norm", "k_norm"):
            if (norm := getattr(layer.self_attn, name)) is not None:
                setattr(layer.self_attn, name, adopted(norm, RMSNorm))
        if type(getattr(layer.mlp, "act", None)) in _REPLACEMENTS:
            _replace(layer.mlp, "act")
        if isinstance(layer.mlp, experts.ExpertMLP):
            for name in ("rows", "act"):
                _replace(layer.mlp.experts, name)
    vision.around_layer = decoder.around_layer = recompute_region


def _replace(parent: nn.Module, name: str) -> None:
    module = getattr(parent, name)
    setattr(parent, name, adopted(module, _REPLACEMENTS.get(type(module), type(module))))
