"""Answers from prompts: greedy or sampled, many rows at once, on a key-value cache.

Rows stay padded on the right, as the collator makes them. The cache then has gaps: keys of padding, which are hidden
by their position of -1, while each row's own positions go on by one. Nothing has to be shifted to the left, a chat can
append its next turn to the cache, and a row's answer does not depend on its neighbours.

Shapes: B rows, T tokens of this call, K tokens in the cache, D width of the language model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ivl.model.attention import visible
from ivl.model.beams import beam_search
from ivl.model.decoder import LanguageModel
from ivl.model.kv_cache import GrowingCache
from ivl.model.sequence_layout import is_plain
from ivl.types import Batch, UserError

if TYPE_CHECKING:
    from ivl.model.internvl import InternVL


FinishReason = Literal["stop", "length", "context"]
"""Why an answer ended: an end token or stop text, its limit of new tokens, or the end of the model's context"""


class Answer(list[int]):
    """Token ids of an answer, with the token that ended it, and why it ended. Equal to a list of the same ids."""

    finish_reason: FinishReason = "length"


@dataclass
class Memory:
    """What the language model has read so far."""

    cache: GrowingCache = field(default_factory=GrowingCache)
    positions_BK: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    """(B, K) position in its row of each cached key, -1 for padding; B is 0 until something is read"""
    lengths_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """(B,) tokens of each row so far"""
    gaps: bool = False
    """Whether there is padding among the keys"""

    def select(self, rows: Sequence[int]) -> None:
        """Make these rows the rows, in this order; one may be taken several times."""
        self.cache.select(rows)
        self.positions_BK, self.lengths_B = self.positions_BK[list(rows)], self.lengths_B[list(rows)]


def read(model: LanguageModel, embeds_BTD: Tensor, mask_BT: Tensor, memory: Memory) -> Tensor:
    """Read T more tokens of each row, padded on the right, and remember them.

    Returns the logits (B, V) after each row's last token. `mask_BT`: True where there is a token.
    """
    count = embeds_BTD.shape[1]
    if len(memory.lengths_B) == 0:
        memory.lengths_B = mask_BT.new_zeros(len(mask_BT), dtype=torch.long)
        memory.positions_BK = memory.lengths_B.new_zeros(len(mask_BT), 0)
    first = memory.positions_BK.shape[1] == 0
    positions_BT = memory.lengths_B[:, None] + torch.arange(count, device=embeds_BTD.device)
    keys_BT = positions_BT.masked_fill(~mask_BT, -1)
    memory.positions_BK = torch.cat([memory.positions_BK, keys_BT], dim=1)
    memory.gaps |= count > 1 and not bool(mask_BT.all())
    total, window = memory.positions_BK.shape[1], model.config.sliding_window
    layout = None  # all keys before a token are seen: in a first read by the kernel's own causal path
    if not first and (count > 1 or memory.gaps or (window is not None and total > window)):
        layout = visible(positions_BT, memory.positions_BK, None, window)
    hidden_BTD = model.model(embeds_BTD, positions_BT.masked_fill(~mask_BT, 0), layout, memory.cache)
    own_B = mask_BT.sum(1)
    memory.lengths_B = memory.lengths_B + own_B
    last_BD = hidden_BTD[torch.arange(len(own_B), device=own_B.device), own_B - 1]
    return model.lm_head(last_BD)


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen from the logits. Greedy at temperature 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        problems = [
            text
            for wrong, text in (
                (self.temperature < 0, f"temperature: expected at least 0, found {self.temperature}"),
                (not 0 < self.top_p <= 1, f"top_p: expected above 0 and at most 1, found {self.top_p}"),
                (self.top_k < 0, f"top_k: expected at least 0, found {self.top_k}"),
                (
                    self.repetition_penalty <= 0,
                    f"repetition_penalty: expected above 0, found {self.repetition_penalty}",
                ),
            )
            if wrong
        ]
        if problems:
            raise UserError("; ".join(problems))

    def check_beams(self, num_beams: int) -> None:
        """Raise UserError where answers cannot be searched for with that many beams."""
        if num_beams < 1 or (num_beams > 1 and self.temperature > 0):
            raise UserError(
                f"num_beams: expected at least 1, and no more than 1 where tokens are sampled; found {num_beams} with "
                f"temperature {self.temperature}"
            )

    def __call__(self, logits_BV: Tensor, answers: list[list[int]], generators: list[torch.Generator]) -> Tensor:
        """One token id per row, (B,); -1 where logits are not finite, which the reader of the ids has to refuse
        (`check_finite`). `answers`: what each row has said so far, for the repetition penalty."""
        logits_BV = logits_BV.float()
        if self.repetition_penalty != 1.0:
            logits_BV = self._penalised(logits_BV, answers)
        # NaN and infinity are the largest of all. Told among the ids, since asking the device costs a wait.
        best_B, ids_B = logits_BV.max(-1)
        if self.temperature > 0.0:
            ids_B = self._drawn(logits_BV, generators)
        return torch.where(best_B.isfinite(), ids_B, -1)

    def _drawn(self, logits_BV: Tensor, generators: list[torch.Generator]) -> Tensor:
        """A token id per row by chance, (B,)."""
        sorted_BV, ids_BV = (logits_BV / self.temperature).sort(dim=-1, descending=True)
        if self.top_k:
            sorted_BV[:, self.top_k :] = -torch.inf
        p_BV = sorted_BV.softmax(-1)
        p_BV[p_BV.cumsum(-1) - p_BV >= self.top_p] = 0.0
        # One number per row and step, drawn on the CPU: the same on every device and for every neighbour.
        drawn_B1 = torch.stack([torch.rand(1, generator=g) for g in generators]).to(p_BV.device)
        mass_BV = p_BV.cumsum(-1)
        rank_B1 = torch.searchsorted(mass_BV, drawn_B1 * mass_BV[:, -1:], right=True)
        return ids_BV.gather(1, rank_B1.clamp(max=ids_BV.shape[1] - 1))[:, 0]

    def _penalised(self, logits_BV: Tensor, answers: list[list[int]]) -> Tensor:
        """As in transformers, over the answer alone: the reference feeds embeddings, so it cannot see the prompt."""
        logits_BV = logits_BV.clone()
        for row, said in enumerate(answers):
            seen = torch.tensor(sorted(set(said)), device=logits_BV.device, dtype=torch.long)
            old = logits_BV[row, seen]
            logits_BV[row, seen] = torch.where(old < 0, old * self.repetition_penalty, old / self.repetition_penalty)
        return logits_BV


