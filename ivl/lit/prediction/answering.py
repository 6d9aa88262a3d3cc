"""Generation of answers: in batches for validation, continuous batching for predict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

from ivl.checkpoint.fingerprint import fingerprint
from ivl.data.processor import Processor
from ivl.inference.engine import Engine
from ivl.inference.graphs import StepRunner
from ivl.inference.request import Request, row_seed
from ivl.inference.sampling import Answer, NotFinite, StoppingCriteria
from ivl.lit.prediction.prediction_rows import Row, answered, failed
from ivl.lit.prediction.prompts import Prompt
from ivl.model.efficient.compile import uncompiled
from ivl.model.internvl import InternVL
from ivl.options import Batching, GenerationOptions
from ivl.reasoning import split_reasoning
from ivl.types import Batch, Conversation, UserError


class Answering:
    """Answering of prompts by the engine, row by row."""

    def __init__(
        self,
        model: InternVL,
        processor: Processor,
        generation: GenerationOptions,
        batching: Batching,
        name: str,
        keep_errors: bool = False,
        compiled: bool = False,
    ) -> None:
        """`name`: name of the model in the record of a score. `keep_errors`: a row that the model cannot take is
        answered with its error; else the error is raised. `compiled`: the decoding step by torch.compile."""
        criteria = stopping_criteria(model, processor, generation)
        self.model, self.name = model, name
        generation.check()
        runner = StepRunner(model.language_model, model.device, batching.graphs, compiled)
        settings = generation, generation.max_new_tokens, generation.num_beams, batching, generation.logprobs
        self.engine = Engine(model, criteria, *settings, runner=runner)
        self._siblings: dict[int, list[Request]] = {}
        """Index of a row that is being answered → its requests"""
        self.processor, self.generation, self.keep_errors = processor, generation, keep_errors

    @cached_property
    def answer_settings(self) -> Row:
        """Model and settings of the answers, for the record of their score."""
        video = self.processor.tiler.video
        return {
            "model": f"{self.name}@{fingerprint(self.model.state_dict().items())}",
            "max_tiles": self.processor.max_tiles,
            "frames": video.num_segments if video.fps is None else f"{video.fps}/s",
            "decoding": dict(vars(self.generation)),
        }

    def run(self, prompts: Iterable[Prompt]) -> Iterator[list[Row]]:
        """Answer prompts. Yields, prompt after prompt and step after step, the rows that have ended: none, or more."""
        for prompt in prompts:
            yield self._take(prompt)
        while self.engine.is_busy:
            yield self._step()

    def _take(self, prompt: Prompt) -> list[Row]:
        """Submit a prompt to the engine. Returns the rows whose answers ended meanwhile."""
        example = prompt.example
        if example is None:
            return [failed(prompt.index, prompt.conversation, prompt.where, prompt.error)]
        seed = row_seed(self.generation.seed, prompt.index)
        seeds = [seed, *(row_seed(seed, n) for n in range(1, self.generation.num_answers))]
        try:
            key = replace(prompt, example=replace(example, tiles=example.tiles.new_empty(0)))  # pixels are large
            requests = [Request(key, example.input_ids, example.tiles, seed=seed) for seed in seeds]
            self.engine.submit(*requests)
            self._siblings[prompt.index] = requests
        except UserError as error:
            return [self._failed(prompt, str(error))]
        rows: list[Row] = []
        while not self.engine.wants_requests:
            rows += self._step()
        return rows

    def _step(self) -> list[Row]:
        """Decode the next token of every row that is being answered. Returns the rows that ended."""
        rows = []
        for request in self.engine.step():
            siblings = self._siblings.get(request.key.index, [])
            if siblings and all(other.is_finished for other in siblings):
                del self._siblings[request.key.index]
                rows.append(self._row(siblings))
        return rows

    def _row(self, requests: Sequence[Request]) -> Row:
        """Return the line of a row whose answers have all ended."""
        prompt: Prompt = requests[0].key
        example = prompt.example
        assert example is not None, "it was submitted"
        for request in requests:
            if request.error:
                return self._failed(prompt, request.error)
        prefix = example.conversation.prefix
        texts = [self.processor.answer(request.answer, self.generation.stop, prefix) for request in requests]
        first = requests[0].answer
        row = answered(prompt.index, example.conversation, texts[0], self.processor, first.finish_reason, example.notes)
        if first.logprobs is not None:
            row["logprobs"] = first.logprobs
        if len(requests) > 1:
            row["responses"] = [_response(text, request.answer) for text, request in zip(texts, requests)]
        return row | self.answer_settings

    def _failed(self, prompt: Prompt, error: str) -> Row:
        """Return the line of a row without an answer. Raises UserError where errors are not kept."""
        text = f"{prompt.where}: {error}"
        if not self.keep_errors:
            raise UserError(text)
        return failed(prompt.index, prompt.conversation, prompt.where, text)


def _response(text: str, answer: Answer) -> Row:
    """Return one of several answers of a row."""
    reasoning, response = split_reasoning(text)
    line: Row = {"response": response, "reasoning": reasoning, "finish_reason": answer.finish_reason}
    return line if answer.logprobs is None else line | {"logprobs": answer.logprobs}


@contextmanager
def name_rows(rows: Sequence[Conversation]) -> Iterator[None]:
    """Prefix errors of logits that are not finite with the place of their row."""
    try:
        yield
    except NotFinite as error:
        raise UserError(f"{rows[error.row].where}: {error}") from error


def stopping_criteria(model: InternVL, processor: Processor, generation: GenerationOptions) -> StoppingCriteria:
    """Return the stopping criteria: end tokens of checkpoint and template, and the texts of `generation.stop`."""
    eos_ids = [*processor.stop_ids, *model.eos_ids]
    stopped = processor.stopped_by(generation.stop)
    return StoppingCriteria(eos_ids, stopped=stopped, min_new_tokens=generation.min_new_tokens)


def answers(
    model: InternVL,
    processor: Processor,
    generation: GenerationOptions,
    prompts: Batch,
    all_done: Callable[[bool], bool],
) -> list[str]:
    """Answer a batch of prompts. `all_done`: as in `ivl.inference.generate.generate`, called where the model is
    sharded, as every process must then compute every token."""
    criteria = stopping_criteria(model, processor, generation)
    settings = {k: v for k, v in vars(generation).items() if k not in ("stop", "num_answers", "logprobs")}
    if model.always_run_vision:
        settings["all_done"] = all_done
    with uncompiled():
        answer_ids = model.generate(prompts, eos_ids=criteria.eos_ids, stopped=criteria.stopped, **settings)
    return [processor.answer(ids, generation.stop) for ids in answer_ids]
