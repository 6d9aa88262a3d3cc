"""Lightning's objects as this package has them, for annotations: its own classes say less than what it hands over."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lightning.pytorch import Callback, LightningModule, Trainer

if TYPE_CHECKING:
    from ivl.lit.datamodule import IvlData
    from ivl.lit.module import LitInternVL


class IvlTrainer(Trainer):
    """A Trainer with what Lightning sets on it and declares nowhere. Nothing is an instance of it."""

    datamodule: IvlData
    callbacks: list[Callback]
    log_every_n_steps: int


def own(module: LightningModule) -> LitInternVL:
    """The module that a callback is given."""
    return cast("LitInternVL", module)
