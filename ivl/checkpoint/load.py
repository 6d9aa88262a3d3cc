"""Loader of a checkpoint folder into a model, quantised or split over devices on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ivl.checkpoint import quantization as quant
from ivl.checkpoint.folder import Checkpoint
from ivl.checkpoint.quantization import Quantize
from ivl.checkpoint.weights import load_weights
from ivl.hub import resolve
from ivl.model.attention import AttentionKernel, choose_kernel
from ivl.model.internvl import InternVL
from ivl.parallel import device_map as splitting


def load_model(
    kind: type[InternVL],
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
) -> InternVL:
    """`InternVL.from_pretrained`, whose options these are."""
    checkpoint = Checkpoint.open(resolve(name_or_path))
    config, files = checkpoint.config, checkpoint.files
    dtype = quant.compute_dtype(files, splitting.as_dtype(dtype), quantize)
    placement = None
    if any(option is not None for option in (devices, device_max_memory, device_map)):
        meta_model = kind.from_config(config, dtype, "meta")
        bits = quant.bits(meta_model, files, quantize)
        placement = splitting.choose(meta_model, devices, device_max_memory, device_map, bits, needs, offload)
    device = placement.main if placement else splitting.device_of(device)
    dtype = splitting.supported_dtype(dtype, device)
    kernel = choose_kernel(attention, device, dtype)
    model = kind.from_config(config, dtype, "meta", kernel, checkpoint.image_token_id, efficient)
    model.eos_ids = checkpoint.eos_ids
    if quantize or quant.is_int8(files):
        quant.load_quantized(model, files, placement or device, quantize)
    else:
        load_weights(model, files, placement or device)
    if placement:
        splitting.dispatch(model, placement)
    return model
