"""Continuous batching: every answer is the one its row gets alone, whoever its neighbours are and however they come."""

import dataclasses
import random

import pytest
import torch

from ivl.inference.engine import Engine
from ivl.inference.graphs import StepRunner
from ivl.inference.prefix_cache import PrefixCache
from ivl.inference.request import Request, row_seed
from ivl.inference.sampling import StoppingCriteria
from ivl.model.internvl import InternVL
from ivl.options import Batching, SamplingParams
from ivl.types import UserError
from tests.model.rows import padded, rows
from tests.second import SecondDevice
from tests.tiny import FAMILIES, write_checkpoint

LENGTHS = [9, 57, 14, 30, 5, 41, 22, 60, 8, 17, 33, 26, 50, 11, 45, 6]
TILES = [0, 3, 1, 2, 0, 3, 2, 1, 0, 0, 3, 2, 3, 1, 0, 0]
ANSWERS = [12, 1, 30, 7, 22, 3, 40, 9, 2, 17, 26, 5, 14, 1, 33, 8]


def answered(engine: Engine, requests: list[Request]) -> list[list[int]]:
    for request in requests:
        engine.submit(request)
    found = {request.key: request.answer for request in engine.run()}
    assert sorted(found) == list(range(len(requests)))
    return [found[n] for n in range(len(requests))]


