"""Reader and writer of weights: safetensors only, a tensor at a time, strict both ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ivl.architecture.config import Config
from ivl.checkpoint.layouts import Group, groups, layout_of, to_stored
from ivl.hub.files import INDEX, weight_files
from ivl.model.parts import ModelParts
from ivl.types import UserError, first_few

Where = torch.device | str | Callable[[str], torch.device | str]
"""One device for all tensors, or a function from a tensor's name to its device"""


@dataclass
class Files:
    """Safetensors files of a folder: path, shape and dtype of each tensor. Reads headers only."""

    folder: Path
    where: dict[str, Path] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    """Dtypes in safetensors' spelling: BF16, F32, I8 …"""

    @classmethod
    def of(cls, folder: Path) -> Files:
        """Read the headers of a folder. Raises UserError where there are no weights, a shard is missing or damaged."""
        names = weight_files(folder)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder}: {INDEX} names {len(names)} files, {len(missing)} of them are missing "
                f"({first_few(missing)}); is the download complete?"
            )
        files = cls(folder)
        for name in names:
            with _opened(folder / name) as file:
                for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    files.where[key] = folder / name
                    header = file.get_slice(key)
                    files.shapes[key], files.dtypes[key] = tuple(header.get_shape()), header.get_dtype()
        return files

    def read(self, module_groups: list[Group], config: Config) -> Iterator[tuple[str, Tensor]]:
        """Yield each module's name and tensor, as stored, one at a time; a file is mapped only while it is read."""
        group_of = {name: group for group in module_groups for name in group.stored}
        pending: dict[str, Tensor] = {}
        for path in dict.fromkeys(self.where.values()):
            with _opened(path) as file:
                for name in (n for n, p in self.where.items() if p == path and n in group_of):
                    group = group_of[name]
                    pending[name] = file.get_tensor(name)
                    if all(n in pending for n in group.stored):
                        yield from zip(group.module, group.read([pending.pop(n) for n in group.stored], config))
                pending = {n: t.clone() for n, t in pending.items()}


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); is the download complete?") from error


def load_weights(model: ModelParts, files: Files, device: Where) -> None:
    """Put a checkpoint's weights into a model (on the meta device, or not), in the dtypes of the model's parameters.

    One tensor at a time, so memory peaks at the model and one file. Raises UserError, before any work, that lists
    tensors that are missing, unexpected or of another shape.
    """
    for name, tensor in files.read(check(model, files), model.config):
        place(model, name, tensor, device)
    tie(model)


def check(model: ModelParts, files: Files, also: Mapping[str, Tensor] | None = None) -> list[Group]:
    """Return the groups to read for the model's tensors, and for those of `also`, named like the module's.

    Raises UserError listing every tensor that does not fit.
    """
    layout = layout_of(files.where, model.config)
    state = untied(model.state_dict(), model.config) | dict(also or {})
    state = {name: tensor.to("meta") for name, tensor in state.items()}
    expected = {name: tuple(t.shape) for name, t in to_stored(state, layout, model.config).items()}
    missing = sorted(expected.keys() - files.shapes.keys())
    unexpected = sorted(files.shapes.keys() - expected.keys())
    misshapen = [
        f"{name} (expected {list(shape)}, found {list(files.shapes[name])})"
        for name, shape in sorted(expected.items())
        if files.shapes.get(name, shape) != shape
    ]
    problems = [
        f"{len(names)} {what}: {first_few(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise UserError(
            f"{files.folder}: the weights are not those of its config.json ({layout} layout, {len(expected)} tensors "
            f"expected, {len(files.shapes)} found). {'; '.join(problems)}. Use config.json and weights of one release"
        )
    return groups(state, layout, model.config)


def untied(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Return a model's state without an output layer that is the input embedding itself."""
    tied = config.llm.get("tie_word_embeddings")
    return {name: tensor for name, tensor in state.items() if not (tied and name == "language_model.lm_head.weight")}


def tie(model: ModelParts) -> None:
    """Make the output layer the input embedding again, where the checkpoint has one tensor for both."""
    language_model = model.language_model
    if model.config.llm.get("tie_word_embeddings"):
        language_model.lm_head.weight = language_model.get_input_embeddings().weight


def device_of(name: str, where: Where) -> torch.device | str:
    return where(name) if callable(where) else where


def place(model: nn.Module, name: str, tensor: Tensor, device: Where) -> None:
    """Make `tensor` the parameter `name`, in that parameter's dtype and with its requires_grad."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = getattr(module, leaf)
    # A copy even where nothing changes: tensors of safetensors are windows into a file that may be replaced.
    copy = torch.empty(tensor.shape, dtype=parameter.dtype, device=device_of(name, device)).copy_(tensor)
    setattr(module, leaf, nn.Parameter(copy, requires_grad=parameter.requires_grad))


def save_weights(
    state: Mapping[str, Tensor], folder: Path, layout: str, config: Config, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a module's state in a layout: one file, or shards of at most `max_shard_bytes` with an index.

    A shard holds at least one tensor, however large.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = untied(state, config)
    shards: list[list[Group]] = [[]]
    sizes = [0]
    for group in groups(state, layout, config):
        size = sum(state[name].nbytes for name in group.module)
        if shards[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(group)
        sizes[-1] += size
    count = len(shards)
    names = [
        f"model-{n:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors" for n in range(1, count + 1)
    ]
    where: dict[str, str] = {}
    for name, shard in zip(names, shards):
        tensors: dict[str, Tensor] = {}
        for group in shard:
            written = group.write([state[n].detach() for n in group.module], config)
            tensors |= {n: t.contiguous() for n, t in zip(group.stored, written)}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
