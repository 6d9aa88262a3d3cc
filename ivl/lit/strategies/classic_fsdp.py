"""Classic FSDP under Lightning's strategy: the norm of its gradients."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor


def shards_norm(strategy: Strategy) -> Tensor | None:
    """Norm of all gradients under classic FSDP, whose shards do not give it; None under any other strategy."""
    if not isinstance(strategy, FSDPStrategy):
        return None
    wrapped: Any = strategy.model
    return wrapped.clip_grad_norm_(float("inf"))
