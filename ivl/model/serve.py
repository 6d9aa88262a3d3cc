"""Continuous batching: prompts join while others are answered, and an answer leaves as soon as it ends.

    engine = Engine(model, Ends(eos_ids), max_new_tokens=128)
    engine.submit(Request(0, input_ids, tiles))
    for request in engine.run(): request.answer

A long answer holds nobody up, nothing is computed for rows that have ended, and no answer depends on the others.

Shapes: B rows of a group, n rows being decoded, T tokens of the longest prompt of a group, N tiles, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivl.model.generate import Answer, Choice, Ends, Memory, NotFinite, answer_room, not_finite, read, searched
from ivl.model.slots import Slots, keep_order
from ivl.types import UserError

if TYPE_CHECKING:
    from ivl.model.internvl import InternVL


@dataclass(frozen=True)
class Batching:
    """How many rows are worked on at the same time. Says nothing about answers: they are the same for any values."""

    rows: int = 32
    """Most rows that are decoded together."""
    tokens: int = 32768
    """Most tokens in the key-value cache, room for the answers included; one row is always taken."""
    prefill_tokens: int = 8192
    """Most tokens of prompts that are read together; the vision encoder runs once over their tiles."""

    def __post_init__(self) -> None:
        for name in ("rows", "tokens", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"batching: {name}: expected at least 1, found {getattr(self, name)}")


@dataclass
class Request:
    """A prompt, and its answer as it grows."""

    key: Any
    """The caller's own"""
    input_ids: Tensor
    """(T,) int64"""
    tiles: Tensor
    """(N, 3, S, S) uint8"""
    max_new_tokens: int | None = None
    """The longest answer; None: the engine's"""
    seed: int = 0
    """Of this row's sampling"""
    answer: Answer = field(default_factory=Answer)
    """Its tokens so far, with the one that ended it, and why it ended"""
    error: str = ""
    """Why there is no answer"""
    room: int = 0
    """Most tokens of its answer, once it is submitted: `max_new_tokens`, or what the model's context has left"""

    def __len__(self) -> int:
        return len(self.input_ids)