@dataclass(frozen=True)
class Ends:
    """When an answer is over."""

    eos_ids: Sequence[int] = ()
    """Tokens that end it"""
    stop: Sequence[Sequence[int]] = ()
    """Sequences of tokens that end it"""
    stopped: Callable[[list[int]], bool] | None = None
    """Asked about the answer so far: for what is seen in its text only"""
    min_new_tokens: int = 0
    """None of these ends it before"""

    def reason(self, answer: list[int], room: int, max_new_tokens: int) -> FinishReason | None:
        """Why the answer ends with its last token; None: it goes on. `room`: the most tokens that it can have."""
        if answer and self.over(answer):
            return "stop"
        if len(answer) < room:
            return None
        return "length" if len(answer) >= max_new_tokens else "context"

    def over(self, answer: list[int]) -> bool:
        """Whether the last token ended the answer."""
        if answer[-1] in self.eos_ids:
            return True
        if len(answer) <= self.min_new_tokens:
            return False
        if any(answer[-len(s) :] == list(s) for s in self.stop):
            return True
        return self.stopped is not None and self.stopped(answer)

    def hold_back(self, logits_BV: Tensor, answers: Sequence[list[int]]) -> None:
        """Make the ends impossible, in place, where an answer is too short."""
        short = [row for row, answer in enumerate(answers) if len(answer) < self.min_new_tokens]
        if short and self.eos_ids:
            ends = torch.tensor(sorted(set(self.eos_ids)), device=logits_BV.device)
            logits_BV[torch.tensor(short, device=logits_BV.device)[:, None], ends] = -torch.inf


class NotFinite(UserError):
    """Logits of a row are NaN or infinite. `row`: which of the batch."""

    def __init__(self, row: int, dtype: torch.dtype) -> None:
        super().__init__(not_finite(dtype))
        self.row = row


