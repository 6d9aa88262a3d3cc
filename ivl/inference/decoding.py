"""Forward passes of inference: reading prompts into the cache, and the decoding step.

`decode_step` is one function of tensors: rows, columns and the kinds of sampling are its only Python numbers, it reads
nothing back, and its shapes stay the same until the cache grows. So it compiles whole, and a GPU can replay it as a
CUDA graph.

Shapes: R slots, n rows being decoded, B rows being read, T tokens of them all, C columns of the cache, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ivl.inference.kv_cache import Append, Decode, KVCache, Prefill
from ivl.inference.sampling import forbid, penalise_repetition, sample, uniform
from ivl.model.decoder import LanguageModel
from ivl.options.generation import SamplingParams
from ivl.types import SequenceLayout


def prefill(
    model: LanguageModel, embeds_1TD: Tensor, lengths: Sequence[int], cache: KVCache, slots: Sequence[int]
) -> Tensor:
    """Read prompts that follow one another in one sequence into their slots.

    Returns the logits (B, V) after each prompt's last token; nothing else is computed to the end.
    """
    device = embeds_1TD.device
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    layout = SequenceLayout(tuple(lengths), torch.cat([torch.arange(n) for n in lengths])[None], ends)
    last_B = (layout.cu_seqlens[1:].long() - 1).to(device, non_blocking=True)
    layout = layout.to(device, non_blocking=True)
    view = Prefill(cache, slots, lengths)
    hidden_1BD = model.model(embeds_1TD, layout.positions, layout, view, last_B)
    return model.lm_head(hidden_1BD[0])


def append(model: LanguageModel, embeds_1TD: Tensor, cache: KVCache, slot: int, start: int) -> Tensor:
    """Read tokens that go on the row of a slot after its first `start`. Returns the logits (1, V) after the last."""
    count, device = embeds_1TD.shape[1], embeds_1TD.device
    positions_1T = torch.arange(start, start + count, device=device)[None]
    seen_1TS = keys_seen(positions_1T, start + count, model.config.sliding_window)
    last_1 = torch.tensor([count - 1]).to(device, non_blocking=True)
    hidden_11D = model.model(embeds_1TD, positions_1T, seen_1TS[:, None], Append(cache, slot, start), last_1)
    return model.lm_head(hidden_11D[0])


def keys_seen(positions_BT: Tensor, columns: int, window: int | None) -> Tensor:
    """Mask of the first `columns` keys, (B, T, C) bool: True where a token sees one."""
    columns_C = torch.arange(columns, device=positions_BT.device)
    seen_BTC = columns_C <= positions_BT[..., None]
    return seen_BTC if window is None else seen_BTC & (columns_C > positions_BT[..., None] - window)


def next_logits(model: LanguageModel, cache: KVCache, ids_n: Tensor, positions_n: Tensor, columns: int) -> Tensor:
    """Feed one more token to each of the first n slots, at these positions. Returns the logits (n, V) after it."""
    embeds_n1D = model.get_input_embeddings()(ids_n)[:, None]
    seen_n1C = keys_seen(positions_n[:, None], columns, model.config.sliding_window)
    hidden_n1D = model.model(embeds_n1D, positions_n[:, None], seen_n1C[:, None], Decode(cache, positions_n, columns))
    return model.lm_head(hidden_n1D[:, 0])


class DecodingState:
    """Tensors of the rows being decoded, one entry for each slot, on the device."""

    def __init__(
        self,
        rows: int,
        vocab_size: int,
        device: torch.device,
        eos_ids: Sequence[int] = (),
        min_new_tokens: int = 0,
        penalised: bool = False,
    ) -> None:
        """`min_new_tokens`: end tokens are not chosen before. `penalised`: remember the tokens of each answer."""

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(rows, dtype=dtype, device=device)

        self.ids_R = zeros(torch.long)
        """Last token of each row, the next step's input"""
        self.positions_R = zeros(torch.long)
        """Position of that token: the cache column that the next step writes"""
        self.counts_R = zeros(torch.long)
        """Tokens of the answer so far"""
        self.seeds_R = zeros(torch.long)
        self.temperature_R, self.top_p_R, self.penalty_R = (zeros(torch.float32) for _ in range(3))
        self.top_k_R = zeros(torch.long)
        self.min_new_tokens = min_new_tokens if eos_ids else 0
        self.eos_E = torch.tensor(sorted(set(eos_ids)), dtype=torch.long).to(device, non_blocking=True)
        seen_shape = (rows, vocab_size if penalised else 0)
        self.seen_RV = torch.zeros(seen_shape, dtype=torch.bool, device=device)

    @property
    def rows(self) -> int:
        """Capacity"""
        return len(self.ids_R)

    def _tensors(self) -> list[Tensor]:
        return [tensor for name, tensor in vars(self).items() if name.endswith(("_R", "_RV"))]

    def copy(self) -> list[Tensor]:
        """Return copies of the rows' tensors, for `restore`."""
        return [tensor.clone() for tensor in self._tensors()]

    def restore(self, tensors: Sequence[Tensor]) -> None:
        """Write back what `copy` returned."""
        for tensor, saved in zip(self._tensors(), tensors, strict=True):
            tensor.copy_(saved)

    def grow(self, rows: int) -> None:
        """Make room for more rows."""
        for name, tensor in list(vars(self).items()):
            if name.endswith(("_R", "_RV")):
                larger = tensor.new_zeros(rows, *tensor.shape[1:])
                larger[: len(tensor)] = tensor
                setattr(self, name, larger)

    def admit(self, first: int, lengths: Sequence[int], params: Sequence[SamplingParams], seeds: Sequence[int]) -> None:
        """Set the rows from slot `first` on: prompts of these lengths that have been read, without an answer yet."""

        def put(target_R: Tensor, numbers: Sequence[float]) -> None:
            values = torch.tensor(list(numbers), dtype=target_R.dtype)
            target_R[first : first + len(values)] = values.to(target_R.device, non_blocking=True)

        put(self.positions_R, [length - 1 for length in lengths])
        put(self.counts_R, [0] * len(lengths))
        put(self.seeds_R, seeds)
        put(self.temperature_R, [one.temperature for one in params])
        put(self.top_p_R, [one.top_p for one in params])
        put(self.top_k_R, [one.top_k for one in params])
        put(self.penalty_R, [one.repetition_penalty for one in params])
        self.seen_RV[first : first + len(lengths)] = False

    def move(self, source: int, target: int) -> None:
        """Copy a row to another slot."""
        for tensor in self._tensors():
            tensor[target] = tensor[source]


