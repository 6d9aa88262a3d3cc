"""Decoding: answers as recorded, the same however rows are batched, and the settings doing what they say."""

import pytest
import torch

from ivl.inference import decoding
from ivl.inference.engine import Engine
from ivl.inference.kv_cache import KVCache
from ivl.inference.request import Request
from ivl.inference.sampling import StoppingCriteria, penalise_repetition, sample, uniform
from ivl.model.internvl import InternVL
from ivl.options import Batching, SamplingParams
from ivl.types import UserError
from tests.model.rows import packed, padded, rows
from tests.tiny import FAMILIES, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2")


@pytest.fixture(scope="module")
def model(folder):
    return InternVL.from_pretrained(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def any_model(request, tmp_path_factory):
    return InternVL.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("tiny") / request.param, request.param))


def prompts(model: InternVL, lengths=(9, 21, 14, 30), tiles=(0, 2, 1, 3), seed=0):
    return rows(model, lengths, tiles, seed)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_equal_the_reference(recorded, attention):
    model, pixels = recorded.model(attention=attention), recorded.arrays("generation.npz")
    stopped = 0
    for case in recorded.json("generation.json")["cases"]:
        made = []
        for ids, mask in zip(torch.tensor(case["input_ids"]), torch.tensor(case["attention_mask"])):
            ids = ids[mask.bool()]
            count = int((ids == model.image_token_id).sum()) // model.config.tokens_per_tile
            made.append({"input_ids": ids, "labels": ids, "tiles": torch.zeros(count, 3, 1, 1)})
        tiles = torch.cat([row["tiles"] for row in made])
        for row in made:
            row["tiles"] = tiles[: len(row["tiles"])]
        batch = padded(made)
        if len(tiles):
            batch.tiles = pixels[f"{case['name']}.pixel_values"]
        assert model.generate(batch, max_new_tokens=24, eos_ids=[]) == case["new_tokens"], case["name"]
        assert served(model, batch, StoppingCriteria()) == case["new_tokens"], case["name"]
        if "stop" in case:
            stop = case["stop"]
            expected = [cut_after(row, stop["eos_token_id"]) for row in stop["new_tokens"]]
            found = model.generate(batch, max_new_tokens=24, eos_ids=[stop["eos_token_id"]])
            assert found == expected, case["name"]
            assert served(model, batch, StoppingCriteria([stop["eos_token_id"]])) == expected, case["name"]
            stopped += len(found[0]) < 24
    assert stopped


def served(model: InternVL, batch, criteria: StoppingCriteria) -> list[list[int]]:
    """The answers of a batch by continuous batching, two rows at a time."""
    engine, first = Engine(model, criteria, max_new_tokens=24, batching=Batching(rows=2)), 0
    for row, (ids, mask, count) in enumerate(zip(batch.input_ids, batch.attention_mask, batch.tiles_per_row.tolist())):
        engine.submit(Request(row, ids[mask], batch.tiles[first : first + count]))
        first += count
    return [request.answer for request in sorted(engine.run(), key=lambda request: request.key)]


