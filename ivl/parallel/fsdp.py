"""FSDP2 and tensor parallelism: each process keeps a shard of every weight.

Groups of weights that are gathered together: each block of the tower, each block of the language model, and the rest:
embeddings, norms, projector and output layer stay in the root's group, since the loss uses the output layer outside
the language model's own forward. A model is built on the meta device, and each process reads its own shards.

The mesh has two dimensions, `data_parallel` and `tensor_parallel`, as Lightning's ModelParallelStrategy makes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from ivl.checkpoint.folder import Checkpoint
from ivl.checkpoint.weights import Files, check, tie
from ivl.finetune import tune as tuning
from ivl.model.attention import choose_kernel
from ivl.model.internvl import InternVL
from ivl.model.parts import ADAPTER
from ivl.options import AttentionKernel, LoRA, Tune
from ivl.parallel.devices import as_dtype
from ivl.types import UserError


def build_sharded(
    name_or_path: str | Path,
    tune: Tune,
    mesh: DeviceMesh,
    device: torch.device,
    dtype: str | torch.dtype = "float32",
    attention: AttentionKernel = "auto",
    efficient: bool = True,
) -> InternVL:
    """Build a model of which this process reads only its shards, tuned as `tune` says.

    Peak memory beside the shards: one tensor. Where a LoRA starts from the weights themselves (DoRA, PiSSA), they are
    read whole first, into the host's memory of each process.
    Raises UserError as `InternVL.from_pretrained` does, and where the weights are stored quantised.
    """
    from ivl.hub import resolve

    loras = [mode for part in tuning.PARTS if isinstance(mode := tune.mode(part), LoRA)]
    if any(lora.dora or lora.init == "pissa" for lora in loras):
        model = InternVL.from_pretrained(name_or_path, dtype, "cpu", attention, efficient=efficient)
        tuning.apply(model, tune)
        parallelize(model, mesh)
        return model
    checkpoint = Checkpoint.open(resolve(name_or_path))
    dtype = as_dtype(dtype)
    kernel = choose_kernel(attention, device, dtype)
    model = InternVL.from_config(checkpoint.config, dtype, "meta", kernel, checkpoint.image_token_id, efficient)
    model.eos_ids = checkpoint.eos_ids
    tie(model)
    groups = check(model, checkpoint.files)
    _apply_unread(model, tune)
    parallelize(model, mesh)
    _read_shards(model, checkpoint.files, groups, device)
    return model


def parallelize(model: InternVL, mesh: DeviceMesh) -> None:
    """Shard a model in place, whether its weights are read or not. Raises UserError where that cannot be done."""
    if any(not p.is_floating_point() for p in model.parameters()):
        raise UserError("trainer.strategy: quantised weights cannot be sharded; leave model.quantize out, or use ddp")
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    if tensor.size() > 1:
        parallelize_module(model.language_model.model, tensor, tensor_plan(model, tensor.size()))
    for block in (*model.vision_model.encoder.layers, *model.language_model.model.layers):
        fully_shard(block, mesh=data)
    fully_shard(model, mesh=data)
    register_fsdp_forward_method(model, "generate")
    # Every process must gather each group as often as the others, also where its own batch has no picture.
    model.always_run_vision = True


def reshard(model: nn.Module) -> None:
    """Free weights that were gathered for a forward, so that parameters are the shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# -- tensor parallel -----------------------------------------------------------------------------------------------

_BY_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_ROWS = ("o_proj", "down_proj")
_FUSED = ("qkv_proj", "gate_up_proj")
"""Fused layers: split by columns and gathered at once, since their outputs are taken apart next"""


