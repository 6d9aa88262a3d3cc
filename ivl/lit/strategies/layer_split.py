"""Layer split: the layers of one model over several devices, in one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from ivl.estimate.memory import split_sizes
from ivl.estimate.training_step import ShallowModel, TrainSetup
from ivl.lit.training.largest import largest_batch
from ivl.lit.types import RunModule, as_lit, data_of
from ivl.parallel.device_map import Sizes
from ivl.types import UserError


class LayerSplit(SingleDeviceStrategy):
    """One process, one model, its layers on several devices: for a model that is too large for each of them.

    The devices compute in turn, so a step takes as long as on one of them; it is memory that adds up. Batches go to the
    device of vision encoder, projector, embeddings and output layer. Checkpoints are those of one device.

    Args:
        devices: Number of GPUs that share the model, from the first; or their names. Default: all GPUs.
        device_max_memory: Memory limit of each, such as [15GB, 15GB]; without `devices`, it also gives their number.
            Default: the free memory.
        device_map: File (JSON or YAML) from names of modules to devices, instead of a plan.
    """

    def __init__(
        self,
        devices: int | list[str] | None = None,
        device_max_memory: list[str] | None = None,
        device_map: str | None = None,
    ):
        super().__init__()
        if devices is None and device_max_memory is None and device_map is None:
            devices = torch.cuda.device_count()
        self.options = {"devices": devices, "device_max_memory": device_max_memory, "device_map": device_map}

    def setup_environment(self) -> None:
        trainer = as_lit(self.lightning_module).trainer
        count = len(trainer._accelerator_connector._parallel_devices)  # of which Lightning would take the first alone
        if count * trainer.num_nodes > 1:
            raise UserError(
                f"trainer.devices: {count} on {trainer.num_nodes} machines; expected 1, as LayerSplit is one process: "
                "how many devices share the model stands in trainer.strategy.devices"
            )
        if self.options["devices"] == 0:
            raise UserError(
                "trainer.strategy: LayerSplit finds no GPU here; expected two or more, or names of devices in "
                "trainer.strategy.devices"
            )

    def load_options(self, module: RunModule) -> dict[str, Any]:
        """Options of `InternVL.from_pretrained` for this strategy. Trainable weights are not offloaded to the host."""
        planned = module.trainer.training and self.options["device_map"] is None
        needs = training_sizes(module) if planned else None
        return self.options | {"needs": needs, "offload": False, "efficient": module.efficient}

    def model_to_device(self) -> None:
        """Set the root device for the batches; each layer is on its device already."""
        assert self.accelerator is not None
        module: Any = self.lightning_module
        self._root_device = as_lit(module).model.device
        self.accelerator.setup_device(self._root_device)
        module._device = self._root_device  # as Lightning's FSDP does

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load each state on the device of its parameter; Lightning would move all of them to one."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            optimizer.load_state_dict(state)

    def teardown(self) -> None:
        """Leave the model on its devices; Lightning would move it to the host, where it may not fit."""
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()


def training_sizes(module: RunModule) -> Sizes:
    """Estimate the memory of each part of a model in a training step on the largest batch of the run."""
    trainer = module.trainer
    if (data := data_of(trainer)) is None:
        raise UserError(
            "LayerSplit: plans layers by the lengths of the rows of IvlData, found a loader; give its device_map"
        )
    setup = TrainSetup(
        tune=module.tune,
        precision=str(trainer.precision),
        quantize=module.quantize,
        vision_checkpointing=module.checkpointing.vision_model,
        language_checkpointing=module.checkpointing.language_model,
        attention="eager" if module.attention == "eager" else "sdpa",
        efficient=module.efficient,
        optimizer=type(module.make_optimizer([nn.Parameter(torch.zeros(1))])).__name__,
        accumulate=trainer.accumulate_grad_batches,
        strategy="layer_split",
    )
    sketch = ShallowModel(data.processor.config, setup)
    return split_sizes(sketch, sketch.activations(largest_batch(data)))
