"""Devices, dtypes and sizes by name: those of this machine, and those that a device computes in."""

from __future__ import annotations

import re
import warnings
from functools import lru_cache

import torch
import torch.nn.functional as F

from ivl.model.parts import ModelParts
from ivl.types import UserError


def device_of(name: str | torch.device) -> torch.device:
    """Return a device by its name. Raises UserError where there is none of that name on this machine."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: expected cpu, cuda, cuda:1 and so on, found {str(name)!r}") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"device: {name} is not on this machine ({reason}); leave it out, or give cpu") from error
    return device


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """`bfloat16` → torch.bfloat16. Raises UserError for a name that is not a floating type."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype: expected float32, bfloat16 or float16, found {name!r}")
    return dtype


def supported_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """`dtype`, or float32 with a warning where the device does not compute in it."""
    device = torch.device(device)
    if dtype == torch.float32 or device.type == "meta" or _computes(dtype, device):
        return dtype
    name = str(dtype).removeprefix("torch.")
    also = "; float16 is the other choice" if device.type == "cuda" and dtype == torch.bfloat16 else ""
    warnings.warn(f"{device} does not compute in {name}: float32 is taken, in twice the memory{also}", stacklevel=3)
    return torch.float32


@lru_cache
def _computes(dtype: torch.dtype, device: torch.device) -> bool:
    """True if the model's operations run. Before compute capability 8, bfloat16 is emulated, many times slower."""
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        x = torch.zeros(1, 1, 16, 16, dtype=dtype, device=device)
        F.conv2d(F.layer_norm(F.gelu(x @ x), (16,)), x)
        F.scaled_dot_product_attention(x, x, x)
    except (RuntimeError, TypeError):
        return False
    return True


def parse_size(text: str, option: str) -> int:
    """`15GB` → bytes. Raises UserError that names the option."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise UserError(f"--{option}: expected a size such as 5GB or 800MB, found {text!r}")
    return size


def check_at_hand(model: ModelParts) -> None:
    """Raise UserError where a part stays in the host's memory: what would be added to it is not computed."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            "a part of the model stays in the host's memory, and no LoRA can be put on that; merge it first "
            "(python -m ivl export), or use more devices"
        )
