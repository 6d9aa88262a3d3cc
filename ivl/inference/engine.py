"""Inference engine with continuous batching: requests join and leave between decoding steps.

    engine = Engine(model, StoppingCriteria(eos_ids), max_new_tokens=128)
    engine.submit(Request(0, input_ids, tiles))
    for request in engine.run(): request.answer, request.answer.finish_reason

    waiting → prefill, in groups → slots of the KV cache → decoding steps of all rows → finished

Validation, prediction, chat and `InternVL.generate` all decode here. No answer depends on the others, on when a request
comes, or on how many are worked on at a time (continuous batching, as in Orca, Yu et al. 2022).

Shapes: T tokens of a prompt, N tiles, S pixels a side of a tile, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ivl.inference import decoding
from ivl.inference.beam_search import beam_search
from ivl.inference.graphs import StepRunner
from ivl.inference.kv_cache import COLUMNS, KVCache
from ivl.inference.prefix_cache import PrefixCache, TileModel
from ivl.inference.request import Request, answer_room
from ivl.inference.sampling import Answer, StoppingCriteria, not_finite
from ivl.options.generation import Batching, SamplingParams, check_max_new_tokens
from ivl.types import UserError


class VisionLanguageModel(TileModel, Protocol):
    """Parts of `InternVL` that inference uses."""

    eos_ids: list[int]
    training: bool

    def embed(
        self, input_ids_BT: Tensor, tiles_N3SS: Tensor | None, tiles_per_row: Tensor | None, row_ids_BT: Tensor | None
    ) -> Tensor: ...


class Engine:
    """Engine that answers requests in the order of submission, several at a time within the limits of `Batching`."""

    def __init__(
        self,
        model: VisionLanguageModel,
        criteria: StoppingCriteria | None = None,
        params: SamplingParams = SamplingParams(),
        max_new_tokens: int = 128,
        num_beams: int = 1,
        batching: Batching = Batching(),
        logprobs: bool = False,
        prefix_cache: PrefixCache | None = None,
        runner: StepRunner | None = None,
    ) -> None:
        """Make an engine. `criteria` None: the checkpoint's end tokens. `num_beams` above 1: beam search, row by row.

        `logprobs`: keep the log-probability of each token. `prefix_cache`: one request at a time, which reads only what
        does not begin as the one before. `runner`: how the decoding step is run; by default as the device allows.
        Raises UserError for a model in training mode, answers of no tokens, and beams that are sampled or
        whose log-probabilities are asked for.
        """
        if model.training:
            raise UserError("generate: the model is in training mode; call model.eval() first")
        params.check_beams(num_beams, logprobs)
        check_max_new_tokens(max_new_tokens)
        self.model = model
        self.criteria = StoppingCriteria(model.eos_ids) if criteria is None else criteria
        self.params, self.max_new_tokens, self.num_beams = params, max_new_tokens, num_beams
        self.batching = replace(batching, rows=1) if prefix_cache else batching
        self.logprobs = logprobs
        self.waiting: deque[list[Request]] = deque()
        """Queue of requests; those of the same prompt together"""
        self.running: list[Request] = []
        self.prefix_cache = prefix_cache
        self.cache = prefix_cache.cache if prefix_cache else KVCache(self.batching.rows)
        self.runner = runner or StepRunner(model.language_model, model.device, batching.graphs)
        self.dtype = model.language_model.lm_head.weight.dtype
        self._penalised = params.repetition_penalty != 1.0
        self._state = decoding.DecodingState(
            0,
            model.language_model.config.vocab_size,
            model.device,
            self.criteria.eos_ids,
            self.criteria.min_new_tokens,
            self._penalised,
        )
        self._launched: tuple[list[Request], Callable[[], Tensor]] | None = None
        """Rows and result of a step that was started and not yet read"""

    def submit(self, *requests: Request) -> None:
        """Put a request in the queue, or several of the same prompt, which is then read once for them all.

        Raises UserError where the prompt fills the model's context, and for an answer of no tokens.
        """
        for request in requests:
            request.room = answer_room(self.model.language_model, len(request), self._limit(request))
            if self.logprobs:
                request.answer.logprobs = []
        most = self.batching.rows
        self.waiting.extend(list(requests[n : n + most]) for n in range(0, len(requests), most))

    def _limit(self, request: Request) -> int:
        """Return the most tokens of its answer, where the context has room for them."""
        return self.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens

    @property
    def is_busy(self) -> bool:
        """True while any request is not answered."""
        return bool(self.waiting or self.running)

    @property
    def wants_requests(self) -> bool:
        """True if more requests should be submitted before the next step, so that full groups can be read."""
        return len(self.waiting) < self._least_free

    @property
    def _least_free(self) -> int:
        # Prompts are read in groups: a call for each would cost about as much as a step of all the others.
        return max(1, self.batching.rows // 8)

    def run(self) -> Iterator[Request]:
        """Answer everything submitted. Yields each request as its answer ends."""
        while self.is_busy:
            yield from self.step()

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Read a group of waiting prompts where there is room, and give all rows their next token.

        Returns the requests whose answers have ended.
        """
        if self.num_beams > 1:
            return [self._search(request) for request in self.waiting.popleft()] if self.waiting else []
        try:
            finished = []
            if group := self._next_group():
                finished += self._prefill(group)
            if self.running:
                finished += self._decode()
            return finished
        except BaseException:  # an interruption too: some layers may have their keys and others not
            self.cancel()
            if self.prefix_cache:
                self.prefix_cache.forget()
            raise

    @torch.no_grad()
    def run_in_step_with(self, all_done: Callable[[bool], bool]) -> None:
        """Answer everything submitted as one group, for as many steps as the slowest of several processes needs.

        For a model whose weights are spread over processes, which must all compute every step. `all_done` is told after
        each step whether this process has finished, and returns whether all have.
        """
        self.runner.run_plainly()
        self._prefill(list(self.waiting))
        self.waiting.clear()
        for _ in range(self.max_new_tokens - 1):
            if all_done(not self.running):
                return
            if self.running:
                self._decode()
            else:  # a step whose result nobody reads
                self._launch(1)

    def cancel(self) -> None:
        """Drop all waiting and running requests."""
        self.waiting.clear()
        self.running.clear()
        self._launched = None

    # -- reading prompts -----------------------------------------------------------------------------------------

    def _next_group(self) -> list[list[Request]]:
        """Return the next waiting prompts that fit together and beside the rows that are running."""
        limits, running = self.batching, len(self.running)
        if running and limits.rows - running < self._least_free:
            return []
        widest = max((len(r) + r.room for r in self.running), default=0)
        group: list[list[Request]] = []
        tokens, together = 0, running
        while self.waiting:
            same = self.waiting[0]
            widest = max(widest, *(len(request) + request.room for request in same))
            tokens += len(same[0])
            together += len(same)
            if together > limits.rows or (together > len(same) and together * widest > limits.tokens):
                break
            if group and tokens > limits.prefill_tokens:
                break
            group.append(self.waiting.popleft())
        return group

    def _prefill(self, group: Sequence[list[Request]]) -> list[Request]:
        """Read prompts and choose their first tokens. Returns the requests that end with these."""
        if not group:
            return []
        first, prompts = len(self.running), [same[0] for same in group]
        requests = [request for same in group for request in same]
        self._reserve(first + len(requests), max(len(request) for request in prompts) + 1, [*self.running, *requests])
        if self.prefix_cache:
            logits_BV = self.prefix_cache.read(self.model, prompts[0].input_ids, prompts[0].tiles)
        else:
            logits_BV = self._read(group, first)
        for request in requests:
            request.tiles = request.tiles.new_empty(0, *request.tiles.shape[1:])  # no longer needed
        lengths, seeds = [len(request) for request in requests], [request.seed for request in requests]
        self._state.admit(first, lengths, [self.params] * len(requests), seeds)
        self.running += requests
        result = decoding.choose_next(self._state, logits_BV, first, *self._kinds)
        return self._collect(requests, result.cpu())

    def _read(self, group: Sequence[list[Request]], first: int) -> Tensor:
        """Read prompts into the slots from `first` on. Returns the logits of every request of theirs."""
        slots = [first + sum(map(len, group[:n])) for n in range(len(group))]
        prompts = [same[0] for same in group]
        lengths = [len(request) for request in prompts]
        logits_BV = decoding.prefill(self.model.language_model, self._embed(prompts), lengths, self.cache, slots)
        if len(group) == sum(map(len, group)):
            return logits_BV
        for slot, same in zip(slots, group):
            for other in range(slot + 1, slot + len(same)):
                self.cache.move(slot, other, len(same[0]))
        return torch.cat([logits_V.expand(len(same), -1) for logits_V, same in zip(logits_BV, group)])

    def _embed(self, group: Sequence[Request]) -> Tensor:
        """Return the embeddings of prompts, one after another: (1, T, D)."""
        device = self.model.device
        ids_1T = torch.cat([request.input_ids for request in group])[None].to(device, non_blocking=True)
        tiles_N3SS = torch.cat([request.tiles for request in group]).to(device, non_blocking=True)
        tiles_per_row = torch.tensor([len(request.tiles) for request in group])
        row_ids_1T = torch.repeat_interleave(
            torch.arange(len(group)), torch.tensor([len(request) for request in group])
        )[None].to(device, non_blocking=True)
        return self.model.embed(ids_1T, tiles_N3SS, tiles_per_row, row_ids_1T)

    # -- decoding ------------------------------------------------------------------------------------------------

    @property
    def _kinds(self) -> tuple[bool, bool, bool]:
        return self.params.temperature > 0, self._penalised, self.logprobs

    def _decode(self) -> list[Request]:
        """Give every running row its next token. Returns the requests that ended.

        On a GPU the next step is started before the result of this one is read: the host's work is hidden, and a row
        that has ended is computed once more than needed.
        """
        running = list(self.running)
        read = self._launch(len(running))
        launched: tuple[list[Request], Callable[[], Tensor]] | None = (running, read)
        if self.runner.overlaps:
            launched, self._launched = self._launched, launched
        if launched is None:
            return []
        result_n3 = launched[1]()
        if self.prefix_cache:  # the token of the step that was read: a later one's is not known yet
            self.prefix_cache.extend([launched[0][0].answer[-1]])
        return self._collect(launched[0], result_n3)

    def _launch(self, rows: int) -> Callable[[], Tensor]:
        """Start a step of the first rows. Returns the function that waits for its result."""
        ahead = 2 if self.runner.overlaps else 1
        longest = max((len(r) + len(r.answer) for r in self.running), default=0) + ahead
        self._reserve(rows, longest, self.running)
        columns = -(-longest // COLUMNS) * COLUMNS
        model = self.model.language_model
        return self.runner.run(model, self.cache, self._state, rows, columns, *self._kinds)

    def _reserve(self, rows: int, columns: int, requests: Sequence[Request]) -> None:
        """Make room in the cache and in the state."""
        limit = max((len(r) + r.room + 2 for r in requests), default=columns)
        if self.cache.reserve(rows, columns, max(limit, columns)):
            self.runner.forget()
        if self._state.rows < self.cache.rows:
            self._state.grow(self.cache.rows)
            self.runner.forget()

    def _collect(self, requests: Sequence[Request], result_n3: Tensor) -> list[Request]:
        """Add each row's token to its answer. Returns the requests that ended, whose slots are given to others."""
        finished = []
        for request, (token, largest, logprob) in zip(requests, result_n3.tolist()):
            if request.is_finished:
                continue
            if not math.isfinite(largest):
                request.error, request.is_finished = not_finite(self.dtype), True
                if self.prefix_cache:
                    self.prefix_cache.forget()
            else:
                self._extend(request, int(token), logprob)
            if request.is_finished:
                finished.append(request)
        self._release(finished)
        return finished

    def _extend(self, request: Request, token: int, logprob: float) -> None:
        """Add a token to an answer, and end it where it ends."""
        answer = request.answer
        answer.append(token)
        if answer.logprobs is not None:
            answer.logprobs.append(logprob)
        if reason := self.criteria.reason(answer, request.room, self._limit(request)):
            answer.finish_reason, request.is_finished = reason, True

    def _release(self, finished: Sequence[Request]) -> None:
        """Free the slots of these requests; each is taken by what is then the last row."""
        ended = {id(request) for request in finished}
        for slot in reversed([n for n, request in enumerate(self.running) if id(request) in ended]):
            last = len(self.running) - 1
            if slot != last:
                moved = self.running[last]
                self.cache.move(last, slot, len(moved) + len(moved.answer) + 1)
                self._state.move(last, slot)
                self.running[slot] = moved
            self.running.pop()

    # -- beams ---------------------------------------------------------------------------------------------------

    def _search(self, request: Request) -> Request:
        """Answer a request by beam search."""
        language_model, beams, length = self.model.language_model, self.num_beams, len(request)
        cache = KVCache(beams)
        cache.reserve(beams, length + request.room + 1)
        logits_1V = decoding.prefill(language_model, self._embed([request]), [length], cache, [0])
        cache.reorder(torch.zeros(beams, dtype=torch.long, device=logits_1V.device))
        position = length - 1

        def next_logits(beams_N: Tensor, ids_N: Tensor) -> Tensor:
            nonlocal position
            position += 1
            cache.reorder(beams_N)
            positions_N = torch.full_like(ids_N, position)
            return decoding.next_logits(language_model, cache, ids_N, positions_N, position + 1)

        penalty, request.is_finished = self.params.repetition_penalty, True
        try:
            ids = beam_search(logits_1V, next_logits, beams, request.room, self.criteria, penalty)
        except FloatingPointError:
            request.error = not_finite(self.dtype)
            return request
        request.answer = Answer(ids)
        request.answer.finish_reason = self.criteria.reason(ids, request.room, self._limit(request)) or "stop"
        return request
