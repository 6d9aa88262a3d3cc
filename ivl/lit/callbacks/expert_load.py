"""Load of the experts of a mixture, for the log of a training.

`experts/busiest`: share of a layer's tokens that its busiest expert took, in the layer where it is largest. With all
experts alike it is experts per token / experts; at 1 every token goes to that one. `experts/unused`: share of all
layers' experts that no token went to. `train/router_aux_loss`: the auxiliary loss, without its coefficient. All since
the last log step, over all processes.

Shapes: L layers with experts, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ivl.model.moe.experts import balancing_loss


class ExpertLoad:
    """Tokens of each expert since the last reading; sums stay on the device until then."""

    def __init__(self) -> None:
        self._tokens_LE: Tensor | None = None
        self._aux = torch.zeros(())
        self._batches = self._per_token = 0

    def add(self, load_L2E: Tensor, per_token: int) -> None:
        """Add a batch, by the `router_load` of its forward. `per_token`: experts of a token."""
        if self._tokens_LE is None:
            self._tokens_LE, self._aux = torch.zeros_like(load_L2E[:, 0]), load_L2E.new_zeros(())
        self._tokens_LE += load_L2E[:, 0]
        self._aux += balancing_loss(load_L2E, per_token)
        self._batches, self._per_token = self._batches + 1, per_token

    def read(self, ranks: int = 1) -> dict[str, float]:
        """Values for the log, over all processes (each must call it); sums start again. Empty without experts."""
        if self._tokens_LE is None:
            return {}
        tokens_LE, aux = self._tokens_LE, self._aux / self._batches
        if ranks > 1:
            torch.distributed.all_reduce(tokens_LE)
            torch.distributed.all_reduce(aux)
        tokens_LE = tokens_LE.cpu()
        total_L = (tokens_LE.sum(1) / self._per_token).clamp(min=1)
        self._tokens_LE, self._batches = None, 0
        return {
            "experts/busiest": float((tokens_LE.amax(1) / total_L).max()),
            "experts/unused": float((tokens_LE == 0).float().mean()),
            "train/router_aux_loss": float(aux) / ranks,
        }