def choose_next(
    state: DecodingState, logits_nV: Tensor, first: int, sampled: bool, penalised: bool, logprobs: bool
) -> Tensor:
    """Choose the next token of the rows from slot `first` on, and write it into the state.

    Returns (n, 3) float32, the only thing that is read back: token id (exact below 2^24), largest logit (not finite
    where any logit is NaN or infinite), log-probability of the token before any setting (0 without `logprobs`).
    """
    rows = slice(first, first + len(logits_nV))
    logits_nV = logits_nV.float()
    largest_n, ids_n = logits_nV.max(-1)
    raw_nV = logits_nV
    if penalised:
        logits_nV = penalise_repetition(logits_nV, state.seen_RV[rows], state.penalty_R[rows])
    if state.min_new_tokens:
        logits_nV = forbid(logits_nV, state.counts_R[rows] < state.min_new_tokens, state.eos_E)
    if sampled:
        uniform_n = uniform(state.seeds_R[rows], state.counts_R[rows])
        chances = state.temperature_R[rows], state.top_k_R[rows], state.top_p_R[rows], uniform_n
        ids_n = sample(logits_nV, *chances)
    elif penalised or state.min_new_tokens:
        ids_n = logits_nV.argmax(-1)
    if penalised:
        state.seen_RV[rows] = state.seen_RV[rows].scatter(1, ids_n[:, None], True)
    state.ids_R[rows] = ids_n
    state.positions_R[rows] += 1
    state.counts_R[rows] += 1
    logprobs_n = torch.zeros_like(largest_n)
    if logprobs:
        logprobs_n = raw_nV.gather(1, ids_n[:, None])[:, 0] - raw_nV.logsumexp(-1)
    return torch.stack([ids_n.float(), largest_n, logprobs_n], dim=1)


def decode_step(
    model: LanguageModel,
    cache: KVCache,
    state: DecodingState,
    rows: int,
    columns: int,
    sampled: bool,
    penalised: bool,
    logprobs: bool,
) -> Tensor:
    """Feed each of the first `rows` slots its last token and choose the next. Returns as `choose_next`.

    `columns`: how many columns of the cache are looked at, more than any row's position.
    """
    # A graph's rows beyond those that are decoded go on counting.
    positions_n = state.positions_R[:rows].clamp(max=columns - 1)
    logits_nV = next_logits(model, cache, state.ids_R[:rows], positions_n, columns)
    return choose_next(state, logits_nV, 0, sampled, penalised, logprobs)
