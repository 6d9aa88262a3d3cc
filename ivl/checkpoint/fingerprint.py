"""Fingerprint of weights: equal for equal tensors on any device, changed by a training step."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 24
"""Bytes of a tensor that are hashed in one piece, and are in the host's memory at a time for each thread"""
_END = 1 << 20
"""Bytes at either end of a file of weights that are read for a fingerprint of files"""


@torch.no_grad()
def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return 16 hexadecimal digits of named tensors, in any order: a SHA-256 over names, types, shapes and bytes.

    Quantised weights count as they are stored, with their scales. A tensor split over processes is gathered: all must
    call. A tensor with several names is read once.
    """
    read: dict[Any, tuple[Tensor, str]] = {}
    lines = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing leaves the interpreter to others
        for name, tensor in tensors:
            if hasattr(tensor, "full_tensor"):
                digest = _digest(tensor.full_tensor(), threads)
            else:
                place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
                if place not in read:  # held meanwhile, so that no other tensor can come to stand there
                    read[place] = tensor, _digest(tensor, threads)
                digest = read[place][1]
            lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def _digest(tensor: Tensor, threads: Executor) -> str:
    """SHA-256 over the digests of the blocks of a tensor's bytes."""
    blocks = tensor.detach().contiguous().flatten().view(torch.uint8).split(BLOCK)
    total = hashlib.sha256()
    for digest in threads.map(lambda block: hashlib.sha256(block.cpu().numpy().data).digest(), blocks):
        total.update(digest)
    return total.hexdigest()


def files_fingerprint(folder: Path) -> str:
    """Return 32 hexadecimal digits of a checkpoint folder: its configs, and size, first and last MiB of its weights.

    Weights are not read whole: they are large, and training changes all of a file.
    """
    total = hashlib.blake2b(digest_size=16)
    for file in [*sorted(folder.glob("*config.json")), *sorted(folder.glob("*.safetensors"))]:
        size = file.stat().st_size
        total.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as content:
            total.update(content.read(_END))
            if size > _END:
                content.seek(max(_END, size - _END))
                total.update(content.read(_END))
    return total.hexdigest()
