"""Projector: pixel shuffle and a two-layer MLP, from the vision encoder's patches to the language model's tokens.

Shapes: N tiles, G patches a side of a tile, C width of the tower, P image tokens of a tile, D width of the language
model.
"""

from __future__ import annotations

from torch import Tensor, nn


def build_projector(width: int, llm_width: int) -> nn.Sequential:
    """Return `mlp1` of the releases: (N, P, width) → (N, P, D), where `width` is that behind the pixel shuffle."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))


def pixel_shuffle(grid_NGGC: Tensor, ratio: float, version: str) -> Tensor:
    """Blocks of 1/ratio x 1/ratio patches become one token with all their channels: (N, P, C / ratio²).

    v2 reads the blocks row by row; v1, of the first releases, column by column.
    """
    side = round(1 / ratio)
    blocks = grid_NGGC.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (N, row, in row, column, in column, C)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return blocks.permute(order).flatten(3).flatten(1, 2)
