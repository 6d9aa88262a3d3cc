"""Reference of preference tuning: the model as training began, without a second copy of it.

With a fresh LoRA it is the same model with the adapter off. An adapter that began as another one (`model.adapter`, or
`init: pissa`) is kept as it was, and put in place for the pass; only the low-rank matrices are held twice. Where more
than a LoRA trains, its log-probabilities are computed before training: `ivl.lit.training.reference_cache`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ivl.finetune.tune import PARTS
from ivl.options import LoRA, Tune
from ivl.types import Batch, UserError

if TYPE_CHECKING:
    from ivl.model.internvl import InternVL


Way = Literal["live", "stored"]


def is_fresh_lora(tune: Tune, adapter: object) -> bool:
    """True if the LoRA changes nothing as training begins, so that the reference is the model without it."""
    return not adapter and not any(isinstance(mode := tune.mode(part), LoRA) and mode.init == "pissa" for part in PARTS)


def reference_way(option: Literal["auto", "live", "stored"], beside_lora: bool, splits: bool, is_fresh: bool) -> Way:
    """Way to the reference's log-probabilities: at each step, or once before training.

    Args:
        option: `model.objective.reference`.
        beside_lora: more than a LoRA trains.
        splits: the strategy splits the model over processes.
        is_fresh: as `is_fresh_lora`; the tensors of another adapter are not swapped in shards.
    """
    if option != "auto":
        return option
    return "stored" if beside_lora or (splits and not is_fresh) else "live"


def trained_beside_lora(model: nn.Module) -> str | None:
    """Name of the first parameter that trains and belongs to no LoRA; None: a LoRA alone trains."""
    return next((n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n), None)


class Reference:
    """Reference pass of a model whose adapter alone trains."""

    def __init__(self, model: InternVL, is_fresh: bool) -> None:
        """`is_fresh`: the adapter changes nothing yet. Raises UserError where more than an adapter trains."""
        if other := trained_beside_lora(model):
            raise UserError(
                f"model.objective.reference: live is the model without its adapter, but {other} trains too; expected "
                "stored (or auto), or model.tune with frozen parts and LoRAs"
            )
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._start = None if is_fresh else {name: p.detach().clone() for name, p in trained.items()}

    @torch.no_grad()
    def row_losses(self, model: InternVL, batch: Batch) -> Tensor:
        """Negative log-likelihood of each row: (rows,)."""
        place = _adapter_off(model) if self._start is None else _swapped(model, self._start)
        with evaluating(model), place:
            losses = model(**batch).row_losses
        assert losses is not None, "a batch to learn from has labels"
        return losses


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, and no noise on embeddings."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _adapter_off(model: nn.Module) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer  # peft takes a second to import

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def _swapped(model: nn.Module, start: dict[str, Tensor]) -> Iterator[None]:
    """The trained tensors as they were; their storage stays, so that optimizers and graphs keep it."""
    parameters = {name: p for name, p in model.named_parameters() if name in start}
    now = {name: p.detach().clone() for name, p in parameters.items()}
    for name, p in parameters.items():
        p.data.copy_(start[name])
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.data.copy_(now[name])
