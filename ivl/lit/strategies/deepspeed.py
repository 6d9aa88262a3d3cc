"""What DeepSpeed's ZeRO needs of a run, under Lightning's own strategy for it.

The third stage splits every module as it is made, so weights could not be read into it: the model is made whole, and
split when the engine takes it. Its checkpoints are folders for it alone, so a run also leaves its weights in a file.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import Tensor, nn

from ivl.types import WEIGHTS, UserError


def is_zero(strategy: Strategy, stage: int | None = None) -> bool:
    """Whether DeepSpeed trains; `stage` 3: and splits the weights as well."""
    return isinstance(strategy, DeepSpeedStrategy) and (stage != 3 or strategy.zero_stage_3)


def check_installed(strategy: Any) -> None:
    """Raise UserError where an option asks for DeepSpeed and its package is missing.

    `strategy`: a name, or what the command line made of a class and its arguments.
    """
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
    if "deepspeed" in str(name).lower() and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"trainer.strategy {name.rpartition('.')[2]}: the package deepspeed is not installed; pip install "
            f"'ivl[deepspeed]', or take --config strategy/fsdp2, which needs none"
        )


@contextmanager
def made_whole(strategy: Strategy) -> Iterator[None]:
    """Around the making of a model whose modules the third stage would split one by one."""
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
    """What trains, whole and in float32 whatever the engine computes in. All processes call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            full = safe_get_full_fp32_param(p)
            state[f"model.{name}"] = (p if full is None else full).detach().cpu()
    return state


def weights(trainer: Trainer, state: dict[str, Tensor], pretrained: str) -> dict[str, Any]:
    """A checkpoint for all commands but `fit`."""
    return {
        "pytorch-lightning_version": lightning.__version__,
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "state_dict": state,
        "pretrained": pretrained,
    }


def weights_beside(checkpoint: str | Path) -> str:
    """Of a checkpoint that is DeepSpeed's folder, the file of weights that the run has left; else itself."""
    path = Path(checkpoint)
    return str(path.with_name(WEIGHTS)) if path.is_dir() else str(checkpoint)
