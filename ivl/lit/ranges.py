"""Ranges of options that are numbers: one outside of its range is refused before anything is made."""

from __future__ import annotations

from jsonargparse import Namespace

from ivl.finetune.tune import PARTS
from ivl.types import UserError

UNLIMITED = float("inf")
RANGES: dict[str, tuple[float, float]] = {
    "threads": (1, UNLIMITED),
    "data.batch_size": (1, UNLIMITED),
    "data.eval_batch_size": (1, UNLIMITED),
    "data.pack_tokens": (1, UNLIMITED),
    "data.pack_tiles": (1, UNLIMITED),
    "data.max_prompt_length": (1, UNLIMITED),
    "data.max_bad": (0, 1),
    "data.feature_cache_gb": (0, UNLIMITED),
    "data.num_workers": (0, UNLIMITED),
    "model.router_aux_loss": (0, UNLIMITED),
    "model.label_smoothing": (0, 1),
    "model.neftune": (0, UNLIMITED),
    "model.generation.max_new_tokens": (1, UNLIMITED),
    "model.answer_rows": (0, UNLIMITED),
    "model.stop_after_bad": (1, UNLIMITED),
    "trainer.accumulate_grad_batches": (1, UNLIMITED),
    "trainer.gradient_clip_val": (0, UNLIMITED),
    "trainer.log_every_n_steps": (1, UNLIMITED),
}
"""Option → its least and greatest value; null where an option may be unset"""

OF_PARTS: dict[str, tuple[float, float]] = {
    "model.rates.PART.lr": (0, UNLIMITED),
    "model.rates.PART.weight_decay": (0, UNLIMITED),
    "model.tune.PART.rank": (1, UNLIMITED),
    "model.tune.PART.dropout": (0, 1),
}
"""The same of options that each part of the model has"""


def check_ranges(config: Namespace) -> None:
    """Raise UserError where an option is outside of its range."""
    of_parts = {option.replace("PART", part): limits for option, limits in OF_PARTS.items() for part in PARTS}
    for option, (least, greatest) in (RANGES | of_parts).items():
        value = _value(config, option)
        if isinstance(value, (int, float)) and not least <= value <= greatest:
            expected = f"at least {least}" if greatest == UNLIMITED else f"{least} to {greatest}"
            raise UserError(f"--{option}: expected {expected}, found {value}")


def _value(config: Namespace, option: str) -> object:
    value: object = config
    for name in option.split("."):
        value = value.get(name) if isinstance(value, (Namespace, dict)) else None
    return value
