"""Attention: one function, `attend`, for packed, masked and causal batches, by four kernels.

| layout | what a token sees | kernels |
| --- | --- | --- |
| `SequenceLayout` | itself and earlier tokens of its row; rows follow one another in one sequence | flash-attn, torch's varlen, or sdpa row by row: no mask, no padding, no other row's keys |
| a mask | the keys that the mask shows: those of a cache, padding inside a row | sdpa or eager |
| None | itself and earlier tokens; every row is whole | flash-attn, sdpa or eager |

Shapes: B rows, T tokens of this call, S keys, H heads, G heads of keys and values, K width of a head.
"""  # noqa: E501  (a table's line)

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ivl.model.layers import autocast_dtype
from ivl.options import AttentionKernel
from ivl.types import SequenceLayout, UserError

KERNELS = get_args(AttentionKernel)
Layout = SequenceLayout | Tensor | None
Join = Callable[..., Tensor]
"""Function of the results of rows, (1, H, T, K) each, that returns them as one sequence, (1, T, H, K)"""
HALF, WIDTHS = (torch.float16, torch.bfloat16), range(8, 257, 8)
"""Dtypes and head widths of torch's kernel for all rows at once"""


def choose_kernel(kernel: AttentionKernel, device: torch.device | str, dtype: torch.dtype) -> AttentionKernel:
    """Return the attention kernel to use; auto is flash_attention_2 where it can run, else sdpa.

    Raises UserError for an unknown name, and for flash_attention_2 where it cannot run.
    """
    if kernel not in KERNELS:
        raise UserError(f"attention: expected one of {', '.join(KERNELS)}, found {kernel!r}")
    installed = find_spec("flash_attn") is not None
    half = dtype in (torch.float16, torch.bfloat16)
    on_gpu = torch.device(device).type == "cuda"
    # flash-attn 2 has no kernels for GPUs before compute capability 8.
    too_old = on_gpu and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
    if kernel == "auto":
        return "flash_attention_2" if installed and half and on_gpu and not too_old else "sdpa"
    if kernel == "flash_attention_2" and not installed:
        raise UserError(
            "attention: flash_attention_2 needs the package flash-attn, which is not installed; "
            'pip install "ivl[flash]", or choose sdpa'
        )
    if kernel == "flash_attention_2" and not half:
        raise UserError(f"attention: flash_attention_2 computes in bfloat16 or float16, found {dtype}; choose sdpa")
    return kernel


def joined(*rows_1HTK: Tensor) -> Tensor:
    """Join the results of rows into one sequence: (1, T, H, K)."""
    return torch.cat([row.transpose(1, 2) for row in rows_1HTK], dim=1)


def attend(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    layout: Layout,
    kernel: str = "sdpa",
    dropout: float = 0.0,
    window: int | None = None,
    join: Join = joined,
) -> Tensor:
    """Causal attention with scores over the square root of K. Returns (B, T, H, K).

    `layout`: see the head of this file; a mask is (B, 1, T, S) bool, True where a token sees a key. `window`: how many
    tokens back a token looks, itself included; a mask has it in it. `join`: how rows that were computed one by one
    become one sequence.
    """
    if isinstance(layout, SequenceLayout):
        return rows_in_sequence(q_BHTK, k_BGSK, v_BGSK, layout, kernel, dropout, window, join)
    if layout is None and kernel == "flash_attention_2":
        from flash_attn import flash_attn_func

        q, k, v = (x.transpose(1, 2) for x in (q_BHTK, k_BGSK, v_BGSK))
        return flash_attn_func(q, k, v, dropout, causal=True, window_size=_flash_window(window))
    count, device = q_BHTK.shape[2], q_BHTK.device
    if layout is None and (kernel == "eager" or (window is not None and count > window)):
        layout = band(count, window, device)
    if kernel == "eager":
        return eager(q_BHTK, k_BGSK, v_BGSK, layout, dropout)
    return masked(q_BHTK, k_BGSK, v_BGSK, layout, dropout)


def band(count: int, window: int | None, device: torch.device, before: int = 0) -> Tensor:
    """The keys that each of `count` tokens sees, of its row and `before` earlier ones: (1, 1, T, S) bool."""
    seen_TS = torch.ones(count, before + count, dtype=torch.bool, device=device).tril(before)
    return (seen_TS if window is None else seen_TS.triu(before + 1 - window))[None, None]


