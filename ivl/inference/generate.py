"""Functions of `InternVL.generate` and `InternVL.stream`: answers to a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from ivl.inference.engine import Engine, VisionLanguageModel
from ivl.inference.request import Request
from ivl.inference.sampling import Answer, FinishReason, NotFinite, SamplingParams, StoppingCriteria
from ivl.types import Batch, UserError


def generate(
    model: VisionLanguageModel,
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
    all_done: Callable[[bool], bool] | None = None,
    stopped: Callable[[list[int]], bool] | None = None,
    num_beams: int = 1,
    logprobs: bool = False,
) -> list[Answer]:
    """Return the new token ids of each row of a padded batch, with the token that ended it.

    Each is a list of ids with a `finish_reason`: stop, length (`max_new_tokens`) or context (the model's is full), and
    with `logprobs` where they are asked for.
    `eos_ids` end a row, by default the checkpoint's own, as does a sequence of `stop`, or `stopped`, which is asked
    about the tokens so far; but not within `min_new_tokens`.
    `seed`: a sampled answer depends on it and not on its neighbours. `repetition_penalty` is over the answer alone.
    `all_done` makes this process go on until all others are done: it is given whether this one is, and returns whether
    all are. `num_beams` above 1: beam search, one row after another.
    Raises UserError where a prompt fills the context, logits are not finite, or an option is out of range.
    """
    params = SamplingParams(temperature, top_p, top_k, repetition_penalty)
    criteria = StoppingCriteria(model.eos_ids if eos_ids is None else eos_ids, stop, stopped, min_new_tokens)
    engine = Engine(model, criteria, params, max_new_tokens, num_beams, logprobs=logprobs)
    requests = requests_of(batch, seed)
    for request in requests:
        engine.submit(request)
    if all_done is not None and num_beams == 1:
        engine.run_in_step_with(all_done)
    else:
        for _ in engine.run():
            pass
    check_errors(engine, requests)
    return [request.answer for request in requests]


def stream(
    model: VisionLanguageModel,
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
    """Yield the new token ids of one row as they are made; the settings of `generate`. Returns why the answer ended."""
    if len(batch.input_ids) != 1:
        raise UserError(f"stream: expected a batch of one row, found {len(batch.input_ids)}")
    params = SamplingParams(temperature, top_p, top_k, repetition_penalty)
    criteria = StoppingCriteria(model.eos_ids if eos_ids is None else eos_ids, stop, stopped, min_new_tokens)
    engine = Engine(model, criteria, params, max_new_tokens)
    answer = yield from stream_request(engine, requests_of(batch, seed)[0])
    return answer.finish_reason


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
