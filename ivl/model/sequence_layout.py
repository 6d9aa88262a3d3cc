"""Sequence layout of a batch that was built by hand, from its masks and positions.

The collator knows the lengths of rows, and makes the layout from them (`ivl.types.SequenceLayout`).

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ivl.types import SequenceLayout


def layout_of(
    ids_BT: Tensor,
    mask_BT: Tensor | None = None,
    positions_BT: Tensor | None = None,
    rows_BT: Tensor | None = None,
    lengths: Tensor | None = None,
) -> SequenceLayout | None:
    """The layout of a batch, on the CPU; None where its rows are not runs from position 0.

    `lengths` (rows,), on the CPU: tokens of each row; None: computed from the masks, which waits for the device.
    """
    if lengths is None:
        lengths = lengths_of(mask_BT, positions_BT, rows_BT, *ids_BT.shape)
    return None if lengths is None else SequenceLayout.of(lengths, ids_BT.shape[1], packed=rows_BT is not None)


def lengths_of(
    mask_BT: Tensor | None, positions_BT: Tensor | None, rows_BT: Tensor | None, B: int, T: int
) -> Tensor | None:
    """Tokens of each row, (rows,), on the CPU; None where they are not runs from position 0, padded on the right."""
    if rows_BT is None:
        row_sizes = torch.full((B,), T) if mask_BT is None else mask_BT.sum(1).cpu()
        return row_sizes if is_plain(mask_BT, positions_BT) else None
    if B > 1 or positions_BT is None:
        return None
    rows, starts = rows_BT[0].cpu(), positions_BT[0].cpu() == 0
    row_tokens = rows[rows >= 0]
    _, counts = row_tokens.unique_consecutive(return_counts=True)
    begins = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    steps = torch.cat([torch.arange(int(count)) for count in counts])
    in_order = bool((rows[: len(row_tokens)] >= 0).all()) and len(row_tokens.unique()) == len(counts)
    in_steps = positions_BT[0, : len(row_tokens)].cpu().equal(steps)
    return counts if in_order and starts[begins].all() and in_steps else None


def is_plain(mask_BT: Tensor | None, positions_BT: Tensor | None) -> bool:
    """True if every row is one run of tokens from position 0, padded on the right."""
    plain = torch.tensor(True)
    if mask_BT is not None:
        plain = (mask_BT[:, 1:] <= mask_BT[:, :-1]).all()
    if positions_BT is not None:
        expected_BT = torch.arange(positions_BT.shape[1], device=positions_BT.device) == positions_BT
        plain = plain.to(expected_BT.device) & (expected_BT if mask_BT is None else expected_BT | ~mask_BT).all()
    return bool(plain)
