"""Types of Lightning's objects for annotations, with the attributes used here."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lightning.pytorch import Callback, LightningModule, Trainer

if TYPE_CHECKING:
    from ivl.lit.datamodule import IvlData
    from ivl.lit.module import LitInternVL


class IvlTrainer(Trainer):
    """Trainer with the attributes that Lightning sets and does not declare; for annotations, never instantiated."""

    datamodule: IvlData
    callbacks: list[Callback]
    log_every_n_steps: int


def as_lit(module: LightningModule) -> LitInternVL:
    """Cast the module of a callback."""
    return cast("LitInternVL", module)
