"""Loading of the model of a run: what trains set up, and distributed as the strategy needs it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ivl.finetune import tune as tuning
from ivl.finetune.adapter import peft_adapter as adapting
from ivl.finetune.adapter.adapter_training import continue_adapter
from ivl.hub import resolve_adapter
from ivl.lit.strategies.deepspeed import is_zero, unpartitioned_init
from ivl.lit.strategies.layer_split import LayerSplit
from ivl.lit.strategies.precision import weight_dtype
from ivl.lit.types import RunModule
from ivl.model.efficient.compile import compile_layers
from ivl.model.internvl import InternVL
from ivl.parallel.device_map import DeviceMap
from ivl.types import UserError


def load_model(lit: RunModule) -> InternVL:
    """Return the model of a run. Sets `lit.tune` to that of an adapter whose training goes on."""
    trainer = lit.trainer
    if trainer.predicting:
        check_predicts(trainer.strategy)
    with unpartitioned_init(trainer.strategy):
        model = _distributed(lit, trainer.strategy)
    model.set_checkpointing(lit.checkpointing.vision_model, lit.checkpointing.language_model)
    if (device_map := getattr(model, "hf_device_map", None)) is not None:
        rank_zero_info(f"layers over devices: {DeviceMap(device_map)}")
    if trainer.training:
        rank_zero_info(f"{lit.pretrained}\n{tuning.table(model)}")
        if lit.compiled:
            compile_layers(model)
    return model


def _distributed(lit: RunModule, strategy: Strategy) -> InternVL:
    dtype = weight_dtype(lit.dtype_name, str(lit.trainer.precision))
    mesh = strategy.device_mesh if isinstance(strategy, ModelParallelStrategy) else None
    if mesh is not None:
        from ivl.parallel.fsdp import build_sharded, parallelize  # peft takes seconds to import
    if mesh is not None and not lit.adapter and not lit.quantize:
        settings = strategy.root_device, dtype, lit.attention, lit.efficient
        return build_sharded(lit.pretrained, lit.tune, mesh, *settings)
    # A model that each process holds in full is read straight onto its device; a sharded one onto the host first.
    replicated = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not is_zero(strategy, 3)
    options: dict[str, Any] = {"efficient": lit.efficient, "device": strategy.root_device if replicated else "cpu"}
    options = strategy.load_options(lit) if isinstance(strategy, LayerSplit) else options
    model = InternVL.from_pretrained(lit.pretrained, dtype, attention=lit.attention, quantize=lit.quantize, **options)
    _set_up_training(lit, model)
    if mesh is not None:
        parallelize(model, mesh)
    elif not replicated:  # Lightning shards it, or DeepSpeed does
        model.always_run_vision = True
    return model


def _set_up_training(lit: RunModule, model: InternVL) -> None:
    folder = resolve_adapter(lit.adapter) if lit.adapter else None
    if folder and (lit.trainer.training or (lit.learns_pairs and not lit.trainer.predicting)):
        lit.tune = continue_adapter(model, folder, lit.pretrained, lit.tune)
    elif folder:
        adapting.load_adapter(model, folder)
        if note := adapting.other_base(folder, lit.pretrained):
            rank_zero_info(note)
    else:
        tuning.apply(model, lit.tune)


def check_predicts(strategy: Strategy) -> None:
    """Raise UserError for a strategy that splits the model over processes, as each answers rows of its own."""
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise UserError(
            f"predict: {type(strategy).__name__} splits the model, but each process answers rows of its own and "
            f"needs all of it; use --trainer.strategy auto, or model.quantize where memory does not suffice"
        )
