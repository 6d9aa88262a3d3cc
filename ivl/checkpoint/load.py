"""Loader of a checkpoint folder into a model, quantised or split over devices on request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ivl.checkpoint import quantization as quant
from ivl.checkpoint.folder import Checkpoint
from ivl.checkpoint.weights import load_weights
from ivl.hub import resolve
from ivl.model.attention import choose_kernel
from ivl.model.parts import ModelParts
from ivl.options import AttentionKernel, Quantize
from ivl.parallel import device_map as splitting
from ivl.parallel.devices import as_dtype, device_of, supported_dtype

Model = TypeVar("Model", bound=ModelParts)


def load_model(
    build: Callable[..., Model],
    name_or_path: str | Path,
    dtype: str | torch.dtype,
    device: str | torch.device,
    attention: AttentionKernel,
    quantize: Quantize | None,
    devices: int | Sequence[str] | None,
    device_max_memory: Sequence[str] | None,
    device_map: str | Path | Mapping[str, str | int] | None,
    needs: splitting.Sizes | None,
    offload: bool,
    efficient: bool,
) -> Model:
    """Load a released checkpoint, in eval mode: a folder, or a name that `ivl.hub` finds.

    `build`: `InternVL.from_config`. `quantize`: 8 or 4 bits for the linear layers of the language model's blocks. A
    checkpoint that is stored in 8 bits stays so, and computes in bfloat16. float32 is taken, with a warning, where the
    device has no `dtype`. `devices`, `device_max_memory`, `device_map`: the model is split over several devices, and
    `device` does not count; see `ivl.parallel.device_map.choose`, also for `needs` and `offload`. `efficient`:
    `ivl.model.efficient`.
    Raises UserError where files are missing or broken, or a tensor is missing, unexpected or of another shape.
    """
    checkpoint = Checkpoint.open(resolve(name_or_path))
    config, files = checkpoint.config, checkpoint.files
    dtype = quant.compute_dtype(files, as_dtype(dtype), quantize)
    placement = None
    if any(option is not None for option in (devices, device_max_memory, device_map)):
        meta_model = build(config, dtype, "meta")
        bits = quant.bits(meta_model, files, quantize)
        placement = splitting.choose(meta_model, devices, device_max_memory, device_map, bits, needs, offload)
    device = placement.main if placement else device_of(device)
    dtype = supported_dtype(dtype, device)
    kernel = choose_kernel(attention, device, dtype)
    model = build(config, dtype, "meta", kernel, checkpoint.image_token_id, efficient)
    model.eos_ids = checkpoint.eos_ids
    if quantize or quant.is_int8(files):
        quant.load_quantized(model, files, placement or device, quantize)
    else:
        load_weights(model, files, placement or device)
    if placement:
        splitting.dispatch(model, placement)
    return model
