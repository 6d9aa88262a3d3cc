"""What Lightning lacks: throughput, sample pictures, the adapter beside each checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from ivl.data.media import load_image
from ivl.lit.pictures import panel
from ivl.model import peft_adapter as adapting
from ivl.types import Batch, Conversation


class Throughput(Callback):
    """Logs tokens/s and samples/s of all ranks, and the fraction of time the loop waited for data."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._tokens = self._rows = 0
        self._waited = 0.0
        self._start = self._end = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._waited += time.perf_counter() - self._end

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._tokens += batch.num_tokens
        self._rows += len(batch)
        self._end = time.perf_counter()
        step = trainer.global_step
        if step and step % trainer.log_every_n_steps == 0 and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            seconds = self._end - self._start
            # Ranks are given equal work, so this rank's rate stands for all.
            module.log_dict(
                {
                    "speed/tokens_per_s": self._tokens * trainer.world_size / seconds,
                    "speed/samples_per_s": self._rows * trainer.world_size / seconds,
                    "speed/data_wait": self._waited / seconds,
                },
                batch_size=1,
            )
            self._tokens = self._rows = 0
            self._waited, self._start = 0.0, self._end

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if hasattr(self, "_start"):  # a validation inside fit is not waiting for training data
            self._tokens = self._rows = 0
            self._waited, self._start = 0.0, time.perf_counter()
            self._end = self._start


class Pictures(Callback):
    """At validation, a picture panel in TensorBoard: image, question, expected and given answer, boxes drawn.

    Args:
        rows: How many rows the panel shows, evenly picked from those answered.
    """

    def __init__(self, rows: int = 8):
        self.rows = rows

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        logger = getattr(trainer.logger, "experiment", None)
        if trainer.sanity_checking or not trainer.is_global_zero or not hasattr(logger, "add_image"):
            return
        shown = [a for a in module.answers if any(m.kind == "image" for m in a["row"].media)]
        if not shown:
            return
        step = max(1, len(shown) // self.rows)
        cells = [(_picture(a["row"]), a["row"], a["answer"]) for a in shown[::step][: self.rows]]
        image = torch.frombuffer(bytearray((drawn := panel(cells)).tobytes()), dtype=torch.uint8)
        logger.add_image("answers", image.view(drawn.height, drawn.width, 3), trainer.global_step, dataformats="HWC")


def _picture(row: Conversation):
    last = [m for m in row.media if m.kind == "image"][-1]
    return load_image(last.source)


class Checkpoints(ModelCheckpoint):
    """Lightning's checkpoint, with the LoRA also written as a PEFT adapter folder (`adapter/`) at the end of fit."""

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and self.dirpath and adapting.has_adapter(module.model):
            folder = Path(self.dirpath).parent / "adapter"
            adapting.save_adapter(module.model, module.tune, folder, base=str(module.pretrained))
            rank_zero_info(f"adapter in {folder}")
