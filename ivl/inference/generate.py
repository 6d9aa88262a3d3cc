"""Functions of `InternVL.generate` and `InternVL.stream`: answers to a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from ivl.inference.engine import Engine, VisionLanguageModel
from ivl.inference.request import Request
from ivl.inference.sampling import Answer, FinishReason, NotFinite, StoppingCriteria
from ivl.options.generation import GenerationOptions
from ivl.types import Batch, UserError


def generate(
    model: VisionLanguageModel,
    batch: Batch,
    max_new_tokens: int = GenerationOptions.max_new_tokens,
    *,
    eos_ids: Sequence[int] | None = None,
    stop: Sequence[Sequence[int]] = (),
    stopped: Callable[[list[int]], bool] | None = None,
    all_done: Callable[[bool], bool] | None = None,
    **options: Any,
) -> list[Answer]:
    """Return the new token ids of each row of a padded batch, with the token that ended it.

    Each is a list of ids with a `finish_reason`: stop, length (`max_new_tokens`) or context (the model's is full), and
    with `logprobs` where they are asked for.
    `options`: others of `ivl.options.GenerationOptions`, but num_answers. `eos_ids` end a row, by default the
    checkpoint's own, as does a sequence of `stop`, or `stopped`, which is asked about the tokens so far; but not within
    `min_new_tokens`.
    `all_done` makes this process go on until all others are done: it is given whether this one is, and returns whether
    all are.
    Raises UserError where a prompt fills the context, logits are not finite, or an option is out of range.
    """
    settings = GenerationOptions(max_new_tokens, **options)
    engine, requests = _engine(model, batch, settings, eos_ids, stop, stopped)
    for request in requests:
        engine.submit(request)
    if all_done is not None and settings.num_beams == 1:
        engine.run_in_step_with(all_done)
    else:
        for _ in engine.run():
            pass
    check_errors(engine, requests)
    return [request.answer for request in requests]


def stream(
    model: VisionLanguageModel,
    batch: Batch,
    max_new_tokens: int = GenerationOptions.max_new_tokens,
    *,
    eos_ids: Sequence[int] | None = None,
    stop: Sequence[Sequence[int]] = (),
    stopped: Callable[[list[int]], bool] | None = None,
    **options: Any,
) -> Generator[int, None, FinishReason]:
    """Yield the new token ids of one row as they are made. Returns why the answer ended.

    Arguments as in `generate`; there are no beams.
    """
    if len(batch.input_ids) != 1:
        raise UserError(f"stream: expected a batch of one row, found {len(batch.input_ids)}")
    settings = GenerationOptions(max_new_tokens, **options)
    if settings.num_beams > 1:
        raise UserError(
            f"stream: num_beams: expected 1, as beams are known at their end only, found {settings.num_beams}"
        )
    engine, requests = _engine(model, batch, settings, eos_ids, stop, stopped)
    answer = yield from stream_request(engine, requests[0])
    return answer.finish_reason


def _engine(
    model: VisionLanguageModel,
    batch: Batch,
    settings: GenerationOptions,
    eos_ids: Sequence[int] | None,
    stop: Sequence[Sequence[int]],
    stopped: Callable[[list[int]], bool] | None,
) -> tuple[Engine, list[Request]]:
    """Return an engine for a batch of prompts, and a request for each."""
    if settings.num_answers > 1:
        raise UserError(f"generate: num_answers: expected 1, found {settings.num_answers}; give the row several times")
    eos_ids = model.eos_ids if eos_ids is None else eos_ids
    criteria = StoppingCriteria(eos_ids, stop, stopped, settings.min_new_tokens)
    engine = Engine(model, criteria, settings, settings.max_new_tokens, settings.num_beams, logprobs=settings.logprobs)
    return engine, requests_of(batch, settings.seed)


def stream_request(engine: Engine, request: Request) -> Generator[int, None, Answer]:
    """Answer one request. Yields its token ids as they are made, the one that ends it among them.

    A request whose caller stops early is dropped. Raises UserError where logits are not finite.
    """
    engine.submit(request)
    count = 0
    try:
        while not request.is_finished:
            engine.step()
            check_errors(engine, [request])
            yield from request.answer[count:]
            count = len(request.answer)
    finally:
        engine.cancel()
    return request.answer


def requests_of(batch: Batch, seed: int = 0) -> list[Request]:
    """Return a request for each row of a padded batch. Raises UserError for another layout."""
    if batch.row_ids is not None:
        raise UserError("generate: the batch is packed; expected padded prompts, collate(..., packed=False)")
    mask_BT = batch.attention_mask
    if (mask_BT[:, 1:] > mask_BT[:, :-1]).any():
        raise UserError("generate: expected prompts padded on the right, as the collator makes them")
    ids_BT, counts = batch.input_ids.cpu(), batch.tiles_per_row.tolist()
    rows = zip(ids_BT, mask_BT.sum(1).tolist(), batch.tiles.split(counts), strict=True)
    return [Request(row, ids_T[:length], tiles, seed=seed) for row, (ids_T, length, tiles) in enumerate(rows)]


def check_errors(engine: Engine, requests: Sequence[Request]) -> None:
    """Raise NotFinite for the first request that has no answer."""
    for row, request in enumerate(requests):
        if request.error:
            raise NotFinite(row, engine.dtype)