def cut_after(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def test_a_batch_answers_as_each_row_alone(any_model):
    made = prompts(any_model)
    alone = [any_model.generate(padded([row]), max_new_tokens=12, eos_ids=[])[0] for row in made]
    assert any_model.generate(padded(made), max_new_tokens=12, eos_ids=[]) == alone
    assert any_model.generate(padded(made, extra=5), max_new_tokens=12, eos_ids=[]) == alone
    assert len({tuple(answer) for answer in alone}) == len(alone)


def test_decoding_with_a_cache_equals_one_forward_after_another(any_model):
    batch = padded(prompts(any_model, lengths=(11,), tiles=(1,), seed=1))
    found = any_model.generate(batch, max_new_tokens=8, eos_ids=[])[0]
    ids = batch.input_ids
    with torch.no_grad():
        for token in found:
            assert token != any_model.image_token_id, "the seed no longer serves"
            assert int(any_model(ids, tiles=batch.tiles).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sliding_window_is_counted_in_tokens_of_the_row(tmp_path, attention):
    """Padding between prompt and answer is not part of the window."""
    folder = write_checkpoint(tmp_path, "Phi3ForCausalLM", llm={"sliding_window": 10})
    model = InternVL.from_pretrained(folder, attention=attention)
    made = prompts(model)
    alone = [model.generate(padded([row]), max_new_tokens=12, eos_ids=[])[0] for row in made]
    assert model.generate(padded(made), max_new_tokens=12, eos_ids=[]) == alone
    batch, ids = padded(made[:1]), padded(made[:1]).input_ids
    with torch.no_grad():
        for token in alone[0]:
            assert int(model(ids, tiles=batch.tiles).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_a_row_stops_at_its_own_end(model):
    batch = padded(prompts(model))
    whole = model.generate(batch, max_new_tokens=16, eos_ids=[])
    end = whole[1][4]
    found = model.generate(batch, max_new_tokens=16, eos_ids=[end])
    assert found == [cut_after(row, end) for row in whole]
    assert len(found[1]) <= 5
    assert model.generate(batch, max_new_tokens=16, eos_ids=[], stop=[whole[2][3:5]])[2] == whole[2][:5]


def test_end_tokens_are_the_checkpoints_own_by_default(folder):
    model = InternVL.from_pretrained(folder)
    batch = padded(prompts(model))
    whole = model.generate(batch, max_new_tokens=8, eos_ids=[])
    model.eos_ids = [whole[0][2]]
    assert model.generate(batch, max_new_tokens=8)[0] == cut_after(whole[0], whole[0][2])


def test_min_new_tokens_holds_the_end_back(model):
    batch = padded(prompts(model))
    end = model.generate(batch, max_new_tokens=1, eos_ids=[])[0][0]
    assert len(model.generate(batch, max_new_tokens=8, eos_ids=[end])[0]) == 1
    found = model.generate(batch, max_new_tokens=8, min_new_tokens=5, eos_ids=[end])[0]
    assert end not in found[:5]
    assert len(found) >= 5


def test_stream_yields_what_generate_returns(model):
    batch = padded(prompts(model, lengths=(12,), tiles=(1,)))
    whole = model.generate(batch, max_new_tokens=10, eos_ids=[])[0]
    assert list(model.stream(batch, max_new_tokens=10, eos_ids=[])) == whole
    assert list(model.stream(batch, max_new_tokens=10, eos_ids=[whole[3]])) == cut_after(whole, whole[3])
    assert next(model.stream(batch, max_new_tokens=10, eos_ids=[])) == whole[0]


def test_the_tower_runs_once_over_all_tiles(model):
    sizes = []
    hook = model.vision_model.register_forward_hook(lambda _module, given, _out: sizes.append(len(given[0])))
    model.generate(padded(prompts(model)), max_new_tokens=4, eos_ids=[])
    hook.remove()
    assert sizes == [6]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model with a context of 32 tokens."""
    folder = tmp_path_factory.mktemp("tiny") / "short"
    return InternVL.from_pretrained(write_checkpoint(folder, llm={"max_position_embeddings": 32}))


def test_every_answer_says_why_it_ended(short):
    made = prompts(short)
    whole = short.generate(padded(made), max_new_tokens=16, eos_ids=[])
    assert [len(ids) for ids in whole] == [16, 11, 16, 2]
    assert [ids.finish_reason for ids in whole] == ["length", "context", "length", "context"]
    end = whole[0][15]
    settings = {"max_new_tokens": 16, "eos_ids": [end]}
    found = short.generate(padded(made), **settings)
    assert found[0].finish_reason == "stop", "an end at the last token that is allowed is an end"
    for n, row in enumerate(made):
        alone, reason = [], None
        stream = short.stream(padded([row]), **settings)
        while reason is None:
            try:
                alone.append(next(stream))
            except StopIteration as over:
                reason = over.value
        assert (alone, reason) == (found[n], found[n].finish_reason)
        beams = short.generate(padded([row]), **settings, num_beams=2)[0]
        ended = end in beams
        assert beams.finish_reason == ("stop" if ended else "length" if len(beams) == 16 else "context")
    requests = [Request(n, row["input_ids"], row["tiles"]) for n, row in enumerate(made)]
    engine = Engine(short, StoppingCriteria([end]), max_new_tokens=16)
    for request in requests:
        engine.submit(request)
    assert len(list(engine.run())) == 4
    assert [(r.answer, r.answer.finish_reason) for r in requests] == [(ids, ids.finish_reason) for ids in found]


# -- logits that are not finite ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(folder):
    """A model whose second row of embeddings is NaN, as after a training that diverged."""
    model = InternVL.from_pretrained(folder)
    with torch.no_grad():
        model.language_model.get_input_embeddings().weight[1] = torch.nan
    return model


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"num_beams": 2}, {"repetition_penalty": 1.2}])
def test_logits_that_are_not_finite_are_an_error(broken, settings):
    made = prompts(broken, lengths=(9, 12), tiles=(0, 0))
    for row in made:
        row["input_ids"][row["input_ids"] == 1] = 2
    assert broken.generate(padded(made), max_new_tokens=1, eos_ids=[], **settings)
    made[1]["input_ids"][3] = 1
    with pytest.raises(UserError, match=r"logits are not finite in float32: its weights hold NaN") as caught:
        broken.generate(padded(made), max_new_tokens=4, eos_ids=[], **settings)
    assert caught.value.row == 1


def test_a_row_whose_logits_are_not_finite_does_not_stop_the_others(broken):
    made = prompts(broken, lengths=(9, 12, 14), tiles=(0, 0, 0))
    for row in made:
        row["input_ids"][row["input_ids"] == 1] = 2
    made[1]["input_ids"][3] = 1
    for beams in (1, 2):
        requests = [Request(n, row["input_ids"], row["tiles"]) for n, row in enumerate(made)]
        engine = Engine(broken, StoppingCriteria(), max_new_tokens=5, num_beams=beams)
        for request in requests:
            engine.submit(request)
        assert len(list(engine.run())) == 3
        assert [bool(request.error) for request in requests] == [False, True, False]
        alone = [broken.generate(padded([made[n]]), max_new_tokens=5, eos_ids=[], num_beams=beams)[0] for n in (0, 2)]
        assert [requests[0].answer, requests[2].answer] == alone


def test_float16_that_overflows_names_the_type_and_the_remedy(folder):
    model = InternVL.from_pretrained(folder, dtype="float16")
    with torch.no_grad():
        model.language_model.model.layers[1].mlp.down_proj.weight *= 3e5
    with pytest.raises(UserError, match=r"not finite in float16, whose largest number is 65504; compute in bfloat16"):
        model.generate(padded(prompts(model)), max_new_tokens=4)


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_sampled_answers_do_not_depend_on_neighbours(model):
    made = prompts(model)
    settings = {"max_new_tokens": 10, "eos_ids": [], "temperature": 1.0, "top_p": 0.9, "seed": 3}
    together = model.generate(padded(made), **settings)
    assert together == [model.generate(padded([row]), **settings)[0] for row in made]
    assert together == model.generate(padded(made), **settings)
    assert together != model.generate(padded(made), **settings | {"seed": 4})
    assert together != model.generate(padded(made), max_new_tokens=10, eos_ids=[])


LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


def shares(params: SamplingParams, logits: torch.Tensor = LOGITS, draws: int = 2000) -> list[float]:
    """How often each token is chosen by rows of different seeds."""

    def column(value, dtype=torch.float32) -> torch.Tensor:
        return torch.full((draws,), value, dtype=dtype)

    numbers = uniform(torch.arange(draws), torch.zeros(draws, dtype=torch.long))
    settings = column(params.temperature), column(params.top_k, torch.long), column(params.top_p)
    ids = sample(logits.expand(draws, -1), *settings, numbers)
    return (ids.bincount(minlength=logits.shape[1]) / draws).tolist()


def test_sampling_follows_the_probabilities():
    assert shares(SamplingParams(temperature=1.0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    sharp = (LOGITS / 0.5).softmax(-1)[0].tolist()
    assert shares(SamplingParams(temperature=0.5)) == pytest.approx(sharp, abs=0.04)
    assert shares(SamplingParams(), draws=10) == [1.0, 0.0, 0.0, 0.0]


def test_the_least_temperatures_are_greedy():
    """Logits divided by them are beyond what float32 holds."""
    for temperature in (1e-30, 1e-38, 1e-45, 1e-60):
        assert shares(SamplingParams(temperature=temperature), 60 + LOGITS.flip(1), draws=10) == [0, 0, 0, 1.0]


def test_top_k_and_top_p_keep_the_most_likely():
    assert shares(SamplingParams(temperature=1.0, top_k=2)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert shares(SamplingParams(temperature=1.0, top_p=0.6)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert shares(SamplingParams(temperature=1.0, top_p=0.4)) == [1.0, 0, 0, 0]
    assert shares(SamplingParams(temperature=1.0, top_k=3, top_p=0.9))[3] == 0


def test_random_numbers_are_uniform_and_differ_by_seed_and_step():
    seeds, steps = torch.arange(400)[:, None], torch.arange(50)
    numbers = uniform(*torch.broadcast_tensors(seeds, steps))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert len(numbers.unique()) > 0.99 * numbers.numel()
    assert numbers.flatten().histc(20, 0, 1).tolist() == pytest.approx([1000] * 20, rel=0.15)
    for table in (numbers, numbers.T):  # neither neighbouring seeds nor neighbouring steps go together
        pairs = torch.stack([table[:-1].flatten(), table[1:].flatten()])
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.03
    high = uniform(torch.tensor([7, 7 + (1 << 40)]), torch.zeros(2, dtype=torch.long))
    assert high[0] != high[1], "all 56 bits of a seed count"


def test_repetition_penalty_equals_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, answers = torch.randn(2, 20), [[3, 3, 7], [0]]
    expected = [
        RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), row[None])[0] for ids, row in zip(answers, logits)
    ]
    seen = torch.zeros(2, 20, dtype=torch.bool)
    for row, ids in enumerate(answers):
        seen[row, ids] = True
    assert torch.equal(penalise_repetition(logits, seen, torch.full((2,), 1.3)), torch.stack(expected))


def test_repetition_penalty_acts_on_the_answer(model):
    batch = padded(prompts(model))
    found = model.generate(batch, max_new_tokens=20, eos_ids=[], repetition_penalty=1e6)
    assert all(len(set(answer)) == len(answer) for answer in found)


# -- the core, as a chat or a scheduler uses it ------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(5, 6), (9, 3), (4, 1)])
@torch.no_grad()
def test_a_second_turn_is_appended_to_the_cache(any_model, lengths):
    """A row read in two parts gives the logits of the whole read at once."""
    language_model = any_model.language_model
    embed = language_model.get_input_embeddings()
    first, second = (torch.randint(0, 200, (1, n)) for n in lengths)
    cache = KVCache()
    cache.reserve(1, sum(lengths))
    decoding.prefill(language_model, embed(first), [lengths[0]], cache, [0])
    logits = decoding.append(language_model, embed(second), cache, 0, lengths[0])
    whole = any_model(torch.cat([first, second], dim=1)).logits[:, -1]
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=0)


def test_all_done_keeps_this_process_going(model):
    batch = padded(prompts(model, lengths=(8,), tiles=(0,)))
    end = model.generate(batch, max_new_tokens=1, eos_ids=[])[0][0]
    asked = []
    found = model.generate(
        batch, max_new_tokens=9, eos_ids=[end], all_done=lambda own: asked.append(own) or len(asked) == 4
    )
    assert found == [[end]]
    assert asked == [True] * 4


# -- errors ------------------------------------------------------------------------------------------------------------


def test_context_is_checked_before_any_work(model):
    batch = padded(prompts(model, lengths=(9, 4096), tiles=(0, 0)))
    with pytest.raises(UserError, match=r"a prompt of 4096 tokens and its answer exceed the model's context of 4096"):
        model.generate(batch, max_new_tokens=1)


def test_misuse_is_refused(folder):
    model = InternVL.from_pretrained(folder)
    made = prompts(model)
    with pytest.raises(UserError, match="stream: expected a batch of one row, found 4"):
        next(model.stream(padded(made)))
    with pytest.raises(UserError, match="the batch is packed"):
        model.generate(packed(made))
    left = padded(made)
    left.attention_mask = left.attention_mask.flip(1)
    with pytest.raises(UserError, match="expected prompts padded on the right"):
        model.generate(left)
    with pytest.raises(UserError, match="in training mode"):
        model.train().generate(padded(made))


def test_settings_out_of_range_are_listed():
    with pytest.raises(UserError) as caught:
        SamplingParams(temperature=-1, top_p=0, top_k=-2, repetition_penalty=0)
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        assert f"{name}: expected" in str(caught.value)
