"""Attention over rows that follow one another, at the cost of the rows: no mask, no padding, no other row's keys.

transformers asks its AttentionInterface for the function that a config names; ours is torch's fused attention where
the lengths of rows are given, and transformers' own `sdpa` where they are not. On a GPU torch takes all rows at once
(`torch.nn.attention.varlen`); elsewhere, and where that kernel can't, one row after the other.

Shapes: T tokens of all rows, H heads, G heads of keys and values, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ivl.model.again import again

NAME = "sdpa_by_row"
HALF, WIDTHS = (torch.float16, torch.bfloat16), range(8, 257, 8)
"""Types, and widths of a head, that torch's kernel for all rows at once takes"""


@dataclass(frozen=True)
class Rows:
    """The rows of a sequence, in a form whose content torch.compile does not look at on the way here."""

    lengths: tuple[int, ...]
    ends: Tensor | None = None
    """(rows + 1,) int32, where each begins and the last ends, on a device whose kernel takes all at once"""


@cache
def register() -> str:
    """Make the function known to transformers. Returns the name a config asks for it by."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    @torch.compiler.disable  # compiled, there would be a version for each list of lengths
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
        rows = given.pop("rows", None)
        if rows is None:
            return sdpa_attention_forward(module, query, key, value, mask, **given)
        scale, dropout, window = given.get("scaling"), given.get("dropout", 0.0), given.get("sliding_window")
        if rows.ends is not None and dropout == 0 and query.dtype in HALF and query.shape[-1] in WIDTHS:
            return at_once(query, key, value, rows, scale, window), None
        return by_row(query, key, value, rows.lengths, scale, dropout, window), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def at_once(
    q_1HTK: Tensor, k_1GTK: Tensor, v_1GTK: Tensor, rows: Rows, scale: float | None = None, window: int | None = None
) -> Tensor:
    """As `by_row`, without dropout, by one kernel."""
    from torch.nn.attention.varlen import varlen_attn

    assert rows.ends is not None
    q_THK, k_TGK, v_TGK = (x[0].transpose(0, 1).contiguous() for x in (q_1HTK, k_1GTK, v_1GTK))
    ends = rows.ends.to(q_THK.device, non_blocking=True)  # layers may be spread over devices
    longest, back = max(rows.lengths), -1 if window is None else window - 1
    where = ends, ends, longest, longest
    grouped = q_THK.shape[1] != k_TGK.shape[1]
    out: Any = varlen_attn(q_THK, k_TGK, v_TGK, *where, scale=scale, window_size=(back, 0), enable_gqa=grouped)
    return out[None]


def takes_all(device: torch.device) -> bool:
    """Whether torch has a kernel for all rows at once there: from compute capability 8, in a release that has one."""
    return device.type == "cuda" and torch.version.hip is None and _newer(device) and _grouped_varlen()


@cache
def _newer(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _grouped_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10; some later ones know no groups
        return False
    return "enable_gqa" in signature(varlen_attn).parameters


def by_row(
    q_1HTK: Tensor,
    k_1GTK: Tensor,
    v_1GTK: Tensor,
    lengths: Sequence[int],
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Causal attention of each row to itself; `lengths` add up to T. `window`: how far back. Returns (1, T, H, K)."""
    grouped = q_1HTK.shape[1] != k_1GTK.shape[1]
    found = []
    for q, k, v in zip(*(x.split(list(lengths), dim=2) for x in (q_1HTK, k_1GTK, v_1GTK)), strict=True):
        count = q.shape[2]
        band = None
        if window is not None and count > window:
            square = torch.ones(count, count, dtype=torch.bool, device=q_1HTK.device)
            band = square.tril() & square.triu(1 - window)
        found.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scale, enable_gqa=grouped
            )
        )
    return again(_joined, *found)


def _joined(*rows_1HTK: Tensor) -> Tensor:
    return torch.cat([row.transpose(1, 2) for row in rows_1HTK], dim=1)


def given_rows(kernel: str, lengths: Sequence[int], like: Tensor) -> dict[str, Any]:
    """What a language model's forward is given besides its one sequence of rows, for the kernel of its config."""
    if kernel == NAME:
        # A mask of four dimensions is passed on as it is; this one is not looked at, and keeps transformers from
        # making a square one.
        ends = _ends(lengths, like.device) if takes_all(like.device) else None
        return {"rows": Rows(tuple(lengths), ends), "attention_mask": like.new_empty(0, 0, 0, 0)}
    ends, longest = _ends(lengths, like.device), max(lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device, non_blocking=True)
