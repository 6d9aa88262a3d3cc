"""What is cheap to compute is computed again in backward, instead of being kept for it from forward.

A linear layer keeps its input. Where that came from a norm or an activation, what it was made from is kept as well,
by the norm or the activation; so the input need not be. The numbers are the same, bit for bit.

    with small():                     # around a block
        y = linear(again(act, x))     # where the result of `act` would be kept for backward, `x` is

Unlike a checkpoint of a whole block (`InternVL.set_checkpointing`), which computes its matrix products a second time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Recipe:
    """How a tensor is made. Computed once in a backward, for all that read it there."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], made: Tensor) -> None:
        self.function, self.inputs = function, tuple(x.detach() for x in inputs)
        self.alive = weakref.ref(made)
        self.kind, self.autocast = made.device.type, autocast_dtype(made.device.type)
        self.readers = 0
        self.made: Tensor | None = None

    @torch.no_grad()
    def read(self) -> Tensor:
        made = self.made
        if made is None and self.autocast is None:
            made = self.function(*self.inputs)
        elif made is None:
            with torch.autocast(self.kind, self.autocast, cache_enabled=False):
                made = self.function(*self.inputs)
        self.readers -= 1
        self.made = made if self.readers > 0 else None
        return made


_RECIPES: ContextVar[dict[int, Recipe] | None] = ContextVar("recipes", default=None)
"""By the storage of what is made"""


def again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`; in a block that is `small`, autograd keeps `inputs` where it would keep the result.

    The function gives the same for the same tensors, and changes none.
    """
    if torch.compiler.is_compiling():
        return function(*inputs)
    recipes = _RECIPES.get()
    made = function(*inputs)
    if recipes is None or any(isinstance(x, DTensor) for x in (made, *inputs)):
        return made
    place = made.untyped_storage()._cdata
    if all(x.untyped_storage()._cdata != place for x in inputs):
        recipes[place] = Recipe(function, inputs, made)
    return made


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """`again` of a norm, for linear layers alone: in autocast's dtype where that is on, as they would cast it."""

    def function(x: Tensor) -> Tensor:
        dtype = autocast_dtype(x.device.type)
        return norm(x) if dtype is None else norm(x).to(dtype)

    return function(x) if any(map(is_split, norm.parameters())) else again(function, x)


def is_split(parameter: Tensor) -> bool:
    """Whether a weight is not whole here: split over devices, or at hand in its layer's own forward and backward alone,
    by hooks of the layer (DeepSpeed's third stage)."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Of a type of device; None where autocast is off."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # meta has none
    return torch.get_autocast_dtype(kind) if on else None


@contextmanager
def small() -> Iterator[None]:
    """Around a block, in a forward whose backward will come: what it makes by `again` is not kept."""
    recipes: dict[int, Recipe] = {}

    def pack(tensor: Tensor) -> Any:
        if isinstance(tensor, DTensor):
            return tensor
        recipe = recipes.get(tensor.untyped_storage()._cdata)
        if recipe is None or recipe.alive() is None:  # its place in memory is another's now
            return tensor
        recipe.readers += 1
        return recipe, tensor.size(), tensor.stride(), tensor.storage_offset()

    token = _RECIPES.set(recipes)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _RECIPES.reset(token)
        recipes.clear()  # what autograd has packed holds `pack`, and so this


def unpack(kept: Any) -> Tensor:
    """What was packed, as the same view of the same numbers."""
    if isinstance(kept, Tensor):
        return kept
    recipe, *view = kept
    return recipe.read().as_strided(*view)
