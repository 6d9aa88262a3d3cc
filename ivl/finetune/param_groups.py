"""Optimizer groups: learning rate and weight decay per part."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from ivl.finetune.tune import FSDP_PREFIX, part_of, used_blocks
from ivl.options.tuning import PARTS, Rate, Rates
from ivl.types import text_table

if TYPE_CHECKING:
    from ivl.model.internvl import InternVL


def vectors(model: nn.Module) -> set[str]:
    """Names of the parameters that are no matrices, before anything splits them."""
    return {n for n, p in model.named_parameters() if p.ndim <= 1}


def param_groups(
    model: InternVL, rates: Rates = Rates(), decay_free: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups: per part (per block, where rates fall by block), matrices and vectors apart.

    Every trainable parameter is in exactly one group. `scale` stands for a rate that is a share of the part's:
    `scale_rates` applies it once the optimizer is made. `decay_free`: the model's `vectors`, where its weights may have
    been split since (a shard of classic FSDP has one dimension, whatever the whole has).
    """
    groups: dict[str, dict[str, Any]] = {}
    decay_free = vectors(model) if decay_free is None else decay_free
    trained = [(n.replace(FSDP_PREFIX, ""), p) for n, p in model.named_parameters() if p.requires_grad]
    for name, parameter in sorted(trained, key=lambda item: PARTS.index(part_of(item[0]))):
        part = part_of(name)
        rate: Rate = getattr(rates, part)
        place, scale = part, 1.0
        if part == "vision_model" and rates.vision_model.layer_decay != 1:
            place, above = _block(model, name)
            scale = rates.vision_model.layer_decay**above
        settings: dict[str, Any] = {"params": [], "name": place, "scale": scale}
        settings |= {} if rate.lr is None else {"lr": rate.lr}
        settings |= {} if rate.weight_decay is None else {"weight_decay": rate.weight_decay}
        if name in decay_free:
            settings |= {"name": f"{place}_no_decay", "weight_decay": 0.0}
        groups.setdefault(settings["name"], settings)["params"].append(parameter)
    order = sorted(
        groups.values(),
        key=lambda group: (PARTS.index(part_of(group["name"].removesuffix("_no_decay"))), group["name"]),
    )
    assert sum(len(g["params"]) for g in order) == len(trained), "a trainable parameter has no group"
    return order


def scale_rates(optimizer: Optimizer) -> None:
    """Multiply each group's rate by its `scale`."""
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("scale", 1.0)


def groups_table(optimizer: Optimizer) -> str:
    """The optimizer's groups as text: name, tensors, numbers, peak learning rate, weight decay."""
    rows = [("group", "tensors", "parameters", "lr", "weight decay")]
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        lr = group.get("initial_lr", group["lr"])
        rows.append(
            (group["name"], str(len(group["params"])), f"{count:,}", f"{lr:g}", f"{group.get('weight_decay', 0):g}")
        )
    return text_table(rows)


def _block(model: InternVL, name: str) -> tuple[str, int]:
    """Name of a group, and the number of blocks of the vision encoder above it."""
    depth = used_blocks(model)
    if name.startswith("vision_model.encoder.layers."):
        number = int(name.split(".")[3])
        return f"vision_model.{number:02}", depth - 1 - number
    return "vision_model.embeddings", depth
