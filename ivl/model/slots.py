"""A key-value cache whose rows come and go while the others are decoded.

Every row ends at the same column, so a step writes one column for all rows and nothing is moved; what stands before a
short row's first key is hidden. A row that leaves gives its slot to the last one; a row that joins is copied in from
the cache that it was read with. The columns are moved to the front, now and then, when they have run to the end.

Shapes: R slots, H heads of keys, C columns, d width of a head; n rows in use, K columns from the first used one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ivl.model.kv_cache import GrowingCache


class SlotLayer:
    """One layer of `Slots`; only ever given one new token of each row."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None, "rows are added before they are decoded"
        count, begin, end = self.slots.count, self.slots.begin, self.slots.end
        self.keys[:count, :, end] = key_states[:, :, 0]
        self.values[:count, :, end] = value_states[:, :, 0]
        return self.keys[:count, :, begin : end + 1], self.values[:count, :, begin : end + 1]

    def put(self, slot: int, keys_HTd: Tensor, values_HTd: Tensor) -> None:
        """A row into a slot, up to the present end. What stands before it is cleared: hidden keys still meet a
        weight of 0, which does not hide what is not finite."""
        assert self.keys is not None and self.values is not None
        start = self.slots.end - keys_HTd.shape[1]
        for store, given in ((self.keys, keys_HTd), (self.values, values_HTd)):
            store[slot, :, :start] = 0
            store[slot, :, start : self.slots.end] = given

    def move(self, source: int, target: int, start: int) -> None:
        """The row of one slot into another."""
        assert self.keys is not None and self.values is not None
        end = self.slots.end
        self.put(target, self.keys[source, :, start:end], self.values[source, :, start:end])

    def rebuild(self, like: tuple[Tensor, Tensor] | None, rows: int, columns: int, shift: int) -> None:
        """Room for `rows` of `columns`; what is there goes to the front, moved by `shift` columns."""
        begin, end, count = self.slots.begin, self.slots.end, self.slots.count
        for name, given in zip(("keys", "values"), like or (self.keys, self.values)):
            assert given is not None, "the first rebuild is like another cache"
            old = getattr(self, name)
            new_RHCd = given.new_zeros(rows, given.shape[1], columns, given.shape[3])
            if count:
                new_RHCd[:count, :, begin + shift : end + shift] = old[:count, :, begin:end]
            setattr(self, name, new_RHCd)


class Slots:
    """The cache of rows in use, slots 0 to n - 1. Give it to the language model with `positions` and `mask`."""

    def __init__(self, most_rows: int) -> None:
        self.layers: list[SlotLayer] = []
        self.most_rows = most_rows
        self.begin = self.end = 0
        """Columns in use; `end` is the one that the next step writes"""
        self.starts: list[int] = []
        """Of each row, the column of its first key"""
        self._starts_n: Tensor | None = None

    @property
    def count(self) -> int:
        """n"""
        return len(self.starts)

    def add(self, cache: GrowingCache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Take rows of another cache, of these lengths, padded on the right; they get the next slots."""
        if not rows:
            return
        if not self.layers:
            self.layers = [SlotLayer(self) for _ in cache.keys]
        self._reserve(self.count + len(rows), max(lengths), cache)
        for row, length in zip(rows, lengths):
            for layer, keys, values in zip(self.layers, cache.keys, cache.values):
                layer.put(self.count, keys[row, :, :length], values[row, :, :length])
            self.starts.append(self.end - length)
        self._changed()

    def drop(self, slots: Sequence[int]) -> None:
        """Free these slots; each is taken by what is then the last row, as `keep_order` does with a list."""
        for slot in sorted(slots, reverse=True):
            last = self.count - 1
            if slot != last:
                for layer in self.layers:
                    layer.move(last, slot, self.starts[last])
            self.starts[slot] = self.starts[last]
            self.starts.pop()
        self._changed()

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers[layer].update(keys, values)

    def advance(self) -> None:
        """After a step: the column it wrote is in use. Makes room for the next."""
        self.end += 1
        self._reserve(self.count, 0, None)

    def positions(self, device: torch.device) -> Tensor:
        """(n, 1): the position of the next token in its row."""
        if self._starts_n is None or self._starts_n.device != device:
            self._starts_n = torch.tensor(self.starts, device=device)
        return self.end - self._starts_n[:, None]

    def seen(self, device: torch.device, window: int | None) -> Tensor | None:
        """(n, K) bool: the keys that the next token looks at, itself the last; None: all. `window`: how far back."""
        if window is not None and self.end - self.begin < window:
            window = None
        if window is None and min(self.starts) == max(self.starts):
            return None
        columns_K = torch.arange(self.begin, self.end + 1, device=device)
        first_n1 = self.end - self.positions(device)
        if window is not None:
            first_n1 = first_n1.clamp(min=self.end - window + 1)
        return columns_K >= first_n1

    def _changed(self) -> None:
        self.begin = min(self.starts, default=self.end)
        self._starts_n = None

    def _reserve(self, rows: int, longest: int, cache: GrowingCache | None) -> None:
        """Room for the next step, for that many rows, and for a row of `longest` before the present end."""
        store = self.layers[0].keys
        if store is not None and rows <= store.shape[0] and longest <= self.end < store.shape[2]:
            return
        width = max(self.end - self.begin if self.count else 0, longest)
        shift = width - self.end
        slots = store.shape[0] if store is not None and rows <= store.shape[0] else min(2 * rows, self.most_rows)
        # A quarter more columns: moving them costs a few columns' copy a step.
        columns = width + max(32, width // 4)
        for n, layer in enumerate(self.layers):
            given = None if cache is None else (cache.keys[n], cache.values[n])
            layer.rebuild(given, slots, columns, shift)
        self.starts = [start + shift for start in self.starts]
        self.begin, self.end = self.begin + shift, width
        self._starts_n = None


def keep_order(items: list, slots: Sequence[int]) -> None:
    """Take these places out of a list as `Slots.drop` does: the last item fills the gap."""
    for slot in sorted(slots, reverse=True):
        items[slot] = items[-1]
        items.pop()