def visible(query_positions_BT: Tensor, key_positions_BS: Tensor, rows_BT: Tensor | None, window: int | None) -> Tensor:
    """Attention mask: True where a token may look at a key, itself or an earlier one of its row. (B, 1, T, S) bool.

    A key position of -1 is padding. The queries are the last T of the S keys; `rows_BT` (then S is T) are numbers of
    rows in packs. `window`: how far back, in tokens. A token that sees no key looks at itself: a softmax over nothing
    is NaN.
    """
    q_BT1, k_B1S = query_positions_BT[:, :, None], key_positions_BS[:, None, :]
    seen_BTS = (k_B1S >= 0) & (k_B1S <= q_BT1)
    if window is not None:
        seen_BTS &= q_BT1 - k_B1S < window
    if rows_BT is not None:
        seen_BTS &= rows_BT[:, :, None] == rows_BT[:, None, :]
    count, total = seen_BTS.shape[1:]
    itself_TS = torch.eye(total, dtype=torch.bool, device=seen_BTS.device)[total - count :]
    seen_BTS |= itself_TS & ~seen_BTS.any(-1, keepdim=True)
    return seen_BTS[:, None]


# -- one row, or a mask ------------------------------------------------------------------------------------------


def masked(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_B1TS: Tensor | None, dropout: float) -> Tensor:
    """torch's fused attention: (B, T, H, K). None as a mask: causal."""
    groups, grouped = k_BGSK.shape[1], q_BHTK.shape[1] != k_BGSK.shape[1]
    if mask_B1TS is not None and grouped and q_BHTK.shape[2] == 1:
        # The heads of a group as tokens that all see the same keys: nothing is repeated.
        q_BGnK = q_BHTK.squeeze(2).unflatten(1, (groups, -1))
        out_BGnK = F.scaled_dot_product_attention(q_BGnK, k_BGSK, v_BGSK, attn_mask=mask_B1TS, dropout_p=dropout)
        return out_BGnK.flatten(1, 2)[:, None]
    if mask_B1TS is not None and grouped:  # CUDA's kernels that take a mask know no groups
        k_BGSK, v_BGSK, grouped = *_repeated(q_BHTK, k_BGSK, v_BGSK), False
    causal = mask_B1TS is None and q_BHTK.shape[2] > 1
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask_B1TS, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
    ).transpose(1, 2)


def eager(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_B1TS: Tensor | None, dropout: float) -> Tensor:
    """Attention written out, its softmax in float32: (B, T, H, K)."""
    k_BHSK, v_BHSK = _repeated(q_BHTK, k_BGSK, v_BGSK)
    scores_BHTS = q_BHTK @ k_BHSK.transpose(-2, -1) * q_BHTK.shape[-1] ** -0.5
    if mask_B1TS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask_B1TS, torch.finfo(scores_BHTS.dtype).min)
    weights_BHTS = scores_BHTS.softmax(-1, dtype=torch.float32).to(q_BHTK.dtype)
    return (F.dropout(weights_BHTS, dropout) @ v_BHSK).transpose(1, 2)


