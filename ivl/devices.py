"""What makers say their devices do: the ceiling that model FLOP utilisation is measured against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A row of a data sheet. Real rates are below it."""

    name: str
    flops: float
    """Dense bfloat16 matrix products (float16 where it has no bfloat16), operations per second"""
    memory: float
    """Bytes"""
    bandwidth: float
    """Of its memory, bytes per second"""
    bf16: bool = True


def _device(name: str, tflops: float, gib: float, gb_per_s: float, bf16: bool = True) -> Device:
    return Device(name, tflops * 1e12, gib * 2**30, gb_per_s * 1e9, bf16)


# Makers' data sheets, without sparsity. For the GeForce and workstation cards: the rate with float32 accumulation, from
# the white papers of their architectures (GA102, AD102, GB202).
DEVICES: dict[str, Device] = {
    row.name: row
    for row in (
        _device("B200", 2250, 180, 8000),
        _device("H200", 989.4, 141, 4800),
        _device("H100-80GB", 989.4, 80, 3350),
        _device("H100-PCIe", 756, 80, 2000),
        _device("H800-80GB", 989.4, 80, 3350),
        _device("H20", 148, 96, 4000),
        _device("A100-80GB", 312, 80, 2039),
        _device("A100-40GB", 312, 40, 1555),
        _device("A800-80GB", 312, 80, 2039),
        _device("A40", 149.7, 48, 696),
        _device("A10", 125, 24, 600),
        _device("A30", 165, 24, 933),
        _device("L40S", 362, 48, 864),
        _device("L40", 181, 48, 864),
        _device("L4", 121, 24, 300),
        _device("RTX-6000-Ada", 364.2, 48, 960),
        _device("RTX-A6000", 154.8, 48, 768),
        _device("RTX-5090", 209.5, 32, 1792),
        _device("RTX-4090", 165.2, 24, 1008),
        _device("RTX-3090", 71, 24, 936),
        _device("V100-32GB", 125, 32, 900, bf16=False),
        _device("V100-16GB", 125, 16, 900, bf16=False),
        _device("T4", 65, 16, 320, bf16=False),
        _device("MI300X", 1307.4, 192, 5300),
        _device("MI250X", 383, 128, 3277),
    )
}


def find_device(name: str) -> Device | None:
    """The device a name means: a row's (`H100` too), or what a driver reports (`NVIDIA A100-SXM4-80GB`); else None."""
    words = _words(name)
    known = [row for row in DEVICES.values() if _words(row.name) <= words]
    if known:
        return max(known, key=lambda row: len(_words(row.name)))
    return next((row for row in DEVICES.values() if words and words <= _words(row.name)), None)


def _words(name: str) -> frozenset[str]:
    text = name.upper().replace("-", " ").replace("_", " ").replace(" GB", "GB")
    return frozenset(text.split())
