"""Logits of two programs in float32 and in bfloat16: what may differ, and what is a difference.

In float32 they are nearly equal. In bfloat16 every operation rounds, and two orders of the same operations round to
other values; so either the logits are equal bit for bit, or those of this program are about as far from float32 as the
other's are, over all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NEAR = 1e-4
"""Largest difference of float32 logits"""
FARTHER = 1.5
"""Bound of our distance from float32, in the other program's"""
ROUNDED = "rounded in another order"


class Pair(NamedTuple):
    """Logits of a row"""

    ours: Tensor
    theirs: Tensor


def pair(ours: Tensor, theirs: Tensor) -> Pair:
    """Logits as float32, without the rows that only one vocabulary has."""
    rows = min(ours.shape[-1], theirs.shape[-1])
    return Pair(ours[..., :rows].float(), theirs[..., :rows].float())


def distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Root mean square of the differences over that of the exact values."""
    a, b = (torch.cat([tensor.float().flatten() for tensor in tensors]) for tensors in (found, exact))
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def differing(exact: list[Pair], rounded: list[Pair]) -> tuple[list[str], dict[str, int]]:
    """Differences, and known ones with the rows that have them. `exact`: in float32; `rounded`: in bfloat16."""
    gaps = [float((row.ours - row.theirs).abs().max()) for row in exact]
    wrong = [f"row {n}: float32 logits differ by {gap}" for n, gap in enumerate(gaps) if gap > NEAR]
    other = [n for n, row in enumerate(rounded) if not torch.equal(row.ours, row.theirs)]
    truth = [row.theirs for row in exact]
    ours, theirs = (distance([row[side] for row in rounded], truth) for side in (0, 1))
    if other and ours > FARTHER * theirs:
        wrong += [f"row {n}: bfloat16 is {ours:.1e} from float32 here, {theirs:.1e} there" for n in other]
        return wrong, {}
    return wrong, {ROUNDED: len(other)} if other else {}
