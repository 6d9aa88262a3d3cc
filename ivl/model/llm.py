"""The language model: transformers' own classes, built from `llm_config`, given exactly the attention we mean.

Shapes: B rows, T tokens of this call, K tokens seen with those of the cache, D width, R half the width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache
from importlib.util import find_spec
from inspect import signature
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ivl.config import Config
from ivl.config_fields import LLM as LLM_FIELDS
from ivl.families import llm_family
from ivl.model import attention, blocks
from ivl.model.attention import given_rows
from ivl.model.blocks import WANTED
from ivl.types import UserError

AttentionKernel = Literal["auto", "sdpa", "eager", "flash_attention_2"]
KERNELS = get_args(AttentionKernel)


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """`bfloat16` → torch.bfloat16. Raises UserError for a name that is not a floating type."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype: expected float32, bfloat16 or float16, found {name!r}")
    return dtype


def choose_kernel(kernel: AttentionKernel, device: torch.device | str, dtype: torch.dtype) -> AttentionKernel:
    """The attention kernel that `kernel` means here; auto is flash_attention_2 where it can run, else sdpa.

    Raises UserError for an unknown name, and for flash_attention_2 where it cannot run.
    """
    if kernel not in KERNELS:
        raise UserError(f"attention: expected one of {', '.join(KERNELS)}, found {kernel!r}")
    installed = find_spec("flash_attn") is not None
    half = dtype in (torch.float16, torch.bfloat16)
    on_gpu = torch.device(device).type == "cuda"
    # flash-attn 2 has no kernels for GPUs before compute capability 8.
    old = on_gpu and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
    if kernel == "auto":
        return "flash_attention_2" if installed and half and on_gpu and not old else "sdpa"
    if kernel == "flash_attention_2" and not installed:
        raise UserError(
            "attention: flash_attention_2 needs the package flash-attn, which is not installed; "
            'pip install "ivl[flash]", or choose sdpa'
        )
    if kernel == "flash_attention_2" and not half:
        raise UserError(f"attention: flash_attention_2 computes in bfloat16 or float16, found {dtype}; choose sdpa")
    return kernel