def tensor_plan(model: InternVL, size: int) -> dict[str, ParallelStyle]:
    """Return the tensor-parallel style of each linear layer of the language model's blocks.

    Beside a layer split by columns the second matrix of its LoRA is split, beside one split by rows the first.
    Raises UserError where the heads cannot be shared out, or a norm of heads trains.
    """
    language = model.language_model
    heads, fused = language.config.num_key_value_heads, language.config.fused
    if language.config.experts is not None:
        raise UserError(
            "tensor_parallel_size: the experts of a mixture are not split by features; expected 1, and all devices in "
            "data_parallel_size, which splits their weights as well"
        )
    if heads % size:
        raise UserError(f"tensor_parallel_size: {heads} key-value heads cannot be shared by {size}; expected a divisor")
    plan: dict[str, ParallelStyle] = {}
    for name, module in language.model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in ("q_norm", "k_norm") and any(p.requires_grad for p in module.parameters()):
            raise UserError(
                f"tensor_parallel_size: {name} trains, and all processes would need its gradient; freeze it"
            )
        if leaf not in (*_BY_COLUMNS, *_BY_ROWS, *_FUSED):
            continue
        style: ParallelStyle
        if leaf in _BY_ROWS:
            style, half = RowwiseParallel(input_layouts=Replicate()) if fused else RowwiseParallel(), "lora_A"
        else:
            style, half = ColwiseParallel(output_layouts=Replicate()) if fused else ColwiseParallel(), "lora_B"
        if isinstance(module, LoraLayer):
            plan |= {f"{name}.base_layer": style, f"{name}.{half}.{ADAPTER}": style}
        else:
            plan[name] = style
    return plan


# -- shards --------------------------------------------------------------------------------------------------------


def shard(full: Tensor, like: DTensor, device: torch.device | None = None) -> DTensor:
    """Return this process's shard of a full tensor, placed as `like` is; on its device where no other is named."""
    local, mesh = full, like.device_mesh
    for dim in reversed(range(mesh.ndim)):  # FSDP cuts what tensor parallel has left
        if (axis := getattr(like.placements[dim], "dim", None)) is not None:
            parts, rank = local.chunk(mesh.size(dim), axis), mesh.get_local_rank(dim)
            local = parts[rank] if rank < len(parts) else local.narrow(axis, 0, 0)
    copy = torch.empty(local.shape, dtype=like.dtype, device=device or like.to_local().device).copy_(local)
    return DTensor.from_local(copy, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def gather(tensor: Tensor, keep: bool = True) -> Tensor | None:
    """Gather a tensor from all processes, in the host's memory; None where `keep` is False. All must call."""
    tensor = tensor.detach()
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.cpu() if keep else None


def _apply_unread(model: InternVL, tune: Tune) -> None:
    """Apply `tune` on the meta device, where LoRA matrices still get the initial values of any other device.

    peft puts them on the device of the layer beside, so that layer's weight stands in the host's memory meanwhile, as
    one number seen from every place.
    """
    by_part = tuning.modes(model, tune)
    loras = {part: mode for part, mode in by_part.items() if isinstance(mode, LoRA)}
    names = [name for part, lora in loras.items() for name in tuning.target_names(model, part, lora)]
    for name in names:
        linear = cast(nn.Linear, model.get_submodule(name))
        stand_in = torch.zeros((), dtype=linear.weight.dtype).expand(linear.weight.shape)
        linear.weight = nn.Parameter(stand_in, requires_grad=False)
    tuning.apply(model, tune)
    for name in names:
        linear = cast(LoraLayer, model.get_submodule(name)).get_base_layer()
        unread = torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device="meta")
        linear.weight = nn.Parameter(unread, requires_grad=False)


def _read_shards(model: InternVL, files: Files, groups: list, device: torch.device) -> None:
    """Put a checkpoint's weights into a sharded model on the meta device."""
    for name, tensor in files.read(groups, model.config):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module = module.get_base_layer() if isinstance(module, LoraLayer) else module
        parameter = getattr(module, leaf)
        setattr(module, leaf, nn.Parameter(shard(tensor, parameter, device), requires_grad=parameter.requires_grad))
    tie(model)
