"""Loss of supervised tokens: logits a chunk at a time, weights of rows.

Shapes: B rows, T tokens of a row, M supervised tokens, D width, R rows of a batch (more than B where packed).
torch's own `linear_cross_entropy` computes chunks in the same way, for a plain linear layer without label smoothing;
here the output layer may carry a LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from ivl.options import Reduction
from ivl.types import IGNORE, supervised_indices

CHUNK = 512
"""Supervised tokens whose logits exist at the same time"""


@dataclass
class Output:
    """Result of a forward: losses where there are labels, logits on request.

    `loss` is `loss_sum` over `weight_sum` (0 where nothing is supervised).
    """

    loss: Tensor | None = None
    loss_sum: Tensor | None = None
    """Negative log-likelihood of all supervised tokens, each times its weight, for a mean over several batches"""
    weight_sum: Tensor | None = None
    """Sum of the supervised tokens' weights; `num_supervised` where all count alike"""
    num_supervised: Tensor | None = None
    row_losses: Tensor | None = None
    """(R,) negative log-likelihood of each row's supervised tokens, unweighted"""
    row_tokens: Tensor | None = None
    """(R,) supervised tokens of each row"""
    logits: Tensor | None = None
    """(B, T, V)"""
    router_load: Tensor | None = None
    """(L, 2, E), on request: tokens of each expert, and sums of its probabilities, for each layer with experts"""


def losses(
    head: nn.Module,
    hidden: Tensor,
    labels_BT: Tensor,
    row_ids_BT: Tensor | None,
    count: int,
    weights_BT: Tensor | None = None,
    chunk: int = CHUNK,
    smoothing: float = 0.0,
    at_M: Tensor | None = None,
    row_weights_R: Tensor | None = None,
) -> Output:
    """The losses of a batch of `count` rows; a position is predicted from the one before it.

    `hidden`: (B, T, D), or (M, D) at `supervised_indices` alone. `at_M`: those places, computed where None; labels
    there may have become IGNORE since. `row_weights_R`: factor of the weights of each row's tokens.
    """
    at_M = supervised_indices(labels_BT) if at_M is None else at_M
    hidden_MD = hidden if hidden.ndim == 2 else hidden.flatten(0, 1).index_select(0, at_M)
    labels_M = _select(labels_BT, at_M + 1)
    nll_M = token_losses(head, hidden_MD, labels_M, chunk, smoothing)
    ones_M = (labels_M != IGNORE).to(nll_M)
    weights_M = ones_M if weights_BT is None else _select(weights_BT, at_M + 1).to(nll_M)
    rows_M = _select(rows_of(labels_BT, row_ids_BT), at_M + 1)
    if row_weights_R is not None:
        weights_M = weights_M * row_weights_R.to(nll_M)[rows_M]
    loss_sum, weight_sum = (nll_M * weights_M).sum(), weights_M.sum()
    return Output(
        loss=loss_sum / torch.where(weight_sum > 0, weight_sum, 1),
        loss_sum=loss_sum,
        weight_sum=weight_sum,
        num_supervised=(labels_M != IGNORE).sum(),
        row_losses=row_sums(nll_M, rows_M, count),
        row_tokens=row_sums(ones_M, rows_M, count),
    )


def _select(values_BT: Tensor, at_M: Tensor) -> Tensor:
    return values_BT.flatten().index_select(0, at_M)


def token_losses(head: nn.Module, hidden_MD: Tensor, labels_M: Tensor, chunk: int, smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood of each label: (M,). Logits of `chunk` tokens exist at a time, in backward again.

    Those of the last chunk are kept: backward begins with it, so they would be there at the same time anyway.
    """

    def nll(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), labels, reduction="none", label_smoothing=smoothing)

    if len(labels_M) <= chunk:  # none at all, too, which shapes alone cannot be split into (before torch 2.13)
        return nll(hidden_MD, labels_M)
    *chunks, last = zip(hidden_MD.split(chunk), labels_M.split(chunk))
    return torch.cat([*(recomputed(nll, h, t, use_reentrant=False) for h, t in chunks), nll(*last)])


def rows_of(labels_BT: Tensor, row_ids_BT: Tensor | None) -> Tensor:
    """The number of each token's row in its batch (0 for padding): (B, T)."""
    if row_ids_BT is not None:
        return row_ids_BT.clamp(min=0)
    return torch.arange(len(labels_BT), device=labels_BT.device)[:, None].expand_as(labels_BT)


def row_sums(values_M: Tensor, rows_M: Tensor, count: int) -> Tensor:
    """Sums per row: (R,), float32."""
    return torch.zeros(count, device=values_M.device).index_add(0, rows_M, values_M.float())


def loss_weights(labels_BT: Tensor, row_ids_BT: Tensor | None, count: int, reduction: Reduction) -> Tensor | None:
    """Weight of each supervised token: (B, T), 0 elsewhere; None for `token`, where all count alike.

    A row of n supervised tokens weighs n (`token`), 1 (`sample`), or the square root of n (`square`), as in
    OpenGVLab/InternVL, internvl_chat/internvl/train/internvl_chat_finetune.py, `len2weight`.
    """
    if reduction == "token":
        return None
    supervised_BT = labels_BT != IGNORE
    rows_BT = rows_of(labels_BT, row_ids_BT)
    counts_R = row_sums(supervised_BT.flatten(), rows_BT.flatten(), count).clamp(min=1)
    weights_R = counts_R ** (-1.0 if reduction == "sample" else -0.5)
    return weights_R[rows_BT] * supervised_BT
