"""A second device for a machine that has none: it is called `meta`, computes on the CPU, and keeps to itself.

Tensors of the device refuse to compute with tensors of the CPU, also those of one number, as GPUs refuse one another.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
"""What may carry numbers from device to device"""


class There(torch.Tensor):
    """A tensor of the second device."""

    @staticmethod
    def __new__(cls, numbers: Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device="meta",
        )
        made.numbers = numbers
        return made

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.numbers.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """While it is on, `meta` is that device; one without autocast, which torch would not be asked about."""

    def __enter__(self) -> SecondDevice:
        ask = torch.is_autocast_enabled
        self._patch = patch.object(torch, "is_autocast_enabled", lambda *kind: kind != ("meta",) and ask(*kind))
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._patch.stop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def _taken_in(leaf: Any) -> Any:
    """`torch.tensor([], device=…)` does not ask the mode."""
    ours = isinstance(leaf, There) or not isinstance(leaf, Tensor) or not leaf.is_meta or leaf.numel()
    return leaf if ours else There(torch.empty(leaf.shape, dtype=leaf.dtype))


def computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map(_taken_in, (args, kwargs))
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = [isinstance(tensor, There) for tensor in tensors]
    if any(there) and not all(there) and function not in COPIES:
        raise RuntimeError(f"{function}: tensors of two devices")
    target = kwargs.get("device")
    result_there = there[0] if there else False
    if target is not None:
        result_there = torch.device(target).type == "meta"
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(lambda leaf: leaf.numbers if isinstance(leaf, There) else leaf, (args, kwargs))
    out = function(*inner_args, **inner_kwargs)
    if not result_there:
        return out
    if torch.is_inference_mode_enabled() and function._schema.is_mutable:
        return args[0]
    out = tree_map(lambda leaf: There(leaf) if isinstance(leaf, Tensor) else leaf, out)
    if torch.is_inference_mode_enabled():
        return out
    return return_and_correct_aliasing(function, args, kwargs, out)
