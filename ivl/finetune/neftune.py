"""NEFTune: noise on the embeddings of text in training.

Source: Jain et al. 2023, https://arxiv.org/abs/2310.05914.

Shapes: B rows, T tokens of a row, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ivl.model.loss import row_sums, rows_of


def add_noise(embeds_BTD: Tensor, alpha: float, mask_BT: Tensor | None, row_ids_BT: Tensor | None) -> Tensor:
    """The embeddings with uniform noise of magnitude alpha / sqrt(L D).

    L is the length of a token's own row, image tokens included, so padding and packing do not change the noise.
    """
    present_BT = torch.ones_like(embeds_BTD[..., 0], dtype=torch.bool) if mask_BT is None else mask_BT
    rows_BT = rows_of(present_BT, row_ids_BT)
    count = present_BT.numel()  # no batch has more rows than tokens
    length_BT = row_sums(present_BT.flatten(), rows_BT.flatten(), count).clamp(min=1)[rows_BT]
    size_BT1 = (alpha / (length_BT * embeds_BTD.shape[-1]).sqrt() * present_BT)[..., None]
    return embeds_BTD + (torch.rand_like(embeds_BTD) * 2 - 1) * size_BT1.to(embeds_BTD.dtype)
