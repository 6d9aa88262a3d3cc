"""Device map: the layers of one model spread over several devices.

The decoder layers are spread so that all devices are equally full, counted in bytes: weights as they are stored
(quantised ones too), the key-value cache and the activations of the tower. The tower, the projector, the embeddings,
the last norm and the output layer stand on the first device, where the batch is; so it is given fewer layers. Layers
that fit nowhere stay in the host's memory and are copied to the first device when they are needed.

The split model is run by accelerate's hooks (`accelerate.dispatch_model`), which carry tensors from device to device.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ivl.checkpoint.weights import untied
from ivl.estimate.hardware import CONTEXT
from ivl.estimate.inference import cache_bytes, tower_bytes
from ivl.model.parts import ModelParts
from ivl.parallel.devices import parse_size
from ivl.types import UserError, first_few

MAIN = ("mlp1", "language_model.model.embed_tokens", "language_model.model.norm", "language_model.lm_head")
"""Modules that exchange tensors with the batch: all on one device"""

TOWER = "vision_model"
LAYERS = "language_model.model.layers"


@dataclass(frozen=True)
class Sizes:
    """Bytes of the parts of a model on a device."""

    main: float
    """Tower, projector, embeddings, last norm, output layer, and the activations of all these"""
    layers: list[float]
    """Weights of each decoder layer"""
    beside: float
    """Bytes of each decoder layer beside its weights: its part of the cache, or its activations saved in training"""
    once: float = 0.0
    """Bytes of every device but the first while one of its layers computes"""


@dataclass(frozen=True)
class DeviceMap:
    """Device of each part of a model: name of a module → device, such as `cuda:0`, or `cpu`."""

    devices: dict[str, str]

    @property
    def main(self) -> str:
        """Device of batches and of the answer's logits."""
        return self.devices[MAIN[0]]

    @property
    def offloaded(self) -> list[str]:
        """The modules that stand in the host's memory while others are on a GPU."""
        return [] if self.main == "cpu" else [name for name, device in self.devices.items() if device == "cpu"]

    def __call__(self, tensor: str) -> str:
        """The device of a tensor, by its name."""
        parts = tensor.split(".")
        names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next(self.devices[name] for name in names if name in self.devices)

    def __str__(self) -> str:
        """`cuda:0: vision_model, mlp1, …, layers 0-10; cuda:1: layers 11-23`"""
        lines = []
        for device in dict.fromkeys(self.devices.values()):
            names: dict[str, list[int]] = {}
            for name in (name for name, where in self.devices.items() if where == device):
                owner, _, leaf = name.rpartition(".")
                numbers = names.setdefault(owner if leaf.isdigit() else name, [])
                if leaf.isdigit():
                    numbers.append(int(leaf))
            labels = [
                f"{'tower ' if name.startswith(TOWER) else ''}layers {_spans(numbers)}"
                if numbers
                else name.rpartition(".")[2]
                for name, numbers in names.items()
            ]
            lines.append(f"{device}: {', '.join(labels)}")
        return "; ".join(lines)


