"""Key-value cache: one slot for each row, every row's keys from column 0 on.

    slot 0   k k k k k k k . . . . .      length 7
    slot 1   k k k . . . . . . . . .      length 3
    slot 2   k k k k k . . . . . . .      length 5

The tensors have a fixed capacity that grows by doubling, and a step of decoding writes column `length` of each row. So
its shapes stay the same from step to step, as torch.compile and CUDA graphs want it. Columns that were never written,
or were written by a row that left, are zero or hidden by the mask; what a row leaves behind is cleared when its slot
is taken, since a hidden value that is not finite would still spoil the sum.

Shapes: R slots, G heads of keys, C columns, K width of a head; T tokens of a call, n rows being decoded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS = 64
"""Least capacity in columns, and the step by which the columns of a decoding step grow"""


class KVCache:
    """Keys and values of all layers. Layers may be on different devices."""

    def __init__(self, max_rows: int = 1) -> None:
        self.max_rows = max_rows
        self.rows = self.columns = 0
        """Capacity"""
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        """(R, G, C, K) of each layer"""

    def reserve(self, rows: int, columns: int, limit: int | None = None) -> bool:
        """Make room for rows of `columns` tokens. Return True if the tensors were replaced.

        Capacities double, up to `max_rows` rows and `limit` columns.
        """
        if rows <= self.rows and columns <= self.columns:
            return False
        if rows > self.rows:
            self.rows = max(rows, min(2 * self.rows, self.max_rows))
        if columns > self.columns:
            doubled = max(2 * self.columns, COLUMNS)
            self.columns = -(-max(columns, doubled if limit is None else min(doubled, limit)) // COLUMNS) * COLUMNS
        for store in (self.keys, self.values):
            for layer, tensor in enumerate(store):
                larger = tensor.new_zeros(self.rows, tensor.shape[1], self.columns, tensor.shape[3])
                larger[: tensor.shape[0], :, : tensor.shape[2]] = tensor
                store[layer] = larger
        return True

    def allocate(self, layer: int, like_1GTK: Tensor) -> None:
        """Make the tensors of a layer, on the device of its keys, when it is first written."""
        assert layer == len(self.keys), "layers are written in order"
        shape = (self.rows, like_1GTK.shape[1], self.columns, like_1GTK.shape[3])
        self.keys.append(like_1GTK.new_zeros(shape))
        self.values.append(like_1GTK.new_zeros(shape))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row's first `length` columns to another slot, and clear the rest of it."""
        for store in (*self.keys, *self.values):
            store[target, :, :length] = store[source, :, :length]
            store[target, :, length:] = 0

    def reorder(self, slots_n: Tensor) -> None:
        """Let slot i have the row of slot `slots_n[i]`, for beams that go on from one another."""
        for store in (*self.keys, *self.values):
            store[: len(slots_n)] = store[slots_n.to(store.device)]

    def clear(self, slot: int, length: int) -> None:
        """Clear a slot from column `length` on."""
        for store in (*self.keys, *self.values):
            store[slot, :, length:] = 0


class Prefill:
    """View of the cache for prompts that are read one after another in one packed sequence.

    The keys of row i go to slot `slots[i]`, columns 0 to `lengths[i]` - 1. A prompt sees itself only, so attention
    takes the keys as they come.
    """

    def __init__(self, cache: KVCache, slots: Sequence[int], lengths: Sequence[int]) -> None:
        self.cache, self.slots, self.lengths = cache, slots, lengths

    def update(self, layer: int, k_1GTK: Tensor, v_1GTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values. Return those that attention reads."""
        cache = self.cache
        if layer >= len(cache.keys):
            cache.allocate(layer, k_1GTK)
        for store, new_1GTK in ((cache.keys[layer], k_1GTK), (cache.values[layer], v_1GTK)):
            for slot, row_GTK in zip(self.slots, new_1GTK[0].split(list(self.lengths), dim=1), strict=True):
                store[slot, :, : row_GTK.shape[1]] = row_GTK
                store[slot, :, row_GTK.shape[1] :] = 0
        return k_1GTK, v_1GTK


class Append:
    """View of the cache for tokens that go on one slot's row, after its first `start` columns."""

    def __init__(self, cache: KVCache, slot: int, start: int) -> None:
        self.cache, self.slot, self.start = cache, slot, start

    def update(self, layer: int, k_1GTK: Tensor, v_1GTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values. Return all of the row so far."""
        cache, slot, end = self.cache, self.slot, self.start + k_1GTK.shape[2]
        if layer >= len(cache.keys):
            cache.allocate(layer, k_1GTK)
        keys, values = cache.keys[layer], cache.values[layer]
        keys[slot, :, self.start : end] = k_1GTK[0]
        values[slot, :, self.start : end] = v_1GTK[0]
        return keys[slot : slot + 1, :, :end], values[slot : slot + 1, :, :end]


class Decode:
    """View of the cache for one more token of each of the first n rows, at columns `positions_n`."""

    def __init__(self, cache: KVCache, positions_n: Tensor, columns: int) -> None:
        self.cache, self.positions_n, self.columns = cache, positions_n, columns

    def update(self, layer: int, k_nG1K: Tensor, v_nG1K: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values. Return the first columns of the rows, hidden ones among them."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        positions_n = self.positions_n.to(keys.device, non_blocking=True)
        rows_n = torch.arange(len(k_nG1K), device=keys.device)
        keys[rows_n, :, positions_n] = k_nG1K[:, :, 0]
        values[rows_n, :, positions_n] = v_nG1K[:, :, 0]
        return keys[: len(k_nG1K), :, : self.columns], values[: len(k_nG1K), :, : self.columns]
