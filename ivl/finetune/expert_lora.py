"""LoRA on the experts of a mixture: a low-rank pair for each expert.

    y = W_e x + (alpha / rank) B_e A_e x          e: the expert of the row

The pairs of a layer are two tensors, A (E, R, I) and B (E, O, R), and each half is one grouped product. peft has the
same pairs under `target_parameters`, where it adds the product of all pairs to all weights in each forward; its names
and shapes are those of the adapter files (`ivl.finetune.adapter.expert_adapters`).

Shapes: S rows sorted by expert, E experts, I and O features in and out, R rank.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ivl.model.moe.experts import GroupedLinear

if TYPE_CHECKING:
    from ivl.model.internvl import InternVL


@dataclass(frozen=True)
class Pair:
    """Settings of the pairs of a layer."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class ExpertLoRA(nn.Module, LoraLayer):
    """A `GroupedLinear` with a LoRA. Its parameters are named as in peft's linear layers."""

    base_layer: Any
    in_features: int
    out_features: int
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    r: dict[str, int]
    scaling: dict[str, float]
    merged_adapters: list[str]
    merged: bool
    disable_adapters: bool

    def __init__(self, base: Any, pair: Pair, name: str) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base)
        weight = base.weight
        self.r[name], self.scaling[name] = pair.rank, pair.scale
        self.lora_dropout[name] = nn.Dropout(pair.dropout) if pair.dropout else nn.Identity()
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        with torch.device(weight.device):
            self.lora_A[name] = GroupedLinear(base.num_experts, self.in_features, pair.rank).to(dtype)
            self.lora_B[name] = GroupedLinear(base.num_experts, pair.rank, self.out_features).to(dtype)
        bound = 1 / math.sqrt(self.in_features)  # that of peft's linear layers
        nn.init.uniform_(self.lora_A[name].weight, -bound, bound)
        nn.init.zeros_(self.lora_B[name].weight)
        self.name = name

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def forward(self, x_SI: Tensor, ends_E: Tensor) -> Tensor:
        y_SO = self.base_layer(x_SI, ends_E)
        if self.disable_adapters or self.merged:
            return y_SO
        low_SR = self.lora_A[self.name](self.lora_dropout[self.name](x_SI), ends_E)
        return y_SO + self.lora_B[self.name](low_SR * self.scaling[self.name], ends_E)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the pairs to the weights. Raises ValueError where the result is not finite."""
        weight = self.base_layer.weight
        A, B = self.lora_A[self.name].weight.data, self.lora_B[self.name].weight.data
        merged_EOI = torch.baddbmm(weight.data, B.to(weight.dtype), A.to(weight.dtype), alpha=self.scaling[self.name])
        if safe_merge and not torch.isfinite(merged_EOI).all():
            raise ValueError("the merged weight of experts is not finite")
        weight.data = merged_EOI
        self.merged_adapters.append(self.name)


def put(model: InternVL, layers: list[str], config: Any, adapter: str) -> None:
    """Put pairs on layers of experts, by the settings of a `peft.LoraConfig`."""
    for name in layers:
        rank, alpha = (
            next((v for key, v in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", name)), usual)
            for pattern, usual in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
        )
        owner, _, leaf = name.rpartition(".")
        parent = model.get_submodule(owner)
        pair = Pair(rank, alpha, config.lora_dropout, config.use_rslora)
        setattr(parent, leaf, ExpertLoRA(getattr(parent, leaf), pair, adapter).train(parent.training))