def _spans(numbers: Sequence[int]) -> str:
    """`0-3 and 7`, of ascending numbers."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return " and ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends))


# -- a plan ------------------------------------------------------------------------------------------------------


def choose(
    model: ModelParts,
    devices: int | Sequence[str] | None = None,
    device_max_memory: Sequence[str] | None = None,
    device_map: str | Path | Mapping[str, str | int] | None = None,
    bits: Mapping[str, float] | None = None,
    needs: Sizes | None = None,
    offload: bool = True,
) -> DeviceMap | None:
    """Return the placement that the options ask for; None where they ask for none.

    Args:
        model: The model, on the meta device too.
        devices: How many GPUs share the model, from the first; or their names.
        device_max_memory: What may be used of each, such as `15GB`; alone, it tells how many there are.
        device_map: A file (JSON or YAML), or a mapping, from the names of modules to devices; instead of a plan.
        bits: Bits of each weight of the linear layers that are quantised, by the module's name.
        needs: What each part takes, such as in training (`ivl.estimate.memory`). Default: what answering takes.
        offload: Layers that do not fit may stay in the host's memory; where weights are quantised they never do.

    Raises UserError where the model does not fit, a device is missing, or a map does not place every module.
    """
    if device_map is not None:
        if devices is not None or device_max_memory is not None:
            raise UserError(
                "device_map: says where everything goes; expected no devices and no device_max_memory with it"
            )
        return from_map(model, device_map)
    limits: list[float] | None = None
    if device_max_memory is not None:
        limits = [parse_size(text, "device_max_memory") for text in device_max_memory]
        devices = len(limits) if devices is None else devices
    assert devices is not None, "none of the options is given"
    names = _names(devices)
    if limits is not None and len(limits) != len(names):
        raise UserError(
            f"device_max_memory: {len(limits)} sizes for {len(names)} devices; expected one for each, such as "
            f"{' '.join(['15GB'] * len(names))}"
        )
    if limits is None:
        limits = [_free(name) for name in names]
    return plan(needs or sizes(model, bits), names, limits, offload=offload and not bits)


def plan(sizes: Sizes, devices: Sequence[str], limits: Sequence[float], offload: bool = True) -> DeviceMap:
    """Spread the layers, in their order, so that the fullest device is as empty as can be.

    `limits`: bytes that may be used of each device; infinite ones count as equal to each other. `offload`: layers that
    do not fit may stay in the host's memory; accelerate cannot do that in training and with quantised layers.
    """
    counts = balance(sizes, limits, offload)
    if counts is None:
        first = sizes.main + max(sizes.layers)
        total = sizes.main + sum(sizes.layers) + len(sizes.layers) * sizes.beside
        available = ", ".join(f"{device} {limit / 1e9:.1f} GB" for device, limit in zip(devices, limits))
        raise UserError(
            f"devices: the model takes about {total / 1e9:.1f} GB, {first / 1e9:.1f} GB of it on the first device "
            f"(vision encoder, embeddings, output layer, a decoder layer), but there are {available}; use more "
            "devices, allow more of each (device_max_memory), or load in 8 or 4 bits (quantize)"
        )
    where = [device for device, count in zip([*devices, "cpu"], counts) for _ in range(count)]
    fixed = dict.fromkeys((TOWER, *MAIN), devices[0])
    return DeviceMap(fixed | {f"{LAYERS}.{n}": device for n, device in enumerate(where)})


def balance(sizes: Sizes, limits: Sequence[float], offload: bool) -> list[int] | None:
    """Number of layers on each device, and last on the host; None where the model does not fit."""
    largest = max(sizes.layers)
    for offloaded in range(len(sizes.layers) + 1 if offload else 1):
        # Offloaded layers compute on the first device: it holds their cache, and one of them at a time.
        main = sizes.main + (largest + offloaded * sizes.beside if offloaded else 0)
        used = [main, *[sizes.once] * (len(limits) - 1)]
        counts = [0] * len(limits)
        for _ in range(len(sizes.layers) - offloaded):
            full = [(u + largest + sizes.beside) for u in used]
            relative = [u / (limit if limit < float("inf") else 1) for u, limit in zip(full, limits)]
            fitting = [n for n, limit in enumerate(limits) if full[n] <= limit]
            if not fitting:
                break
            best = min(fitting, key=lambda n: (relative[n], n))
            used[best], counts[best] = full[best], counts[best] + 1
        if sum(counts) == len(sizes.layers) - offloaded and used[0] <= limits[0]:
            return [*counts, offloaded]
    return None


def sizes(model: ModelParts, bits: Mapping[str, float] | None = None) -> Sizes:
    """Bytes of a model's parts when it answers, the meta device's too; weights named in `bits` have that many each."""
    of_name: dict[str, float] = {}
    for name, parameter in untied(dict(model.named_parameters()), model.config).items():
        owner, _, leaf = name.rpartition(".")
        width = (bits or {}).get(owner) if leaf == "weight" else None
        of_name[name] = parameter.numel() * (parameter.element_size() if width is None else width / 8)
    layers = [0.0] * len(_children(model, LAYERS))
    for name, size in of_name.items():
        if name.startswith(LAYERS + "."):
            layers[int(name[len(LAYERS) + 1 :].partition(".")[0])] += size
    llm, element = model.language_model.config, model.dtype.itemsize
    main = sum(of_name.values()) - sum(layers) + tower_bytes(model.config.vision, model.config.image_size, element)
    return Sizes(main, layers, cache_bytes(llm.num_key_value_heads, llm.head_dim, element))


def _names(devices: int | Sequence[str]) -> list[str]:
    if not isinstance(devices, int):
        return [str(torch.device(name)) for name in devices]
    count = torch.cuda.device_count()
    if not 1 <= devices <= count:
        raise UserError(
            f"devices: {devices} asked for, {count} GPUs found here; expected 1 to {count}"
            if count
            else f"devices: {devices} asked for, but no GPU is found here; leave it out to compute on the CPU"
        )
    return [f"cuda:{n}" for n in range(devices)]


def _free(name: str) -> float:
    if torch.device(name).type != "cuda":
        return float("inf")
    return max(0, torch.cuda.mem_get_info(name)[0] - CONTEXT)


# -- a map of the user's -----------------------------------------------------------------------------------------


def from_map(model: ModelParts, device_map: str | Path | Mapping[str, str | int]) -> DeviceMap:
    """Read a user's device map: names of modules → devices (`cuda:1`, its number, or `cpu`); the longest name wins.

    A file is JSON or YAML. The smallest parts are a decoder layer, a layer of the tower, and the parts of `MAIN`.
    Raises UserError that lists unknown names, parts without a device, and parts that must stand together.
    """
    where, entries = _read_map(device_map)
    parts = [f"{TOWER}.embeddings", *_children(model, f"{TOWER}.encoder.layers"), *MAIN, *_children(model, LAYERS)]
    entry_of = {part: max((e for e in entries if _inside(part, e)), key=len, default=None) for part in parts}
    unknown = [entry for entry in entries if not any(_inside(part, entry) for part in parts)]
    unplaced = [part for part, entry in entry_of.items() if entry is None]
    problems = []
    if unknown:
        problems.append(
            f"{len(unknown)} names of no module that can stand alone: {first_few(unknown)} (expected {TOWER}, "
            f"{', '.join(MAIN)}, {LAYERS}.0 and so on)"
        )
    if unplaced:
        problems.append(f"{len(unplaced)} modules without a device: {first_few(unplaced)}")
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")
    placed = {part: entry for part, entry in entry_of.items() if entry is not None}
    placement = DeviceMap({part: _device(entries[entry], entry, where) for part, entry in placed.items()})
    main = {part: placement.devices[part] for part in MAIN}
    if len(set(main.values())) > 1:
        raise UserError(
            f"{where}: {', '.join(f'{part} on {device}' for part, device in main.items())}; expected these on one "
            "device, that of the batch"
        )
    return placement


def _read_map(device_map: str | Path | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    import yaml

    if isinstance(device_map, Mapping):
        return "device_map", device_map
    try:
        content = yaml.safe_load(Path(device_map).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--device_map {device_map}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--device_map {device_map}: neither JSON nor YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f'--device_map {device_map}: expected names and devices, such as {{"{TOWER}": "cuda:0", …}}')
    return str(device_map), {str(name): device for name, device in content.items()}


def _device(value: Any, name: str, where: str) -> str:
    try:
        device = torch.device(f"cuda:{value}" if isinstance(value, int) or str(value).isdigit() else str(value))
    except RuntimeError as error:
        raise UserError(f"{where}: {name}: expected a device such as cuda:1, 1 or cpu, found {value!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{where}: {name}: {device} is not here; there are {torch.cuda.device_count()} GPUs")
    return str(device)


def _children(model: ModelParts, name: str) -> list[str]:
    return [f"{name}.{n}" for n, _ in model.get_submodule(name).named_children()]


def _inside(name: str, entry: str) -> bool:
    return not entry or name == entry or name.startswith(entry + ".")


# -- hooks -------------------------------------------------------------------------------------------------------


def dispatch(model: ModelParts, placement: DeviceMap) -> None:
    """Give a model, loaded as `placement` says, the hooks that carry tensors between devices."""
    from accelerate import dispatch_model

    if placement.offloaded:
        warnings.warn(
            f"{len(placement.offloaded)} modules stay in the host's memory and are copied to {placement.main} for "
            "every token, which is slow",
            stacklevel=3,
        )
    # A decoder layer writes its keys and values where it computes: the cache is not carried.
    dispatch_model(model, placement.devices, main_device=placement.main, skip_keys="cache", force_hooks=True)
    tower = [f"{TOWER}.embeddings", *_children(model, f"{TOWER}.encoder.layers")]
    for chain in (tower, _children(model, LAYERS)):
        for before, after in pairwise(chain):
            if placement(before) != placement(after):
                _send_output(model.get_submodule(before), placement(after))


def _send_output(module: nn.Module, device: str) -> None:
    """Send a layer's output to the next one's device at once.

    A layer that is computed again in backward repeats the random numbers of the device that its input was on.
    """
    from accelerate.utils import send_to_device

    module.register_forward_hook(lambda _, args, output: send_to_device(output, device))