def not_finite(dtype: torch.dtype) -> str:
    """What to do about logits that are not finite, as a message."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        return (
            "the model's logits are not finite in float16, whose largest number is 65504; compute in bfloat16 or "
            "float32 (chat: --dtype bfloat16; predict, validate and fit: --trainer.precision bf16-true or 32-true)"
        )
    return (
        f"the model's logits are not finite in {name}: its weights hold NaN or are far too large, as after a training "
        "that diverged; use an earlier checkpoint, or read the weights again from their source"
    )


def check_finite(ids: Sequence[int], dtype: torch.dtype) -> None:
    """Raise NotFinite where `Choice` found no token for a row."""
    for row, token in enumerate(ids):
        if token < 0:
            raise NotFinite(row, dtype)


@torch.no_grad()
def steps(
    model: InternVL,
    batch: Batch,
    answers: Sequence[Answer],
    max_new_tokens: int,
    ends: Ends,
    choose: Choice,
    seed: int,
    all_done: Callable[[bool], bool] = bool,
) -> Iterator[list[int | None]]:
    """The next token of each row, step after step, also added to `answers`; None where the row has ended."""
    _check(model, batch)
    rooms = [answer_room(model, length, max_new_tokens) for length in batch.attention_mask.sum(1).tolist()]
    generators = [torch.Generator().manual_seed(seed) for _ in answers]
    running = [True] * len(answers)
    embeds_BTD = model.embed(batch.input_ids, batch.tiles, batch.tiles_per_row)
    mask_BT = batch.attention_mask
    memory = Memory()
    for _ in range(max_new_tokens):
        logits_BV = read(model.language_model, embeds_BTD, mask_BT, memory)
        ends.hold_back(logits_BV, answers)
        ids_B = choose(logits_BV, list(answers), generators)
        new = [token if alive else None for token, alive in zip(ids_B.tolist(), running)]
        check_finite([0 if token is None else token for token in new], logits_BV.dtype)
        for row, token in enumerate(new):
            if token is not None:
                answers[row].append(token)
                if reason := ends.reason(answers[row], rooms[row], max_new_tokens):
                    running[row], answers[row].finish_reason = False, reason
        yield new
        if all_done(not any(running)):
            return
        embeds_BTD = model.language_model.get_input_embeddings()(ids_B.clamp(min=0))[:, None]
        mask_BT = torch.ones_like(ids_B, dtype=torch.bool)[:, None]


def _check(model: InternVL, batch: Batch) -> None:
    if model.training:
        raise UserError("generate: the model is in training mode; call model.eval() first")
    if batch.row_ids is not None:
        raise UserError("generate: the batch is packed; expected padded prompts, collate(..., packed=False)")
    if not is_plain(batch.attention_mask, None):
        raise UserError("generate: expected prompts padded on the right, as the collator makes them")


def answer_room(model: InternVL, prompt: int, max_new_tokens: int) -> int:
    """Most tokens of an answer to a prompt of that many tokens: `max_new_tokens`, or what the context has left.

    Raises UserError where it has none.
    """
    limit = model.language_model.config.max_position_embeddings
    if prompt >= limit:
        raise UserError(
            f"generate: a prompt of {prompt} tokens and its answer exceed the model's context of {limit}; use fewer "
            "tiles or a shorter prompt"
        )
    return min(max_new_tokens, limit - prompt)


def generate(
    model: InternVL,
    batch: Batch,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    eos_ids: Sequence[int] | None = None,
    stop: Sequence[Sequence[int]] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    all_done: Callable[[bool], bool] = bool,
    stopped: Callable[[list[int]], bool] | None = None,
    num_beams: int = 1,
) -> list[Answer]:
    """The new token ids of each row, with the token that ended it; a batch of prompts of any lengths.

    Each is a list of ids with a `finish_reason`: stop, length (`max_new_tokens`) or context (the model's is full).
    `eos_ids` end a row, by default the checkpoint's own, as does a sequence of `stop`, or `stopped`, which is asked
    about the tokens so far; but not within `min_new_tokens`.
    `seed`: each row draws from a generator of its own, so a sampled answer does not depend on its neighbours.
    `repetition_penalty` is over the answer alone. `all_done` makes this process go on until all others are done: it is
    given whether this one is, and returns whether all are. `num_beams` above 1: beam search, one row after another.
    Raises UserError where a prompt fills the context, logits are not finite, or an option is out of range.
    """
    choose = Choice(temperature, top_p, top_k, repetition_penalty)
    ends = Ends(model.eos_ids if eos_ids is None else eos_ids, stop, stopped, min_new_tokens)
    batch = batch.to(model.device)
    if num_beams > 1:
        _check(model, batch)
        choose.check_beams(num_beams)
        return _searched(model, batch, num_beams, max_new_tokens, ends, repetition_penalty)
    answers = [Answer() for _ in range(len(batch.input_ids))]
    for _ in steps(model, batch, answers, max_new_tokens, ends, choose, seed, all_done):
        pass
    return answers


@torch.no_grad()
def _searched(
    model: InternVL, batch: Batch, num_beams: int, max_new_tokens: int, ends: Ends, repetition_penalty: float
) -> list[Answer]:
    embeds_BTD = model.embed(batch.input_ids, batch.tiles, batch.tiles_per_row)
    lengths = batch.attention_mask.sum(1).tolist()
    rooms = [answer_room(model, length, max_new_tokens) for length in lengths]
    return [
        searched(model, row_TD[None, :length], num_beams, room, max_new_tokens, ends, repetition_penalty)
        for row_TD, length, room in zip(embeds_BTD, lengths, rooms)
    ]


def searched(
    model: InternVL, embeds_1TD: Tensor, num_beams: int, room: int, max_new_tokens: int, ends: Ends, penalty: float
) -> Answer:
    """The answer to one prompt by beam search. `room`: the most tokens that it can have."""
    answer = Answer(beam_search(model.language_model, embeds_1TD, num_beams, room, ends, penalty))
    check_finite(answer[:1], embeds_1TD.dtype)
    answer.finish_reason = ends.reason(answer, room, max_new_tokens) or "stop"
    return answer


def stream(
    model: InternVL,
    batch: Batch,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    eos_ids: Sequence[int] | None = None,
    stop: Sequence[Sequence[int]] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stopped: Callable[[list[int]], bool] | None = None,
) -> Generator[int, None, FinishReason]:
    """The new token ids of one row as they are made; the settings of `generate`. Returns why the answer ended."""
    if len(batch.input_ids) != 1:
        raise UserError(f"stream: expected a batch of one row, found {len(batch.input_ids)}")
    choose = Choice(temperature, top_p, top_k, repetition_penalty)
    ends = Ends(model.eos_ids if eos_ids is None else eos_ids, stop, stopped, min_new_tokens)
    answer = Answer()
    for (token,) in steps(model, batch.to(model.device), [answer], max_new_tokens, ends, choose, seed):
        if token is not None:
            yield token
    return answer.finish_reason
