"""Language models: rotary positions as recorded and without memory, masks, kernels, configs."""

import copy
from dataclasses import replace

import pytest
import torch

from ivl.architecture.config import Config, read_json
from ivl.checkpoint.hf_layout import llm_config
from ivl.checkpoint.weights import Files, load_weights
from ivl.model import attention as attention_module
from ivl.model.attention import choose_kernel, visible
from ivl.model.internvl import InternVL
from ivl.model.rotary import row_lengths
from ivl.model.sequence_layout import is_plain
from ivl.types import UserError
from tests.tiny import FAMILIES, config, random_state


def overridden(raw: dict, overrides: dict) -> Config:
    raw = copy.deepcopy(raw)
    for dotted, value in overrides.items():
        *path, last = dotted.split(".")
        place = raw
        for name in path:
            place = place[name]
        place[last] = value
    return Config.from_dict(raw)


def tiny(architecture: str, attention: str = "sdpa", **settings) -> InternVL:
    """A model of the family with random weights, without files."""
    _, template, extra = FAMILIES[architecture]
    raw = config(architecture, "300m", template, {"<IMG_CONTEXT>": 199}, extra | settings, {})
    model = InternVL.from_config(Config.from_dict(raw), attention=attention, image_token_id=199)
    model.load_state_dict(random_state(model.config, seed=0))
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_rotary_positions_and_sliding_window_equal_the_reference(recorded, attention):
    cases, arrays = recorded.json("rope.json"), recorded.arrays("rope.npz")
    raw = read_json(recorded.folder / "config.json")
    for case in cases:
        model = InternVL.from_config(overridden(raw, case["config_overrides"]), device="meta", attention=attention)
        load_weights(model, Files.of(recorded.folder), "cpu")
        name, ids = case["name"], arrays[f"{case['name']}.input_ids"][None]
        logits = model(ids).logits[0]
        top = logits.gather(-1, arrays[f"{name}.top20_ids"].long())
        torch.testing.assert_close(top, arrays[f"{name}.top20_values"], atol=1e-4, rtol=0, msg=name)
        torch.testing.assert_close(logits.logsumexp(-1), arrays[f"{name}.logsumexp"], atol=1e-4, rtol=0, msg=name)
        if "second_call_length" in case:
            # The reference answers a short row differently once it has seen a long one; ours as if it were new.
            short = ids[:, : case["second_call_length"]]
            again = model(short).logits[0]
            fresh = InternVL.from_config(model.config, device="meta", attention=attention)
            load_weights(fresh, Files.of(recorded.folder), "cpu")
            assert torch.equal(again, fresh(short).logits[0])
            theirs = arrays[f"{name}.second_call_top20_values"]
            assert (again.gather(-1, arrays[f"{name}.second_call_top20_ids"].long()) - theirs).abs().max() > 0.1


