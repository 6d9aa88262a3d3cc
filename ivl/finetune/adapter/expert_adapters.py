"""Stacked experts in PEFT's adapter files (`target_parameters`), and experts one by one.

peft wraps a module once for each of its parameters that is adapted, one wrapping in the other, and names the pairs by
the wrappings, in the order of the module's parameters: the last has none. A pair per expert is flattened to a matrix.

    config                                     file
    target_parameters: [… .gate_up_proj,       … .experts.base_layer.lora_A.weight     gate_up_proj, (E · R, I)
                        … .down_proj]          … .experts.lora_B.weight                down_proj, (O, R · E)

Files that transformers 4 was adapted by name the linear layers of each expert, `… .experts.3.gate_proj`.

Shapes: E experts, R rank, I and O features in and out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ivl.types import UserError, first_few

MATRICES = ("gate_up_proj", "down_proj")
"""Parameters of a module of stacked experts, in its order"""
_KEY = re.compile(r"(?P<module>.+\.experts)(?P<wraps>(\.base_layer)*)\.lora_(?P<half>[AB])\.weight")


def stacked_tensors(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Name and flatten pairs, A (E, R, I) and B (E, O, R) of each parameter, as peft does."""
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in pairs.items():
        module, _, matrix = name.rpartition(".")
        later = [m for m in MATRICES[MATRICES.index(matrix) + 1 :] if f"{module}.{m}" in pairs]
        stem = module + ".base_layer" * len(later)
        tensors |= {
            f"{stem}.lora_A.weight": A.flatten(0, 1),
            f"{stem}.lora_B.weight": B.permute(1, 2, 0).flatten(1),
        }
    return tensors


def unstacked_names(state: Mapping[str, Tensor], targets: Sequence[str], experts: int, where: str) -> dict[str, Tensor]:
    """The tensors of an adapter file with names of their own, and the shapes of pairs, for stacked experts.

    `targets`: its target_parameters. Raises UserError where they are no experts', or the file lacks one. `where`: file
    of the config.
    """
    if not targets:
        return dict(state)
    if unknown := [name for name in targets if not experts or name.rpartition(".")[2] not in MATRICES]:
        raise UserError(
            f"{where}: target_parameters has {first_few(unknown)}: a LoRA on parameters that are no linear layer's and "
            "no experts' of this model; merge it with peft (merge_and_unload) and give the merged checkpoint"
        )
    result = {}
    found: set[str] = set()
    for key, tensor in state.items():
        if (match := _KEY.fullmatch(key)) is None:
            result[key] = tensor
            continue
        adapted = [m for m in MATRICES if _is_target(f"{match['module']}.{m}", targets)]
        inner = match["wraps"].count("base_layer")
        if inner >= len(adapted):
            raise UserError(
                f"it has {key}, of target_parameters {first_few(list(targets))}, and this model no such experts"
            )
        name = f"{match['module']}.{adapted[-1 - inner]}"
        found.add(name)
        result[f"{name}.lora_{match['half']}.weight"] = _unflattened(key, tensor, match["half"], experts)
    if missing := [name for name in targets if not any(_is_target(layer, [name]) for layer in found)]:
        raise UserError(f"its config has target_parameters {first_few(missing)}, and the file has no tensor of it")
    return result


def _is_target(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _unflattened(key: str, tensor: Tensor, half: str, experts: int) -> Tensor:
    side = 0 if half == "A" else 1
    if tensor.ndim != 2 or tensor.shape[side] % experts:
        raise UserError(f"the adapter's {key} has shape {list(tensor.shape)}; expected pairs of {experts} experts")
    if half == "A":
        return tensor.unflatten(0, (experts, -1))
    return tensor.unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()


def stacked_pair(pairs: Sequence[tuple[Tensor, Tensor, float] | None], experts: int) -> tuple[Tensor, Tensor, float]:
    """One pair, A (E, R, I) and B (E, O, R), from those of the matrices that a file has of each expert in turn.

    Several matrices of an expert that share their A are one pair; otherwise ranks add up. A matrix without a pair has
    an update of zero. Raises UserError where ranks differ between experts.
    """
    per_expert = len(pairs) // experts
    first = next(pair for pair in pairs if pair is not None)
    scale = next((pair[2] for pair in pairs if pair is not None and pair[2]), 1.0)
    parts = [(torch.zeros_like(first[0]), torch.zeros_like(first[1]), scale) if p is None else p for p in pairs]
    stacked_a, stacked_b = [], []
    for start in range(0, len(parts), per_expert):
        of_expert = parts[start : start + per_expert]
        stacked_a.append([a.float() for a, _, _ in of_expert])
        stacked_b.append([b.float() * (s / scale) for _, b, s in of_expert])
    if len({tuple(a.shape for a in of_expert) for of_expert in stacked_a}) > 1:
        raise UserError("its LoRAs on the experts of a layer have several ranks; merge it with peft (merge_and_unload)")
    if all(torch.equal(of_expert[0], a) for of_expert in stacked_a for a in of_expert):
        A = torch.stack([of_expert[0] for of_expert in stacked_a])
        B = torch.stack([torch.cat(of_expert) for of_expert in stacked_b])
    else:
        A = torch.stack([torch.cat(of_expert) for of_expert in stacked_a])
        B = torch.stack([torch.block_diag(*of_expert) for of_expert in stacked_b])
    return A, B, scale
