"""Rotary position embedding, and its scalings for long rows.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864.

Shapes: B rows, T tokens of this call, R half the width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings of an `llm_config` in transformers' present spelling.

    Phi-3's `su` and `yarn` are both longrope; its yarn differs in the factor on cos and sin
    (microsoft/Phi-3-mini-128k-instruct, modeling_phi3.py).
    """
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    parameters = {key: value for key, value in scaling.items() if value is not None}
    kind = parameters.pop("type", None) or "default"
    kind = parameters.setdefault("rope_type", kind)
    if "rope_theta" in raw:
        parameters.setdefault("rope_theta", raw["rope_theta"])
    if "short_factor" in parameters:
        original = raw.get("original_max_position_embeddings") or parameters["original_max_position_embeddings"]
        stretch = max(raw["max_position_embeddings"] / original, 1.0)
        parameters.setdefault("factor", stretch)
        if kind == "yarn":
            parameters.setdefault("attention_factor", 0.1 * math.log(stretch) + 1.0)
        parameters["rope_type"] = "longrope"
        parameters.setdefault("original_max_position_embeddings", original)
    return parameters


@dataclass(frozen=True)
class Rope:
    """Settings of `RotaryEmbedding`."""

    kind: str = "default"
    """default, linear, dynamic or longrope"""
    theta: float = 10000.0
    factor: float = 1.0
    limit: int | None = None
    """Rows up to this length do not depend on their length (dynamic, longrope); None: none does"""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    scale: float = 1.0
    """Factor on cos and sin"""

    @classmethod
    def from_llm(cls, raw: dict[str, Any]) -> Rope:
        """Read the rotary settings of an `llm_config` that `ivl.architecture.config_fields` has checked."""
        values = rope_parameters(raw)
        kind, theta = values["rope_type"], float(values.get("rope_theta", cls.theta))
        factor = float(values.get("factor", 1.0))
        if kind == "dynamic":
            return cls(kind, theta, factor, raw["max_position_embeddings"])
        if kind == "longrope":
            original = values["original_max_position_embeddings"]
            grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            scale = values.get("attention_factor") or grown
            short, long = tuple(values["short_factor"]), tuple(values["long_factor"])
            return cls(kind, theta, factor, original, short, long, scale)
        return cls(kind, theta, factor)


class RotaryEmbedding(nn.Module):
    """cos and sin of each position, from the positions of this call alone: the module has no state.

    The frequencies of dynamic NTK and longrope follow from the length of a token's row. (transformers' module
    remembers the longest row so far, and lets the longest row of a batch decide for all.) Keys in a cache keep
    the frequencies they were made with, as in the reference: once a decoded row outgrows the limit, decoding with a
    cache and one long forward differ.

    It has no buffers, so it can be built on the meta device and is not rounded with the weights.
    """

    def __init__(self, rope: Rope, head_dim: int) -> None:
        super().__init__()
        self.rope = rope
        with torch.device("cpu"):
            powers_R = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim)
            inv_freq_R = 1.0 / powers_R
            if rope.kind == "linear":
                inv_freq_R = inv_freq_R / rope.factor
            self.inv_freq_R = self.long_inv_freq_R = inv_freq_R
            if rope.kind == "longrope":
                factors = (torch.tensor(f, dtype=torch.float) for f in (rope.short_factor, rope.long_factor))
                self.inv_freq_R, self.long_inv_freq_R = (1.0 / (factor_R * powers_R) for factor_R in factors)

    def frequencies(self, positions_BT: Tensor) -> Tensor:
        """Angle per position of each token: (R,) or (B, T, R), float32."""
        if self.inv_freq_R.device != positions_BT.device:
            self.inv_freq_R, self.long_inv_freq_R = (
                x.to(positions_BT.device) for x in (self.inv_freq_R, self.long_inv_freq_R)
            )
        rope = self.rope
        if rope.limit is None:
            return self.inv_freq_R
        length_BT1 = row_lengths(positions_BT)[..., None]
        if rope.kind == "longrope":
            return torch.where(length_BT1 > rope.limit, self.long_inv_freq_R, self.inv_freq_R)
        half = len(self.inv_freq_R)
        stretch_BT1 = rope.factor * length_BT1.clamp(min=rope.limit) / rope.limit - (rope.factor - 1)
        theta_BT1 = rope.theta * stretch_BT1 ** (half / (half - 1))
        return theta_BT1 ** (torch.arange(half, device=theta_BT1.device) / -half)

    @torch.no_grad()
    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin in the dtype of `x_BTD`: two of (B, T, 2 R)."""
        angles_BTR = positions_BT[..., None].float() * self.frequencies(positions_BT)
        angles = torch.cat([angles_BTR, angles_BTR], dim=-1)
        return (angles.cos() * self.rope.scale).to(x_BTD.dtype), (angles.sin() * self.rope.scale).to(x_BTD.dtype)


def row_lengths(positions_BT: Tensor) -> Tensor:
    """Length of each token's row, this call included; a row begins where positions do not go on by one. (B, T)"""
    if positions_BT.shape[1] == 1:
        return positions_BT + 1
    starts_BT = torch.zeros_like(positions_BT)
    starts_BT[:, 1:] = positions_BT.diff(dim=-1) != 1
    row_BT = starts_BT.cumsum(-1)
    longest_BT = torch.zeros_like(positions_BT).scatter_reduce(1, row_BT, positions_BT + 1, "amax")
    return longest_BT.gather(1, row_BT)


def rotate(x_BHTK: Tensor, cos_BT: Tensor, sin_BT: Tensor) -> Tensor:
    """Queries or keys turned by the angles of their positions: (B, H, T, 2 R)."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos_BT[:, None] + torch.cat([-second, first], dim=-1) * sin_BT[:, None]