def row_seed(seed: int, row: int) -> int:
    """The seed of a row, the same however rows are batched and shared out."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {row}".encode(), digest_size=7).digest(), "big")


class Engine:
    """Answers requests in the order they were submitted, as far as the limits of `Batching` let several be at work.

    Rows of like length together are the least work: a group of prompts is padded to its longest, and a step looks at
    as many keys as the longest row has.
    """

    def __init__(
        self,
        model: InternVL,
        ends: Ends | None = None,
        choose: Choice = Choice(),
        max_new_tokens: int = 128,
        num_beams: int = 1,
        batching: Batching = Batching(),
    ) -> None:
        """`ends` None: the checkpoint's own end tokens. `num_beams` above 1: beam search, one row after another."""
        if model.training:
            raise UserError("generate: the model is in training mode; call model.eval() first")
        choose.check_beams(num_beams)
        self.model = model
        self.ends = Ends(model.eos_ids) if ends is None else ends
        self.choose, self.max_new_tokens, self.num_beams, self.batching = choose, max_new_tokens, num_beams, batching
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._generators: list[torch.Generator] = []
        self._slots = Slots(batching.rows)

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn. Raises UserError where it fills the model's context."""
        request.room = answer_room(self.model, len(request), self._longest(request))
        self.waiting.append(request)

    def _longest(self, request: Request) -> int:
        """Most tokens of its answer, where the context has room for them."""
        return self.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens

    @property
    def busy(self) -> bool:
        """Whether any request is not answered."""
        return bool(self.waiting or self.running)

    @property
    def hungry(self) -> bool:
        """Whether more requests should be submitted before the next step, so that whole groups can be formed."""
        return len(self.waiting) < self._least_free

    @property
    def _least_free(self) -> int:
        # Prompts are read in groups: a call for each would cost about as much as a step of all the others.
        return max(1, self.batching.rows // 8)

    def run(self) -> Iterator[Request]:
        """Everything submitted, each as its answer ends."""
        while self.busy:
            yield from self.step()

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Read a group of waiting prompts where there is room, and give all rows their next token.

        Returns the requests whose answers have ended.
        """
        if self.num_beams > 1:
            return [self._searched(self.waiting.popleft())] if self.waiting else []
        over = []
        if group := self._next_group():
            over += self._read(group)
        if self.running:
            over += self._decode()
        return over

    # -- reading prompts -----------------------------------------------------------------------------------------

    def _next_group(self) -> list[Request]:
        """The next waiting requests that fit together and beside what is running."""
        limits, running = self.batching, len(self.running)
        if running and limits.rows - running < self._least_free:
            return []
        widest = max((len(r) + r.room for r in self.running), default=0)
        group: list[Request] = []
        shortest = longest = 0
        while self.waiting:
            request = self.waiting[0]
            size = len(request)
            widest = max(widest, size + request.room)
            shortest, longest = min(shortest or size, size), max(longest, size)
            count = len(group) + 1
            too_many = running + count > limits.rows or (
                running + count > 1 and (running + count) * widest > limits.tokens
            )
            # No more padding than tokens.
            too_long = count > 1 and (count * longest > limits.prefill_tokens or longest > 2 * shortest)
            if too_many or too_long:
                break
            group.append(self.waiting.popleft())
        return group

    def _read(self, group: Sequence[Request]) -> list[Request]:
        """Prompts → their first tokens; those that go on get a slot."""
        lengths = [len(request) for request in group]
        ids_BT = torch.zeros(len(group), max(lengths), dtype=torch.long)
        for row, request in enumerate(group):
            ids_BT[row, : lengths[row]] = request.input_ids
        mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        device = self.model.device
        tiles_N3SS = torch.cat([request.tiles for request in group]).to(device)
        tiles_per_row = torch.tensor([len(request.tiles) for request in group])
        memory = Memory()
        embeds_BTD = self.model.embed(ids_BT.to(device), tiles_N3SS, tiles_per_row)
        logits_BV = read(self.model.language_model, embeds_BTD, mask_BT.to(device), memory)
        for request in group:
            request.tiles = request.tiles.new_empty(0, *request.tiles.shape[1:])  # no longer needed
        generators = [torch.Generator().manual_seed(request.seed) for request in group]
        over = self._say(group, generators, logits_BV)
        staying = [row for row in range(len(group)) if row not in over]
        self._slots.add(memory.cache, staying, [lengths[row] for row in staying])
        self.running += [group[row] for row in staying]
        self._generators += [generators[row] for row in staying]
        return [group[row] for row in over]

    # -- decoding ------------------------------------------------------------------------------------------------

    def _decode(self) -> list[Request]:
        """The next token of every running row."""
        slots, language_model, device = self._slots, self.model.language_model, self.model.device
        ids_n = torch.tensor([request.answer[-1] for request in self.running], device=device)
        embeds_n1D = language_model.get_input_embeddings()(ids_n)[:, None]
        seen_nK = slots.seen(device, language_model.config.sliding_window)
        mask = None if seen_nK is None else seen_nK[:, None, None]
        hidden_n1D = language_model.model(embeds_n1D, slots.positions(device), mask, slots)
        slots.advance()
        over = self._say(self.running, self._generators, language_model.lm_head(hidden_n1D[:, -1]))
        if not over:
            return []
        ended = [self.running[row] for row in over]
        slots.drop(over)
        keep_order(self.running, over)
        keep_order(self._generators, over)
        return ended

    def _say(self, requests: Sequence[Request], generators: list[torch.Generator], logits_BV: Tensor) -> list[int]:
        """Choose each row's next token. Returns the rows whose answers are over."""
        answers: list[list[int]] = [request.answer for request in requests]
        self.ends.hold_back(logits_BV, answers)
        over = []
        for row, token in enumerate(self.choose(logits_BV, answers, generators).tolist()):
            request = requests[row]
            if token < 0:
                request.error = not_finite(logits_BV.dtype)
                over.append(row)
                continue
            request.answer.append(token)
            if reason := self.ends.reason(request.answer, request.room, self._longest(request)):
                request.answer.finish_reason = reason
                over.append(row)
        return over

    def _searched(self, request: Request) -> Request:
        device = self.model.device
        tiles_per_row = torch.tensor([len(request.tiles)])
        embeds_1TD = self.model.embed(request.input_ids[None].to(device), request.tiles.to(device), tiles_per_row)
        longest, penalty = self._longest(request), self.choose.repetition_penalty
        try:
            request.answer = searched(self.model, embeds_1TD, self.num_beams, request.room, longest, self.ends, penalty)
        except NotFinite as error:
            request.error = str(error)
        return request
