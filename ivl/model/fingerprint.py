"""What weights are, in a few letters: the same for equal tensors on any device, another after any training step.

A sum, not a cryptographic hash: it runs where the tensors are, at the speed they are read, and tells apart what was
trained, merged or quantised; it is no defence against someone who forges weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 22
_ODD = 0x2545F4914F6CDD1D
"""Multiplier that spreads a word's bits over 64"""


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hexadecimal digits of named tensors, in any order. A tensor split over processes is gathered."""
    lines = sorted(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_sum(tensor):016x}" for name, tensor in tensors)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@torch.no_grad()
def _sum(tensor: Tensor) -> int:
    """Sum over positions of (bits + 1) times a number of the position, modulo 2**64: exact, so the order is free."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    flat = tensor.detach().contiguous().flatten()
    words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].long()
        place = torch.arange(start + 1, start + 1 + len(part), device=part.device) * _ODD
        total += ((part + 1) * (place ^ (place >> 29))).sum()
    return int(total) & (2**64 - 1)