LONG = {
    "dynamic": (
        "LlamaForCausalLM",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    ),
    "longrope": ("Phi3ForCausalLM", {"original_max_position_embeddings": 16, "max_position_embeddings": 64}),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", LONG)
@torch.no_grad()
def test_a_row_is_not_changed_by_longer_neighbours(kind, attention):
    """A short and a long row, padded and packed, where only the long one passes the rotary limit."""
    architecture, settings = LONG[kind]
    model = tiny(architecture, attention, **settings)
    assert model.language_model.config.rope.limit == 16
    short, long = torch.randint(0, 190, (10,)), torch.randint(0, 190, (40,))
    alone = [model(ids[None]).logits[0] for ids in (short, long)]

    both = torch.zeros(2, 40, dtype=torch.long)
    both[0, :10], both[1] = short, long
    mask = torch.arange(40)[None] < torch.tensor([[10], [40]])
    out = model(both, attention_mask=mask, position_ids=torch.arange(40).expand(2, -1) * mask).logits
    torch.testing.assert_close(out[0, :10], alone[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[1], alone[1], atol=1e-5, rtol=0)

    pack = torch.cat([short, long])[None]
    positions = torch.cat([torch.arange(10), torch.arange(40)])[None]
    out = model(pack, position_ids=positions, row_ids=torch.tensor([[0] * 10 + [1] * 40])).logits[0]
    torch.testing.assert_close(out[:10], alone[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[10:], alone[1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_dynamic_frequencies_equal_those_of_transformers():
    """Beyond the limit, where transformers' module is fresh and has one row."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    architecture, settings = LONG["dynamic"]
    model = tiny(architecture, **settings)
    ours = model.language_model.model
    theirs = LlamaRotaryEmbedding(llm_config(model.config))
    positions, x = torch.arange(50)[None], torch.zeros(1)
    for own, their in zip(ours.rotary_emb(x, positions), theirs(x, positions)):
        torch.testing.assert_close(own, their, atol=1e-5, rtol=0)


def test_rotary_positions_are_not_rounded_with_the_weights():
    exact, rounded = tiny("Qwen2ForCausalLM"), tiny("Qwen2ForCausalLM").to(torch.bfloat16)
    positions, x = torch.arange(3000)[None], torch.zeros(1)
    for one, other in zip(
        exact.language_model.model.rotary_emb(x, positions), rounded.language_model.model.rotary_emb(x, positions)
    ):
        assert torch.equal(one, other)


def test_row_lengths_count_within_a_row():
    assert row_lengths(torch.tensor([[0, 1, 2, 0, 1, 0, 0]])).tolist() == [[3, 3, 3, 2, 2, 1, 1]]
    assert row_lengths(torch.tensor([[7], [3]])).tolist() == [[8], [4]]
    assert row_lengths(torch.tensor([[5, 6, 7, 0]])).tolist() == [[8, 8, 8, 1]]


# -- masks -------------------------------------------------------------------------------------------------------------


def shown(seen: torch.Tensor) -> list[str]:
    return ["".join("x" if cell else "." for cell in row) for row in seen[0, 0].tolist()]


def test_visible_is_causal_within_a_row():
    positions = torch.tensor([[0, 1, 0, 1, 2, 0]])
    rows = torch.tensor([[0, 0, 1, 1, 1, -1]])
    keys = positions.masked_fill(rows < 0, -1)
    assert shown(visible(positions, keys, rows, None)) == ["x.....", "xx....", "..x...", "..xx..", "..xxx.", ".....x"]


def test_visible_with_a_window_and_padding():
    positions = torch.arange(5)[None]
    assert shown(visible(positions, positions, None, 2)) == ["x....", "xx...", ".xx..", "..xx.", "...xx"]
    padded = torch.tensor([[0, 1, -1, -1, 2]])
    assert shown(visible(torch.tensor([[2]]), padded, None, None)) == ["xx..x"]


def test_right_padding_is_plain_and_nothing_else_is():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    assert is_plain(None, None)
    assert is_plain(mask, None)
    assert is_plain(mask, torch.tensor([[0, 1, 2], [0, 0, 0]]))
    assert not is_plain(mask, torch.tensor([[0, 1, 2], [1, 0, 0]]))
    assert not is_plain(mask.flip(1), None)
    assert not is_plain(None, torch.tensor([[0, 1, 0]]))


@pytest.mark.parametrize("architecture", FAMILIES)
@torch.no_grad()
def test_hidden_padding_inside_a_row_is_not_seen(architecture):
    model = tiny(architecture)
    embeds = torch.randn(1, 6, 64)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]]).bool()
    positions = torch.tensor([[0, 1, 0, 2, 3, 4]])
    whole = model.language_model.padded(embeds, mask, positions)
    without = model.language_model.padded(embeds[:, mask[0]])
    torch.testing.assert_close(whole[:, mask[0]], without, atol=1e-5, rtol=0)


# -- building ----------------------------------------------------------------------------------------------------------


def test_choose_kernel():
    assert choose_kernel("auto", "cpu", torch.bfloat16) == "sdpa"
    assert choose_kernel("eager", "cpu", torch.float32) == "eager"
    with pytest.raises(UserError, match="needs the package flash-attn, which is not installed"):
        choose_kernel("flash_attention_2", "cuda", torch.bfloat16)


def test_flash_attention_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(attention_module, "find_spec", lambda name: object())
    assert choose_kernel("auto", "cuda", torch.bfloat16) == "flash_attention_2"
    assert choose_kernel("auto", "cuda", torch.float32) == "sdpa"
    assert choose_kernel("auto", "cpu", torch.bfloat16) == "sdpa"
    with pytest.raises(UserError, match="computes in bfloat16 or float16, found torch"):
        choose_kernel("flash_attention_2", "cuda", torch.float32)


def test_internlm2_is_llama_with_its_bias(recwarn):
    made = llm_config(tiny("InternLM2ForCausalLM", bias=True).config)
    assert (made.model_type, made.attention_bias, made.mlp_bias) == ("llama", True, False)
    assert made.rope_parameters == {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000}
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (None, None, None)


def test_building_a_family_warns_of_nothing(caplog):
    import logging

    logging.getLogger("transformers").propagate = True
    try:
        for architecture in FAMILIES:
            tiny(architecture)
    finally:
        logging.getLogger("transformers").propagate = False
    assert not caplog.records


def test_ids_that_a_config_does_not_name_are_none():
    """Phi3's class has defaults beyond a small vocabulary."""
    settled = tiny("Phi3ForCausalLM").config
    bare = replace(settled, llm={k: v for k, v in settled.llm.items() if not k.endswith("token_id")})
    made = llm_config(bare)
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (None, None, None)


def test_what_no_release_has_is_refused():
    with pytest.raises(UserError, match="use_sliding_window: true is not supported"):
        tiny("Qwen2ForCausalLM", use_sliding_window=True)
    with pytest.raises(UserError, match=r"'GPT2LMHeadModel' is not a language model .* expected one of InternLM2"):
        InternVL(overridden(tiny("Qwen2ForCausalLM").config.raw, {"llm_config.architectures": ["GPT2LMHeadModel"]}))


def test_the_padding_token_gets_no_gradient():
    model = tiny("Qwen2ForCausalLM", pad_token_id=3)
    ids = torch.tensor([[1, 2, 3, 4, 3]])
    model(ids, labels=ids).loss.backward()
    gradient = model.language_model.model.embed_tokens.weight.grad
    assert not gradient[3].any()
    assert gradient[2].any()