def requests(made, limits=None, **more) -> list[Request]:
    limits = limits or [None] * len(made)
    return [
        Request(n, row["input_ids"], row["tiles"], limit, **more) for n, (row, limit) in enumerate(zip(made, limits))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2")


@pytest.fixture(scope="module")
def model(folder):
    return InternVL.from_pretrained(folder)


KINDS = {
    **{name: (name, {}, LENGTHS) for name in FAMILIES},
    "window": ("Phi3ForCausalLM", {"sliding_window": 10}, LENGTHS),
    # Some begin below the length where frequencies change and some above it, some cross it.
    "longrope": ("Phi3ForCausalLM", {}, [*LENGTHS[:8], 250, 255, 256, 257, 240, 300, *LENGTHS[14:]]),
    "dynamic": ("InternLM2ForCausalLM", {"max_position_embeddings": 100}, LENGTHS),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_are_those_of_each_row_alone(tmp_path, kind, attention):
    architecture, llm, lengths = KINDS[kind]
    model = InternVL.from_pretrained(write_checkpoint(tmp_path, architecture, llm=llm), attention=attention)
    made = rows(model, lengths, TILES)
    alone = [model.generate(padded([r]), max_new_tokens=n, eos_ids=[])[0] for r, n in zip(made, ANSWERS)]
    assert len({tuple(answer[:3]) for answer in alone}) > 10
    for batching in (Batching(rows=1), Batching(rows=5), Batching(rows=64), Batching(rows=9, tokens=200)):
        engine = Engine(model, StoppingCriteria(), batching=batching)
        assert answered(engine, requests(made, ANSWERS)) == alone, batching


def test_answers_do_not_depend_on_when_requests_come(model):
    made = rows(model, LENGTHS, TILES)
    alone = [model.generate(padded([r]), max_new_tokens=n, eos_ids=[])[0] for r, n in zip(made, ANSWERS)]
    draw = random.Random(0)
    for _ in range(5):
        order = requests(made, ANSWERS)
        draw.shuffle(order)
        engine, found = Engine(model, StoppingCriteria(), batching=Batching(rows=draw.randint(2, 12))), {}
        while order or engine.is_busy:
            for _ in range(draw.randint(0, 3)):
                if order:
                    engine.submit(order.pop())
            found |= {request.key: request.answer for request in engine.step()}
        assert [found[n] for n in range(len(made))] == alone


def test_rows_end_at_their_own_tokens_and_texts(model):
    made = rows(model, LENGTHS, TILES)
    whole = answered(Engine(model, StoppingCriteria(), max_new_tokens=20), requests(made))
    ends = StoppingCriteria(
        [whole[0][4]], stop=[whole[3][2:4]], stopped=lambda ids: ids[-3:] == whole[5][7:10], min_new_tokens=2
    )
    settings = {"eos_ids": ends.eos_ids, "stop": ends.stop, "stopped": ends.stopped, "min_new_tokens": 2}
    alone = [model.generate(padded([row]), max_new_tokens=20, **settings)[0] for row in made]
    assert answered(Engine(model, ends, max_new_tokens=20), requests(made)) == alone
    assert len(alone[0]) <= 5 and len(alone[3]) <= 4 and len(alone[5]) <= 10


def test_end_tokens_are_the_checkpoints_own_by_default(model):
    made = rows(model, LENGTHS[:1], TILES[:1])
    whole = answered(Engine(model, StoppingCriteria(), max_new_tokens=6), requests(made))[0]
    model.eos_ids, kept = [whole[1]], model.eos_ids
    assert len(answered(Engine(model, max_new_tokens=6), requests(made))[0]) <= 2
    model.eos_ids = kept


def test_sampled_answers_follow_the_seed_of_the_row(model):
    made = rows(model, LENGTHS, TILES)
    choose = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, repetition_penalty=1.1)
    alone = [
        model.generate(padded([row]), max_new_tokens=10, eos_ids=[], seed=row_seed(3, n), **vars(choose))[0]
        for n, row in enumerate(made)
    ]
    for count in (1, 4, 32):
        engine = Engine(model, StoppingCriteria(), choose, max_new_tokens=10, batching=Batching(rows=count))
        asked = requests(made)
        for request in asked:
            request.seed = row_seed(3, request.key)
        assert answered(engine, asked) == alone
    same = [Request(n, made[0]["input_ids"], made[0]["tiles"], seed=row_seed(3, n)) for n in range(6)]
    assert len({tuple(a) for a in answered(Engine(model, StoppingCriteria(), choose, 10), same)}) == 6


def test_beams_are_those_of_generate(model):
    made = rows(model, LENGTHS[:5], TILES[:5])
    expected = model.generate(padded(made), max_new_tokens=8, eos_ids=[7], num_beams=3)
    found = answered(Engine(model, StoppingCriteria([7]), max_new_tokens=8, num_beams=3), requests(made))
    assert found == expected
    assert found != answered(Engine(model, StoppingCriteria([7]), max_new_tokens=8), requests(made))


# -- how the work is done ----------------------------------------------------------------------------------------------


def watched(model):
    """Rows and tokens of each forward of the language model, and tiles of each of the tower."""
    seen = {"rows": [], "tiles": []}

    def forward(_module, given):
        seen["rows"].append(tuple(given[0].shape[:2]))

    hooks = [
        model.language_model.model.register_forward_pre_hook(forward),
        model.vision_model.register_forward_pre_hook(lambda _module, given: seen["tiles"].append(len(given[0]))),
    ]
    return seen, hooks


def test_a_long_answer_holds_nobody_up(model):
    made = rows(model, [8] * 12, [0] * 12)
    limits = [60] + [3] * 11
    engine = Engine(model, StoppingCriteria(), batching=Batching(rows=4))
    for request in requests(made, limits):
        engine.submit(request)
    order = [request.key for request in engine.run()]
    assert order[-1] == 0 and sorted(order) == list(range(12))


def test_nothing_is_computed_for_rows_that_have_ended(model):
    made = rows(model, [8] * 6, [0] * 6)
    limits = [1, 2, 3, 4, 5, 6]
    seen, hooks = watched(model)
    answered(Engine(model, StoppingCriteria()), requests(made, limits))
    for hook in hooks:
        hook.remove()
    assert seen["rows"] == [(1, 48), (5, 1), (4, 1), (3, 1), (2, 1), (1, 1)]


def test_prompts_are_read_in_groups_within_the_budget_without_padding(model):
    made = rows(model, [60, 58, 55, 54, 20, 18, 17, 8], [3, 2, 3, 1, 0, 2, 1, 0])
    seen, hooks = watched(model)
    answered(Engine(model, StoppingCriteria(), batching=Batching(prefill_tokens=200)), requests(made, [1] * 8))
    for hook in hooks:
        hook.remove()
    assert seen["rows"] == [(1, 60 + 58 + 55), (1, 54 + 20 + 18 + 17 + 8)]
    assert seen["tiles"] == [8, 4]


def test_the_cache_stays_within_its_tokens(model):
    made = rows(model, [20] * 10, [0] * 10)
    engine = Engine(model, StoppingCriteria(), max_new_tokens=10, batching=Batching(tokens=100))
    for request in requests(made):
        engine.submit(request)
    most = 0
    while engine.is_busy:
        engine.step()
        most = max(most, len(engine.running))
    assert most == 3
    assert (
        len(answered(Engine(model, StoppingCriteria(), max_new_tokens=10, batching=Batching(tokens=5)), requests(made)))
        == 10
    )


def test_a_neighbour_that_is_not_finite_is_not_caught(model):
    """A row whose values overflowed leaves nothing behind in the slot that others get."""
    made = rows(model, [30, 12, 14, 9], [0] * 4)
    alone = [model.generate(padded([row]), max_new_tokens=12, eos_ids=[])[0] for row in made]
    engine = Engine(model, StoppingCriteria(), batching=Batching(rows=2))
    for request in requests(made, [2, 12, 12, 12]):
        engine.submit(request)
    engine.step()
    assert len(engine.running) == 1, "the other slot is free"
    engine.cache.values[0][1] = torch.nan
    found = {request.key: request.answer for request in engine.run()}
    assert [found[n] for n in (1, 2, 3)] == alone[1:]


def test_a_step_that_is_read_late_gives_the_same_answers(model):
    """On a GPU the next step is started before this one's result is read."""
    made = rows(model, LENGTHS, TILES)
    expected = answered(Engine(model, StoppingCriteria([5, 9]), batching=Batching(rows=5)), requests(made, ANSWERS))
    runner = StepRunner(model.language_model, model.device)
    runner.overlaps = True
    engine = Engine(model, StoppingCriteria([5, 9]), batching=Batching(rows=5), runner=runner)
    assert answered(engine, requests(made, ANSWERS)) == expected


def test_the_prefix_cache_knows_its_tokens_also_where_steps_are_read_late(model):
    (row,) = rows(model, [9], [1])
    runner = StepRunner(model.language_model, model.device)
    for runner.overlaps in (False, True):
        prefix_cache = PrefixCache()
        engine = Engine(model, StoppingCriteria(), max_new_tokens=6, prefix_cache=prefix_cache, runner=runner)
        (answer,) = answered(engine, [Request(0, row["input_ids"], row["tiles"])])
        longer = torch.cat([row["input_ids"], torch.tensor([*answer, 7])])
        assert len(set(answer[:-1])) > 1, "an answer of one token again and again cannot tell"
        with torch.no_grad():
            prefix_cache.read(model, longer, row["tiles"])
        assert prefix_cache.tokens_read == 2  # the answer's last token was not fed, and one is new


def test_processes_that_compute_every_step_together_read_each_before_the_next(model):
    """Also on a device where the engine alone would start the next step first: no answer loses its last token."""
    made = rows(model, LENGTHS[:4], TILES[:4])
    expected = answered(Engine(model, StoppingCriteria(), max_new_tokens=6), requests(made))
    runner = StepRunner(model.language_model, model.device)
    runner.overlaps = True
    engine, together = Engine(model, StoppingCriteria(), max_new_tokens=6, runner=runner), requests(made)
    for request in together:
        engine.submit(request)
    engine.run_in_step_with(lambda done: done)
    assert [request.answer for request in together] == expected


def test_log_probabilities_of_the_tokens_are_the_models(model):
    made = rows(model, LENGTHS[:4], TILES[:4])
    params = SamplingParams(temperature=0.7, repetition_penalty=1.3)
    engine = Engine(model, StoppingCriteria(), params, 6, logprobs=True)
    for row, answer in zip(made, answered(engine, requests(made))):
        ids = torch.cat([row["input_ids"], torch.tensor(answer)])[None]
        with torch.no_grad():
            logits = model(ids, tiles=row["tiles"]).logits[0, len(row["input_ids"]) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    assert answered(Engine(model, StoppingCriteria(), max_new_tokens=2), requests(made))[0].logprobs is None


def test_several_answers_of_a_prompt_are_those_it_gives_alone_and_it_is_read_once(model):
    made = rows(model, LENGTHS[:5], TILES[:5])
    params = SamplingParams(temperature=1.0, top_p=0.9)

    def several(n: int, row) -> list[Request]:
        return [Request((n, k), row["input_ids"], row["tiles"], ANSWERS[n], seed=100 * n + k) for k in range(3)]

    alone = {}
    for n, row in enumerate(made):
        for request in several(n, row):
            engine = Engine(model, StoppingCriteria(), params)
            engine.submit(request)
            alone |= {request.key: request.answer for request in engine.run()}
    for batching in (Batching(), Batching(rows=7), Batching(rows=2)):
        engine, (seen, hooks) = Engine(model, StoppingCriteria(), params, batching=batching), watched(model)
        for n, row in enumerate(made):
            engine.submit(*several(n, row))
        assert {request.key: request.answer for request in engine.run()} == alone
        for hook in hooks:
            hook.remove()
        times = 1 if batching.rows > 2 else 2  # three answers are then a pair and one
        assert sum(tokens for _, tokens in seen["rows"] if tokens > 1) == times * sum(LENGTHS[:5])


@pytest.mark.slow
def test_the_decoding_step_compiles_whole(model):
    """One graph without a break, for any number of rows and columns, and the answers are the same."""
    from torch._dynamo.utils import counters

    made = rows(model, LENGTHS, TILES)
    for params in (SamplingParams(), SamplingParams(0.8, 0.9, 20, 1.1)):
        expected = answered(Engine(model, StoppingCriteria(), params), requests(made, ANSWERS))
        counters.clear()
        runner = StepRunner(model.language_model, model.device, compiled=True)
        engine = Engine(model, StoppingCriteria(), params, runner=runner)
        assert answered(engine, requests(made, ANSWERS)) == expected
        assert not counters["graph_break"] and 0 < counters["stats"]["unique_graphs"] <= 8


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes(model, folder):
    made = rows(model, [30], [0])
    long = Request(0, torch.zeros(4096, dtype=torch.long), made[0]["tiles"])
    with pytest.raises(UserError, match=r"a prompt of 4096 tokens and its answer exceed the model's context of 4096"):
        Engine(model).submit(long)
    with pytest.raises(UserError, match="num_beams: expected at least 1, and no more than 1 where tokens are sampled"):
        Engine(model, params=SamplingParams(temperature=1.0), num_beams=2)
    with pytest.raises(UserError, match="logprobs: expected false with num_beams above 1, found true"):
        Engine(model, num_beams=2, logprobs=True)
    for beams in (1, 2):
        for limit in (0, -3):
            with pytest.raises(UserError, match=f"max_new_tokens: expected at least 1, found {limit}"):
                Engine(model, max_new_tokens=limit, num_beams=beams)
    with pytest.raises(UserError, match="max_new_tokens: expected at least 1, found 0"):
        Engine(model).submit(dataclasses.replace(requests(made)[0], max_new_tokens=0))
    with pytest.raises(UserError, match="min_new_tokens: expected at least 0, found -9"):
        StoppingCriteria(min_new_tokens=-9)
    with pytest.raises(UserError, match="batching: prefill_tokens: expected at least 1, found 0"):
        Batching(prefill_tokens=0)
    with pytest.raises(UserError, match="in training mode"):
        Engine(InternVL.from_pretrained(folder).train())


def test_every_limit_of_batching_is_checked():
    for field in dataclasses.fields(Batching):
        with pytest.raises(UserError, match=field.name):
            Batching(**{field.name: 0})


def test_layers_on_another_device_keep_their_keys_there(folder, model):
    made, ends = rows(model, LENGTHS[:6], TILES[:6]), StoppingCriteria()
    expected = answered(Engine(model, ends, max_new_tokens=9), requests(made, ANSWERS[:6]))
    with SecondDevice():
        split = InternVL.from_pretrained(folder, device_map={"": "cpu", "language_model.model.layers.1": "meta"})
        assert answered(Engine(split, ends, max_new_tokens=9), requests(made, ANSWERS[:6])) == expected