def llm_config(config: Config) -> Any:
    """`config.llm` as the transformers config of the family's class. Raises UserError for what no release has."""
    from transformers import CONFIG_MAPPING

    raw = config.llm
    family = llm_family(config.llm_architecture)
    kind = CONFIG_MAPPING[family.model_type]
    names = {f.name for f in fields(kind) if f.init} & LLM_FIELDS.keys() & raw.keys() - set(_NOT_COPIED)
    values = {n: float(raw[n]) if LLM_FIELDS[n].kind is float else raw[n] for n in names if raw[n] is not None}
    values |= {new: raw[old] for old, new in family.renamed if old in raw}
    # The classes' defaults are ids of some other vocabulary.
    values |= {name: raw.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if values.get("use_sliding_window"):
        raise UserError("llm_config.use_sliding_window: true is not supported; expected false, as in every release")
    return kind(**values, **_rope(raw))


_NOT_COPIED = ("architectures", "dtype", "torch_dtype", "rope_parameters", "rope_scaling", "rope_theta")


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings in transformers' present spelling. Phi-3's `su` and `yarn` are both longrope;
    its yarn differs in the factor on cos and sin (microsoft/Phi-3-mini-128k-instruct, modeling_phi3.py)."""
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
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
    return {"rope_parameters": parameters}


class RotaryEmbedding(nn.Module):
    """cos and sin of each position: a function of the positions of this call and of nothing that came before.

    transformers' own module remembers the longest row it has seen, and lets the longest row of a batch decide for all.
    Here the frequencies of dynamic NTK and longrope follow from the length of a token's own row. Keys in a cache keep
    the frequencies they were made with, as in the reference: once a decoded row outgrows the limit, decoding with a
    cache and one long forward differ.

    It has no buffers, so it can be built on the meta device and is not rounded with the weights.
    """

    def __init__(self, theirs: nn.Module, config: Any) -> None:
        super().__init__()
        parameters = config.rope_parameters
        self.kind = parameters["rope_type"]
        self.limit: int | None = None
        """Rows up to this length do not depend on their length; None: none does"""
        with torch.device("cpu"):
            made: Any = type(theirs)(config)
            self.scale = made.attention_scaling
            self.inv_freq_R = self.long_inv_freq_R = made.inv_freq.detach().clone()
            if self.kind == "dynamic":
                self.limit = config.max_position_embeddings
                self.theta, self.factor = parameters["rope_theta"], parameters["factor"]
            elif self.kind == "longrope":
                self.limit = parameters["original_max_position_embeddings"]
                short_R, long_R = (torch.tensor(parameters[k]) for k in ("short_factor", "long_factor"))
                self.long_inv_freq_R = self.inv_freq_R * short_R / long_R

    def frequencies(self, positions_BT: Tensor) -> Tensor:
        """Angle per position of each token: (R,) or (B, T, R), float32."""
        if self.inv_freq_R.device != positions_BT.device:
            self.inv_freq_R, self.long_inv_freq_R = (
                x.to(positions_BT.device) for x in (self.inv_freq_R, self.long_inv_freq_R)
            )
        if self.limit is None:
            return self.inv_freq_R
        length_BT1 = row_lengths(positions_BT)[..., None]
        if self.kind == "longrope":
            return torch.where(length_BT1 > self.limit, self.long_inv_freq_R, self.inv_freq_R)
        half = len(self.inv_freq_R)
        stretch_BT1 = self.factor * length_BT1.clamp(min=self.limit) / self.limit - (self.factor - 1)
        theta_BT1 = self.theta * stretch_BT1 ** (half / (half - 1))
        return theta_BT1 ** (torch.arange(half, device=theta_BT1.device) / -half)

    @torch.no_grad()
    def forward(self, x_BTD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles_BTR = position_ids[..., None].float() * self.frequencies(position_ids)
        angles = torch.cat([angles_BTR, angles_BTR], dim=-1)
        return (angles.cos() * self.scale).to(x_BTD.dtype), (angles.sin() * self.scale).to(x_BTD.dtype)


def row_lengths(positions_BT: Tensor) -> Tensor:
    """Of each token, how long its row is with this call; a row begins where positions do not go on by one. (B, T)"""
    starts_BT = torch.zeros_like(positions_BT)
    starts_BT[:, 1:] = positions_BT.diff(dim=-1) != 1
    row_BT = starts_BT.cumsum(-1)
    longest_BT = torch.zeros_like(positions_BT).scatter_reduce(1, row_BT, positions_BT + 1, "amax")
    return longest_BT.gather(1, row_BT)


class Body(nn.Module):
    """The blocks of a `LanguageModel`, between its embeddings and its output layer."""

    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: RotaryEmbedding


class LanguageModel(nn.Module):
    """What is used of the causal language models of transformers, whose classes have no such type in common.

    For annotations only: nothing is an instance of it.
    """

    config: Any
    model: Body
    lm_head: nn.Linear
    get_input_embeddings: Callable[[], nn.Embedding]
    generate: Callable[..., Tensor]


def build_llm(config: Config, kernel: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The causal language model, on torch's default device (the meta device too), weights not loaded."""
    from transformers import AutoModelForCausalLM

    settings = llm_config(config)
    kernel = attention.register() if kernel == "sdpa" else kernel
    model = AutoModelForCausalLM.from_config(settings, attn_implementation=kernel, dtype=dtype)
    model.model.rotary_emb = RotaryEmbedding(model.model.rotary_emb, model.config)
    blocks.use(model)
    return model


def set_checkpointing(model: LanguageModel, on: bool) -> None:
    """Keep only the input of each layer in training, and compute the rest again in backward."""
    name = "enable" if on else "disable"
    # transformers 5 renamed it on the way; the old name warns in newer versions.
    old = getattr(model, f"gradient_checkpointing_{name}")
    switch = getattr(model, f"activation_checkpointing_{name}", old)
    switch(*([{"use_reentrant": False}] if on else []))
    for layer in model.model.layers if on else []:
        # transformers recomputes a layer only in training mode. A frozen language model is in eval mode, but what is
        # below it may train. Only the layer's own flag: dropout inside asks its own module.
        layer.training = True


def visible(query_positions_BT: Tensor, key_positions_BK: Tensor, rows_BT: Tensor | None, window: int | None) -> Tensor:
    """Which keys a token may look at: itself and earlier ones of its own row. (B, 1, T, K) bool.

    A key position of -1 is padding. The queries are the last T of the K keys; `rows_BT` (then K is T) are numbers of
    rows in packs. `window`: how far back, in tokens. What sees nothing looks at itself, lest a softmax be over nothing.
    """
    q_BT1, k_B1K = query_positions_BT[:, :, None], key_positions_BK[:, None, :]
    seen_BTK = (k_B1K >= 0) & (k_B1K <= q_BT1)
    if window is not None:
        seen_BTK &= q_BT1 - k_B1K < window
    if rows_BT is not None:
        seen_BTK &= rows_BT[:, :, None] == rows_BT[:, None, :]
    count, total = seen_BTK.shape[1:]
    itself_TK = torch.eye(total, dtype=torch.bool, device=seen_BTK.device)[total - count :]
    seen_BTK |= itself_TK & ~seen_BTK.any(-1, keepdim=True)
    return seen_BTK[:, None]


def attention_mask(model: LanguageModel, seen_B1TK: Tensor, dtype: torch.dtype) -> Tensor:
    """`visible` in the form that the model's kernel takes."""
    if model.config._attn_implementation != "eager":
        return seen_B1TK
    return torch.zeros(seen_B1TK.shape, dtype=dtype, device=seen_B1TK.device).masked_fill(
        ~seen_B1TK, torch.finfo(dtype).min
    )


def hidden_states(
    model: LanguageModel,
    embeds_BTD: Tensor,
    mask_BT: Tensor | None = None,
    positions_BT: Tensor | None = None,
    rows_BT: Tensor | None = None,
    lengths: Tensor | None = None,
    wanted_M: Tensor | None = None,
) -> Tensor:
    """The last hidden states of a causal language model, without a cache: (B, T, D); 0 at padding.

    `wanted_M`: flattened places of tokens; only theirs are returned, (M, D), and no others' are computed to the end.

    `mask_BT`: True where there is a token; `rows_BT`: numbers of rows where packed, -1 for padding. `lengths` (rows,),
    on the CPU: tokens of each row, packed or padded on the right, with positions from 0; None: looked for, which waits
    for the device. Only tokens of rows are computed.
    """
    (B, T, _), kernel = embeds_BTD.shape, model.config._attn_implementation
    if lengths is None:
        lengths = lengths_of(mask_BT, positions_BT, rows_BT, B, T)
    if lengths is None or kernel == "eager":
        hidden_BTD = _masked(model, embeds_BTD, mask_BT, positions_BT, rows_BT)
        return hidden_BTD if wanted_M is None else hidden_BTD.flatten(0, 1).index_select(0, wanted_M)
    counts = lengths.tolist()
    if wanted_M is None and rows_BT is None and min(counts) == T and fits(model, T):
        return model.model(inputs_embeds=embeds_BTD, use_cache=False).last_hidden_state
    flat_MD, places_R = embeds_BTD.flatten(0, 1), None
    if sum(counts) < len(flat_MD):
        places_R = places(lengths, T, packed=rows_BT is not None).to(flat_MD.device, non_blocking=True)
        flat_MD = flat_MD.index_select(0, places_R)
    positions_R = torch.cat([torch.arange(count) for count in counts]).to(flat_MD.device, non_blocking=True)
    given = given_rows(kernel, [count for count in counts if count], flat_MD)
    given |= {"inputs_embeds": flat_MD[None], "position_ids": positions_R[None], "use_cache": False}
    if wanted_M is not None:
        wanted_M = wanted_M if places_R is None else torch.searchsorted(places_R, wanted_M)
        given |= {WANTED: wanted_M} if kernel == attention.NAME else {}
    hidden_RD = model.model(**given).last_hidden_state[0]
    if wanted_M is not None:
        return hidden_RD if WANTED in given else hidden_RD.index_select(0, wanted_M)
    if places_R is not None:
        hidden_RD = hidden_RD.new_zeros(B * T, hidden_RD.shape[-1]).index_copy(0, places_R, hidden_RD)
    return hidden_RD.unflatten(0, (B, T))


def places(lengths: Tensor, T: int, packed: bool) -> Tensor:
    """(R,) where the tokens of rows are in a flattened batch: of rows padded on the right, or of one pack."""
    if packed:
        return torch.arange(int(lengths.sum()))
    return (torch.arange(T) < lengths[:, None]).flatten().nonzero()[:, 0]


def lengths_of(
    mask_BT: Tensor | None, positions_BT: Tensor | None, rows_BT: Tensor | None, B: int, T: int
) -> Tensor | None:
    """(rows,) tokens of each row, on the CPU; None where they are not runs from position 0, padded on the right."""
    if rows_BT is None:
        whole = torch.full((B,), T) if mask_BT is None else mask_BT.sum(1).cpu()
        return whole if is_plain(mask_BT, positions_BT) else None
    if B > 1 or positions_BT is None:
        return None
    rows, starts = rows_BT[0].cpu(), positions_BT[0].cpu() == 0
    own = rows[rows >= 0]
    _, counts = own.unique_consecutive(return_counts=True)
    begins = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    steps = torch.cat([torch.arange(int(count)) for count in counts])
    in_order = bool((rows[: len(own)] >= 0).all()) and len(own.unique()) == len(counts)
    return counts if in_order and starts[begins].all() and positions_BT[0, : len(own)].cpu().equal(steps) else None


def _masked(
    model: LanguageModel,
    embeds_BTD: Tensor,
    mask_BT: Tensor | None,
    positions_BT: Tensor | None,
    rows_BT: Tensor | None,
) -> Tensor:
    """Any layout, by a square mask: for the eager kernel, and for rows with padding inside."""
    body, window, count = model.model, getattr(model.config, "sliding_window", None), embeds_BTD.shape[1]
    if positions_BT is None:
        positions_BT = torch.arange(count, device=embeds_BTD.device).expand(len(embeds_BTD), -1)
    given: dict[str, Any] = {"inputs_embeds": embeds_BTD, "position_ids": positions_BT, "use_cache": False}
    if model.config._attn_implementation == "flash_attention_2":
        given |= {"attention_mask": mask_BT} if rows_BT is None else varlen(rows_BT)
    else:
        key_positions_BK = positions_BT if mask_BT is None else positions_BT.masked_fill(~mask_BT, -1)
        seen_B1TK = visible(positions_BT, key_positions_BK, rows_BT, window)
        given["attention_mask"] = attention_mask(model, seen_B1TK, embeds_BTD.dtype)
    return body(**given).last_hidden_state


def is_plain(mask_BT: Tensor | None, positions_BT: Tensor | None) -> bool:
    """Whether every row is one run of tokens from position 0, padded on the right."""
    plain = torch.tensor(True)
    if mask_BT is not None:
        plain = (mask_BT[:, 1:] <= mask_BT[:, :-1]).all()
    if positions_BT is not None:
        expected_BT = torch.arange(positions_BT.shape[1], device=positions_BT.device) == positions_BT
        plain = plain.to(expected_BT.device) & (expected_BT if mask_BT is None else expected_BT | ~mask_BT).all()
    return bool(plain)


def fits(model: LanguageModel, count: int) -> bool:
    """Whether `count` tokens stay inside the sliding window, and below the length where rotary frequencies change."""
    limits = (getattr(model.config, "sliding_window", None), model.model.rotary_emb.limit)
    return all(limit is None or count <= limit for limit in limits)


def with_cache(model: LanguageModel, cache: Any) -> dict[str, Any]:
    """The arguments that give the body of a model its cache."""
    return {_cache_argument(type(model.model).forward): cache, "use_cache": True}


@lru_cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    # Its name changed within transformers 5.
    return "cache" if "cache" in signature(forward).parameters else "past_key_values"


def varlen(rows_BT: Tensor) -> dict[str, Any]:
    """Where the rows of packs begin and end, as transformers hands it to flash attention."""
    flat = rows_BT.flatten()
    begins = torch.ones_like(flat, dtype=torch.bool)
    begins[1:] = flat[1:] != flat[:-1]
    begins[:: rows_BT.shape[1]] = True
    ends = torch.cat([begins.nonzero().flatten(), flat.new_tensor([len(flat)])]).to(torch.int32)
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
