"""DeepSpeed ZeRO under Lightning's strategy: model construction, trained weights, their file.

Stage 3 partitions every module at construction, so weights could not be read into it: the model is built in full, and
partitioned by the engine. Its checkpoints are folders for DeepSpeed alone, so a run also writes a file of weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import Tensor, nn

from ivl.run import WEIGHTS
from ivl.types import UserError


def is_zero(strategy: Strategy, stage: int | None = None) -> bool:
    """Return true for a DeepSpeed strategy; with `stage` 3, only where it partitions the weights as well."""
    return isinstance(strategy, DeepSpeedStrategy) and (stage != 3 or strategy.zero_stage_3)


def micro_batch_mean(trainer: Trainer, loss_sum: Tensor, weight_sum: Tensor) -> Tensor:
    """Mean of a micro-batch over what all processes learn from in it: DeepSpeed keeps gradients to itself."""
    weight = trainer.strategy.reduce(weight_sum.clone(), reduce_op="sum")
    return loss_sum * trainer.world_size / torch.where(weight > 0, weight, 1.0)


def check_installed(strategy: Any) -> None:
    """Raise UserError where an option asks for DeepSpeed and its package is missing.

    `strategy`: a name, or the parsed class and arguments.
    """
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
    if "deepspeed" in str(name).lower() and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"trainer.strategy {name.rpartition('.')[2]}: the package deepspeed is not installed; pip install "
            f"'ivl[deepspeed]', or take --config strategy/fsdp2, which needs none"
        )


@contextmanager
def unpartitioned_init(strategy: Strategy) -> Iterator[None]:
    """Build a model inside this context in full, without stage 3's partitioning of each module."""
    if not is_zero(strategy, 3):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Gather the trainable tensors in full, in float32. All processes call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            full = safe_get_full_fp32_param(p)
            state[f"model.{name}"] = (p if full is None else full).detach().cpu()
    return state


def weights(trainer: Trainer, state: dict[str, Tensor], pretrained: str) -> dict[str, Any]:
    """Return a checkpoint for all commands but `fit`."""
    return {
        "pytorch-lightning_version": lightning.__version__,
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "state_dict": state,
        "pretrained": pretrained,
    }


def weights_beside(checkpoint: str | Path) -> str:
    """Return the file of weights beside a DeepSpeed folder; any other checkpoint is returned as it is."""
    path = Path(checkpoint)
    return str(path.with_name(WEIGHTS)) if path.is_dir() else str(checkpoint)
