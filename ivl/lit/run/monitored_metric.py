"""Monitored metrics of checkpoints and early stopping, checked before the first step."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from ivl.finetune.objectives import HELD_OUT, MEASURES
from ivl.lit.metrics import CAPTIONS, Metric, score
from ivl.lit.types import as_lit, data_of
from ivl.types import UserError, first_few

ALWAYS = ("epoch", "step", "train/loss", "train/grad_norm")
SPEED = ("speed/tokens_per_s", "speed/samples_per_s", "speed/data_wait", "speed/mfu")
OPEN = ("lr/", "memory/", "train/loss/")
"""Prefixes of names that depend on the optimizer, the devices and the sources of rows: see `check_open_monitors`"""


def best_mode(monitor: str | None) -> str:
    """Return the default mode of a monitor: max of a score, min of anything else."""
    best_high = (*get_args(Metric), "accuracy", "margin")
    return "max" if monitor and monitor.rpartition("/")[2] in best_high else "min"


def check_monitors(trainer: Trainer, module: LightningModule) -> None:
    """Raise UserError where a callback monitors a metric that this run does not log."""
    callbacks = _monitoring(trainer)
    names = logged_names(trainer, module) if callbacks else []
    for callback in callbacks:
        monitor, stops = str(callback.monitor), isinstance(callback, EarlyStopping)
        if "val/" in monitor and callback.mode != best_mode(monitor):
            name = "EarlyStopping" if stops else "checkpoint"
            raise UserError(f"{name}: monitor {monitor}: expected mode {best_mode(monitor)}, found {callback.mode}")
        if monitor in names or monitor.startswith(OPEN):
            continue
        near = difflib.get_close_matches(monitor.replace("_", "/").replace("eval/", "val/"), names, 1)
        hint = f"; {near[0]} is the nearest" if near else ""
        held_out = any(name.startswith("val/") for name in names)
        why = "" if held_out else "; numbers of held-out rows need data.val or data.val_fraction"
        raise UserError(
            f"{_option(callback)}: no such number is logged; expected one of {first_few(names, 16)}{hint}{why}"
        )


def check_open_monitors(trainer: Trainer) -> None:
    """Check monitors of rates, memory and speed, whose names are known once the optimizer exists."""
    rates = [f"lr/{group.get('name', n)}" for n, group in enumerate(trainer.optimizers[0].param_groups)]
    gpus = trainer.strategy.root_device.type == "cuda"
    for callback in _monitoring(trainer):
        monitor, names = str(callback.monitor), None
        if monitor.startswith("lr/"):
            names = rates
        elif monitor.startswith("memory/") and not (gpus and monitor.startswith("memory/device")):
            names = ["memory/process_gib"] + ["memory/device_gib"] * gpus
        elif monitor == "speed/mfu" and not gpus:
            names = [name for name in SPEED if name != "speed/mfu"]
        if names is not None and monitor not in names:
            raise UserError(
                f"{_option(callback)}: no such number is logged here; expected one of {first_few(names, 16)}"
            )


def _monitoring(trainer: Trainer) -> list[Any]:
    """Callbacks with a monitor; none where loaders or callbacks of the user may bring further metrics."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if data_of(trainer) is None or any(
        not type(callback).__module__.startswith(("ivl.", "lightning.")) for callback in callbacks
    ):
        return []
    kinds = (ModelCheckpoint, EarlyStopping)
    return [c for c in callbacks if isinstance(c, kinds) and c.monitor is not None]


def _option(callback: Any) -> str:
    option = "EarlyStopping's monitor" if isinstance(callback, EarlyStopping) else "checkpoint.monitor"
    return f"{option} {callback.monitor or repr(callback.monitor)}"


def logged_names(trainer: Trainer, module: LightningModule) -> list[str]:
    """Names of the metrics that a run logs, those of its held-out rows first."""
    measures = MEASURES if as_lit(module).learns_pairs else ()
    return [*_held_out(trainer, module), *ALWAYS, *SPEED, *(f"train/{name}" for name in measures)]


def _held_out(trainer: Trainer, module: LightningModule) -> list[str]:
    data, metrics = data_of(trainer), as_lit(module).metrics
    if data is None or not data.options.holds_out or not trainer.limit_val_batches:
        return []
    keys: dict[str, None] = {"val/loss": None}
    keys |= {f"val/{name}": None for name in HELD_OUT if as_lit(module).learns_pairs}
    rows = data.rows("val")
    for index in range(len(rows)):
        row = rows.conversation(index).as_prompt()
        captions = [name for name in metrics if name in CAPTIONS and row.reference is not None]
        names = ["loss", *score(row, "", metrics), *captions]
        keys |= {f"val/{name}": None for name in names}
        keys |= {f"val/{row.source or 'rows'}/{name}": None for name in names}
    return list(keys)
