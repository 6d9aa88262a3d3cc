"""Data sheets of devices, the ceiling of MFU, and the row that memory is estimated for."""

from __future__ import annotations

from dataclasses import dataclass

CONTEXT = 1_000_000_000
"""Bytes of a GPU beside all that is counted: CUDA context, kernels' workspaces, the allocator's slack"""

TOKENS, TILES = 4096, 13
"""Row that memory is estimated for: a conversation of this length, an image of twelve tiles and its thumbnail"""


@dataclass(frozen=True)
class Device:
    """A row of a data sheet. Real rates are below it."""

    name: str
    flops: float
    """Dense bfloat16 matrix products (float16 where it has no bfloat16), operations per second"""
    memory: float
    """Bytes"""
    bf16: bool = True


def _device(name: str, tflops: float, gib: float, bf16: bool = True) -> Device:
    return Device(name, tflops * 1e12, gib * 2**30, bf16)


# Makers' data sheets, without sparsity. Lightning's table (`lightning.fabric.utilities.throughput`) has no memory, and
# mixes kinds of rates: H200 with sparsity, RTX 4090, 3090, A6000 and A40 without tensor cores, L40S taken for an L4.
# For the GeForce and workstation cards: the rate with float32 accumulation, from the white papers of GA102, AD102 and
# GB202.
DEVICES: dict[str, Device] = {
    row.name: row
    for row in (
        _device("B200", 2250, 180),
        _device("H200", 989.4, 141),
        _device("H100-80GB", 989.4, 80),
        _device("H100-PCIe", 756, 80),
        _device("H800-80GB", 989.4, 80),
        _device("H20", 148, 96),
        _device("A100-80GB", 312, 80),
        _device("A100-40GB", 312, 40),
        _device("A800-80GB", 312, 80),
        _device("A40", 149.7, 48),
        _device("A10", 125, 24),
        _device("A30", 165, 24),
        _device("L40S", 362, 48),
        _device("L40", 181, 48),
        _device("L4", 121, 24),
        _device("RTX-6000-Ada", 364.2, 48),
        _device("RTX-A6000", 154.8, 48),
        _device("RTX-5090", 209.5, 32),
        _device("RTX-4090", 165.2, 24),
        _device("RTX-3090", 71, 24),
        _device("V100-32GB", 125, 32, bf16=False),
        _device("V100-16GB", 125, 16, bf16=False),
        _device("T4", 65, 16, bf16=False),
        _device("MI300X", 1307.4, 192),
        _device("MI250X", 383, 128),
    )
}


def find_device(name: str) -> Device | None:
    """Find a device by the name in its data sheet (`H100` too) or its driver (`NVIDIA A100-SXM4-80GB`); else None."""
    words = _words(name)
    known = [row for row in DEVICES.values() if _words(row.name) <= words]
    if known:
        return max(known, key=lambda row: len(_words(row.name)))
    return next((row for row in DEVICES.values() if words and words <= _words(row.name)), None)


def _words(name: str) -> frozenset[str]:
    text = name.upper().replace("-", " ").replace("_", " ").replace(" GB", "GB")
    return frozenset(text.split())
