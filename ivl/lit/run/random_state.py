"""State of a process's random generators, for an exact resume."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """State of this process's random generators: torch, CUDA, numpy, python; plain values and tensors only."""
    numbers: Any = np.random.get_state()
    kind, keys, *rest = numbers
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def state_of_rank(states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    """Return the saved state of a process; that of the first where fewer processes saved one."""
    return states[rank if rank < len(states) else 0]


def set_random_state(states: list[dict[str, Any]], rank: int) -> None:
    """Restore the random generators of a process."""
    state = state_of_rank(states, rank)
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
