"""Always-run parity with transformers' own InternVLForConditionalGeneration, through folders in its layout."""

import json

import pytest
import torch
from transformers import InternVLForConditionalGeneration

from ivl.architecture.hf_config import released_config
from ivl.checkpoint.hf_layout import hf_config
from ivl.checkpoint.weights import save_weights
from ivl.model.internvl import InternVL
from ivl.types import UserError
from tests.model.rows import padded, rows
from tests.tiny import FAMILIES, TOWERS, write_checkpoint


def export(model: InternVL, folder, layout: str = "hf"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(model.config, model.image_token_id)))
    save_weights(model.state_dict(), folder, layout, model.config)
    return folder


VARIANTS = {f"{a}-{v}": (a, v, {}) for a in FAMILIES for v in TOWERS}
VARIANTS |= {f"Phi3ForCausalLM-plain-{v}": ("Phi3ForCausalLM", v, {"rope_scaling": None}) for v in TOWERS}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def pair(request, tmp_path):
    """The same random model twice: ours, and transformers' own reading of a folder we wrote."""
    architecture, vision, llm = request.param
    folder = write_checkpoint(tmp_path / "released", architecture, vision, llm=llm)
    ours = InternVL.from_pretrained(folder)
    theirs, report = InternVLForConditionalGeneration.from_pretrained(
        export(ours, tmp_path / "hf"), dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(report.values())
    return ours, theirs.eval()


@torch.no_grad()
def test_logits_equal_those_of_transformers(pair):
    ours, theirs = pair
    batch = padded(rows(ours))
    pixels = torch.randn(len(batch.tiles), 3, 56, 56)
    out = ours(batch.input_ids, batch.attention_mask, tiles=pixels, tiles_per_row=batch.tiles_per_row).logits
    expected = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), pixel_values=pixels).logits
    kept = batch.attention_mask
    torch.testing.assert_close(out[kept], expected[kept], atol=1e-5, rtol=0)


@torch.no_grad()
def test_greedy_answers_equal_those_of_transformers(pair):
    ours, theirs = pair
    batch = padded(rows(ours, lengths=(15,), tiles=(2,)))
    batch.tiles = torch.randn(2, 3, 56, 56)
    expected = theirs.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        pixel_values=batch.tiles,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert ours.generate(batch, max_new_tokens=12, eos_ids=[]) == expected[:, 15:].tolist()


@pytest.mark.parametrize("layout", ["hf", "hf-4"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_an_hf_folder_loads_and_comes_back_bit_for_bit(tmp_path, architecture, layout):
    ours = InternVL.from_pretrained(write_checkpoint(tmp_path / "released", architecture, template="internvl2_5"))
    again = InternVL.from_pretrained(export(ours, tmp_path / "hf", layout))
    assert again.image_token_id == ours.image_token_id
    state = ours.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    for name in (
        "vision",
        "select_layer",
        "ps_version",
        "downsample_ratio",
        "image_size",
        "tokens_per_tile",
    ):
        assert getattr(again.config, name) == getattr(ours.config, name), name
    ids = torch.randint(0, 200, (1, 300))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, ours(ids).logits)


def test_what_transformers_writes_loads_here(tmp_path):
    """The other direction: a folder written by transformers itself."""
    ours = InternVL.from_pretrained(write_checkpoint(tmp_path / "released", "LlamaForCausalLM"))
    theirs = InternVLForConditionalGeneration.from_pretrained(export(ours, tmp_path / "hf"), dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    again = InternVL.from_pretrained(tmp_path / "theirs")
    state = ours.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_tied_embeddings_stay_tied(tmp_path):
    folder = write_checkpoint(tmp_path / "released", "Qwen3ForCausalLM", llm={"tie_word_embeddings": True})
    ours = InternVL.from_pretrained(folder)
    assert ours.language_model.lm_head.weight is ours.language_model.get_input_embeddings().weight
    hf = export(ours, tmp_path / "hf")
    theirs = InternVLForConditionalGeneration.from_pretrained(hf, dtype=torch.float32)
    ids = torch.randint(0, 200, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_what_one_side_cannot_say_is_refused(tmp_path):
    old = InternVL.from_pretrained(write_checkpoint(tmp_path / "v1", overrides={"ps_version": "v1"}))
    with pytest.raises(UserError, match="the hf layout: ps_version must be 'v2', found 'v1'"):
        hf_config(old.config, old.image_token_id)
    new = InternVL.from_pretrained(write_checkpoint(tmp_path / "v2"))
    raw = hf_config(new.config, new.image_token_id)
    raw["vision_config"]["use_mean_pooling"] = False
    raw["vision_feature_select_strategy"] = "full"
    with pytest.raises(UserError, match=r"use_mean_pooling must be True, found False; vision_feature_select_strategy"):
        released_config(raw)
