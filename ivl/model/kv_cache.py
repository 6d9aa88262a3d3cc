"""A key-value cache that grows by concatenation, for prompts and for rows that go on together.

Shapes: B rows, G heads of keys and values, T tokens of this call, S keys, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class GrowingCache:
    """Keys and values of all layers; `ivl.model.decoder.KVCache`."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        """Of each layer: (B, G, S, K)"""
        self.values: list[Tensor] = []

    def update(self, layer: int, keys_BGTK: Tensor, values_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.keys):
            self.keys.append(keys_BGTK)
            self.values.append(values_BGTK)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], keys_BGTK], dim=2)
            self.values[layer] = torch.cat([self.values[layer], values_BGTK], dim=2)
        return self.keys[layer], self.values[layer]

    def crop(self, length: int) -> None:
        """Keep the first keys only."""
        self.keys = [k[:, :, :length] for k in self.keys]
        self.values = [v[:, :, :length] for v in self.values]

    def select(self, rows: Sequence[int]) -> None:
        """Make these rows the rows, in this order; one may be taken several times."""
        self.keys = [k[torch.tensor(rows, device=k.device)] for k in self.keys]
        self.values = [v[torch.tensor(rows, device=v.device)] for v in self.values]
