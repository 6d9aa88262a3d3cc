"""FSDP2 strategy: full checkpoints in one file, of the trainable tensors only."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ivl.parallel.fsdp import gather, reshard, shard


class Sharded(ModelParallelStrategy):
    """Each process keeps a shard of weights, gradients and optimizer (FSDP2); processes may share layers as well.

    A checkpoint holds whole tensors in the form of every other strategy, so a run goes on under any number of
    processes, or under one.

    Args:
        data_parallel_size: Number of processes that rows and shards are spread over. auto: all, divided by
            tensor_parallel_size.
        tensor_parallel_size: Number of processes that share each layer of the language model, and the same rows.
        process_group_backend: nccl, gloo; by default what suits the device.
        timeout: Longest time that a process waits for the others.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ):
        super().__init__(
            data_parallel_size,
            tensor_parallel_size,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        if self._data_parallel_size == "auto":
            assert self._tensor_parallel_size != "auto", "a number, by the type of the argument"
            self._data_parallel_size = self.num_nodes * self.num_processes // self._tensor_parallel_size
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather the trainable tensors one by one; empty on all but the first process."""
        model, first = self._built(), self.is_global_zero
        reshard(model)
        state = {n: gather(p, first) for n, p in model.named_parameters() if p.requires_grad}
        return state if first else {}

    def _built(self) -> nn.Module:
        assert self.model is not None, "Lightning sets it before it saves or loads"
        return self.model

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # of Lightning's wrapper
        state = optimizer.state_dict()
        first = self.is_global_zero
        gathered = {
            n: {k: gather(v, first) if isinstance(v, Tensor) else v for k, v in values.items()}
            for n, values in state["state"].items()
        }
        return {"state": gathered, "param_groups": state["param_groups"]} if first else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        torch.cuda.empty_cache()
        return self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path), weights_only=weights_only)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        state = checkpoint["state_dict"]
        for name, parameter in self._built().named_parameters():
            if name in state:
                if isinstance(parameter, DTensor):
                    parameter.to_local().copy_(shard(state[name], parameter).to_local())
                else:
                    parameter.copy_(state[name])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            local = {n: {k: _like(v, parameters[n]) for k, v in values.items()} for n, values in state["state"].items()}
            optimizer.load_state_dict({"state": local, "param_groups": state["param_groups"]})


def _like(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return shard(value, parameter)
    return value
