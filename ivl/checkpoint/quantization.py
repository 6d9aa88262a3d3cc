"""Quantised linear layers: inference, or a LoRA's frozen base; 8 or 4 bits by bitsandbytes, FP8 by torch alone.

Two ways in: a release stored in 8 bits (int8 weights with the scales of their rows, as bitsandbytes writes them), and
any other one quantised while it is loaded: then only the linear layers of the language model's blocks, experts too
(`ivl.checkpoint.quantized_experts`); the tower, the projector, routers and the output layer stay as they are.

Sources: LLM.int8 (https://arxiv.org/abs/2208.07339), NF4 (https://arxiv.org/abs/2305.14314).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ivl.checkpoint.fp8_linear import FP8Linear
from ivl.checkpoint.layouts import groups, layout_of
from ivl.checkpoint.quantized_experts import QuantizedExperts
from ivl.checkpoint.weights import Files, Where, check, device_of, place, tie
from ivl.model.moe.experts import GroupedLinear
from ivl.model.parts import ModelParts
from ivl.options import Quantize
from ivl.types import UserError

T = TypeVar("T")

SCALES, FORMAT = "SCB", "weight_format"
"""Names that bitsandbytes stores beside an int8 weight: the largest magnitude of each row, the order of its numbers"""


def is_int8(files: Files) -> bool:
    """True if a checkpoint is stored in 8 bits."""
    return "I8" in files.dtypes.values()


def compute_dtype(files: Files, dtype: torch.dtype, quantize: str | None) -> torch.dtype:
    """Return the compute dtype: bfloat16 for a release in 8 bits, else `dtype`. Raises UserError for bad options."""
    if quantize is not None and quantize not in get_args(Quantize):
        raise UserError(f"quantize: expected one of {', '.join(get_args(Quantize))}, found {quantize!r}")
    if not is_int8(files):
        return dtype
    if quantize in ("nf4", "fp8"):
        kind = "4" if quantize == "nf4" else "FP8"
        raise UserError(
            f"{files.folder}: stored in 8 bits, it cannot be loaded in {kind}; use the release it was made from"
        )
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        warnings.warn(f"{files.folder}: stored in 8 bits, so it computes in bfloat16, not in {name}", stacklevel=3)
    return torch.bfloat16


def load_quantized(model: ModelParts, files: Files, device: Where, quantize: Quantize | None) -> None:
    """Load weights as `load_weights` does, quantised, into a model on the meta device; None: as in the files."""
    bnb = None if quantize == "fp8" else _bitsandbytes()
    linears = {n: module for n, module in model.named_modules() if isinstance(module, (nn.Linear, GroupedLinear))}
    stored, quantized = is_int8(files), bits(model, files, quantize).keys()
    scales = {
        f"{name}.{SCALES}": torch.empty(linears[name].out_features, device="meta") for name in quantized if stored
    }
    pending: dict[str, dict[str, Tensor]] = {}
    for name, tensor in files.read(check(model, _without_formats(files), scales), model.config):
        owner, _, leaf = name.rpartition(".")
        if owner not in quantized or leaf == "bias":
            place(model, name, tensor, device)
            continue
        parts = pending.setdefault(owner, {})
        parts[leaf] = tensor
        if not stored:
            assert quantize is not None, "no layer is quantised without it"
            weight = pending.pop(owner)["weight"].to(model.dtype)
            _swap(model, owner, _of_float(bnb, linears[owner], weight, device_of(name, device), quantize))
        elif len(parts) == 2:
            parts, linear = pending.pop(owner), linears[owner]
            assert isinstance(linear, nn.Linear), "no release has experts in 8 bits"
            _swap(model, owner, _of_int8(bnb, linear, **parts, device=device_of(name, device)))
    model.is_loaded_in_8bit = stored or quantize == "int8"
    model.is_loaded_in_4bit = quantize == "nf4"
    tie(model)


def bits(model: ModelParts, files: Files, quantize: Quantize | None) -> dict[str, float]:
    """Return the linear layers to quantise, with the bits of a weight. `quantize` None: an empty dict."""
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, GroupedLinear))]
    if is_int8(files):
        return dict.fromkeys(_scaled(model, files, linears), 8.0)
    if quantize is None:
        return {}
    # nf4: a scale in float32 for 64 weights.
    width = {"int8": 8.0, "nf4": 4.5, "fp8": 8.0}[quantize]
    return {name: width for name in linears if name.startswith("language_model.model.")}


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "quantize: weights in 8 or 4 bits need the package bitsandbytes, which is not installed; "
            'pip install -e ".[quant]"'
        ) from error
    return bitsandbytes


def _scaled(model: ModelParts, files: Files, linears: list[str]) -> list[str]:
    """Return the linear layers whose weights have scales in the files. Raises UserError for an unknown format."""
    for path, names in _by_file(files, FORMAT).items():
        with safe_open(path, framework="pt") as file:
            unknown = [name for name in names if int(file.get_tensor(name)) != 0]
        if unknown:
            raise UserError(f"{path}: {unknown[0]} is not 0 (rows one after the other), the only order read here")
    layout = layout_of(files.where, model.config)
    scales = groups([f"{name}.{SCALES}" for name in linears], layout, model.config)
    ending = f".{SCALES}"
    return [n.removesuffix(ending) for g in scales if all(s in files.where for s in g.stored) for n in g.module]


def _by_file(files: Files, leaf: str) -> dict[Path, list[str]]:
    by_file: dict[Path, list[str]] = {}
    for name, path in files.where.items():
        if name.endswith("." + leaf):
            by_file.setdefault(path, []).append(name)
    return by_file


def _without_formats(files: Files) -> Files:
    def without(table: dict[str, T]) -> dict[str, T]:
        return {name: value for name, value in table.items() if not name.endswith("." + FORMAT)}

    return Files(files.folder, without(files.where), without(files.shapes), without(files.dtypes))


def _of_int8(bnb: Any, linear: nn.Linear, weight: Tensor, SCB: Tensor, device: torch.device | str) -> nn.Linear:
    layer = bnb.nn.Linear8bitLt(*_sizes(linear), has_fp16_weights=False, device="meta")
    # Copies: tensors of safetensors are windows into a file.
    weight, scales = weight.clone().contiguous().to(device), SCB.float().clone().to(device)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scales)
    return layer


def _of_float(
    bnb: Any, linear: nn.Linear | GroupedLinear, weight: Tensor, device: torch.device | str, quantize: Quantize
) -> nn.Module:
    """Quantise a layer on its device; bitsandbytes does so as the weight is moved there."""
    if isinstance(linear, GroupedLinear):
        return QuantizedExperts.of(linear, weight.to(device), quantize)
    if quantize == "fp8":
        return FP8Linear(weight.to(device), linear.bias is not None)
    if quantize == "int8":
        layer = bnb.nn.Linear8bitLt(*_sizes(linear), has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
        return layer
    layer = bnb.nn.Linear4bit(*_sizes(linear), compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to(device)
    return layer


def _sizes(linear: nn.Linear) -> tuple[int, int, bool]:
    return linear.in_features, linear.out_features, linear.bias is not None


def _swap(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a quantised layer in a linear one's place, with its bias (which may be read later)."""
    owner, _, leaf = name.rpartition(".")
    parent = model.get_submodule(owner)
    layer.bias = getattr(parent, leaf).bias
    setattr(parent, leaf, layer.train(parent.training))