def _repeated(q_BHTK: Tensor, *groups: Tensor) -> list[Tensor]:
    """Keys and values once for each head of queries."""
    return [x.repeat_interleave(q_BHTK.shape[1] // x.shape[1], dim=1) for x in groups]


# -- rows that follow one another --------------------------------------------------------------------------------


@torch.compiler.disable  # compiled, there would be a version for each list of lengths
def rows_in_sequence(
    q_1HTK: Tensor,
    k_1GTK: Tensor,
    v_1GTK: Tensor,
    layout: SequenceLayout,
    kernel: str = "sdpa",
    dropout: float = 0.0,
    window: int | None = None,
    join: Join = joined,
) -> Tensor:
    """Causal attention of each row to itself: (1, T, H, K); at the cost of the rows, on a GPU by one kernel."""
    dtype = autocast_dtype(q_1HTK.device.type)  # as autocast would have it, which does not know all these kernels
    if dtype is not None:
        q_1HTK, k_1GTK, v_1GTK = (x.to(dtype) for x in (q_1HTK, k_1GTK, v_1GTK))
    if kernel == "flash_attention_2":
        from flash_attn import flash_attn_varlen_func

        q, k, v = (x[0].transpose(0, 1) for x in (q_1HTK, *_keys_of_rows(k_1GTK, v_1GTK, layout)))
        bounds, back = _bounds(layout, q.device), _flash_window(window)
        return flash_attn_varlen_func(q, k, v, *bounds, dropout_p=dropout, causal=True, window_size=back)[None]
    half = q_1HTK.dtype in HALF and q_1HTK.shape[-1] in WIDTHS
    if half and dropout == 0 and has_varlen(q_1HTK.device, window):
        return by_varlen(q_1HTK, k_1GTK, v_1GTK, layout, window)
    return by_row(q_1HTK, k_1GTK, v_1GTK, layout.lengths, dropout, window, join, layout.shared)


def _keys_of_rows(k_1GTK: Tensor, v_1GTK: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """Keys and values that the rows meet, row after row; shared ones stand there again."""
    if layout.keys is None:
        return k_1GTK, v_1GTK
    keys = layout.keys.to(k_1GTK.device, non_blocking=True)
    return k_1GTK.index_select(2, keys), v_1GTK.index_select(2, keys)


def _bounds(layout: SequenceLayout, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Bounds of rows among queries and among keys, and the longest of each, for kernels of all rows at once.

    Where a row has more keys than queries, these kernels align the last query with the last key.
    """
    ends = layout.cu_seqlens.to(device, non_blocking=True)  # layers may be spread over devices
    key_ends = ends if layout.cu_seqlens_k is None else layout.cu_seqlens_k.to(device, non_blocking=True)
    return ends, key_ends, layout.max_length, layout.max_keys


def _flash_window(window: int | None) -> tuple[int, int]:
    return (-1, 0) if window is None else (window - 1, 0)


def has_varlen(device: torch.device, window: int | None = None) -> bool:
    """True if torch has a kernel for all rows at once on the device: from compute capability 8, since torch 2.10."""
    if device.type != "cuda" or torch.version.hip is not None or not _is_recent(device):
        return False
    return bool(_varlen_arguments()) and (window is None or "window_size" in _varlen_arguments())


@cache
def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _varlen_arguments() -> frozenset[str]:
    """Names of the arguments of torch's `varlen_attn`; it came with torch 2.10, groups and windows later."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(signature(varlen_attn).parameters)


def by_varlen(
    q_1HTK: Tensor, k_1GTK: Tensor, v_1GTK: Tensor, layout: SequenceLayout, window: int | None = None
) -> Tensor:
    """Causal attention of each row to itself, by one kernel, without dropout: (1, T, H, K), as `by_row`."""
    from torch.nn.attention.varlen import varlen_attn

    arguments = _varlen_arguments()
    k_1GTK, v_1GTK = _keys_of_rows(k_1GTK, v_1GTK, layout)
    options: dict[str, Any] = (
        {"window_size": _flash_window(window)} if "window_size" in arguments else {"is_causal": True}
    )
    if q_1HTK.shape[1] != k_1GTK.shape[1]:
        if "enable_gqa" in arguments:
            options["enable_gqa"] = True
        else:
            k_1GTK, v_1GTK = _repeated(q_1HTK, k_1GTK, v_1GTK)
    q_THK, k_TGK, v_TGK = (x[0].transpose(0, 1).contiguous() for x in (q_1HTK, k_1GTK, v_1GTK))
    out: Any = varlen_attn(q_THK, k_TGK, v_TGK, *_bounds(layout, q_THK.device), **options)
    return out[None]


def by_row(
    q_1HTK: Tensor,
    k_1GTK: Tensor,
    v_1GTK: Tensor,
    lengths: tuple[int, ...],
    dropout: float = 0.0,
    window: int | None = None,
    join: Join = joined,
    shared: tuple[int, ...] = (),
) -> Tensor:
    """Causal attention of each row to itself, one after the other; `lengths` add up to T. Returns (1, T, H, K).

    `shared`: first tokens of the row before that a row begins with, see `SequenceLayout`.
    """
    grouped = q_1HTK.shape[1] != k_1GTK.shape[1]
    q_rows, *keys_and_values = (x.split(list(lengths), dim=2) for x in (q_1HTK, k_1GTK, v_1GTK))
    rows = []
    for n, q in enumerate(q_rows):
        count, before = q.shape[2], shared[n] if shared else 0
        k, v = (x[n] if not before else torch.cat([x[n - 1][:, :, :before], x[n]], 2) for x in keys_and_values)
        narrow = window is not None and before + count > window
        mask = band(count, window, q.device, before) if narrow or before else None
        in_groups = grouped
        if mask is not None and grouped and q.device.type == "cuda":  # its kernels that take a mask know no groups
            k, v, in_groups = *_repeated(q, k, v), False
        rows.append(F.scaled_dot_product_attention(q, k, v, mask, dropout, mask is None, enable_gqa=in_groups))
    return join(*rows)
