"""Folders in transformers' own layout, opened by transformers: processor, tokenizer and model, for every family."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ivl.architecture.hf_config import read_config
from ivl.commands.export import export
from ivl.data.processor import Processor
from ivl.data.text.tokenizer import Tokenizer
from ivl.export.verify import TEXTS
from ivl.model.internvl import InternVL
from ivl.types import UserError
from tests.tiny import FAMILIES, write_checkpoint

CASES = [(name, None, {}) for name in FAMILIES]
CASES += [("LlamaForCausalLM", "yi-symbols", {}), ("LlamaForCausalLM", "yi-prefix", {})]
CASES += [
    ("Qwen2ForCausalLM", None, {"force_image_size": 28}),
    ("InternLM2ForCausalLM", None, {"force_image_size": 84}),
]


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "tokenizer", "overrides"), CASES)
def test_processor_and_model_of_transformers_answer_as_ours(tmp_path, architecture, tokenizer, overrides):
    """Also where sentencepiece has symbols of its own (Yi), and where tiles have another size than the tower's."""
    base = write_checkpoint(tmp_path / "base", architecture, tokenizer=tokenizer, overrides=overrides)
    out = export(str(tmp_path / "out"), base=str(base), layout="hf")
    theirs, ours = AutoProcessor.from_pretrained(out), Processor.from_pretrained(base)
    size = ours.config.image_size
    image = Image.linear_gradient("L").resize((2 * size, size)).convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": " What is it?\n"}]
    made = theirs.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    example = ours({"query": "<image>\n What is it?\n", "images": [image]})
    assert made["input_ids"][0].tolist() == example.input_ids.tolist()
    assert made["pixel_values"].shape == example.tiles.shape
    twin, report = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    model = InternVL.from_pretrained(base)
    mine = model(example.input_ids[None], tiles=made["pixel_values"]).logits
    found = twin.eval()(**made).logits
    torch.testing.assert_close(found[..., : mine.shape[-1]], mine, atol=2e-5, rtol=0)
    again = Processor.from_pretrained(out)
    assert (again.config.image_size, again.config.tokens_per_tile) == (size, ours.config.tokens_per_tile)
    assert (
        again({"query": "<image>\n What is it?\n", "images": [image]}).input_ids.tolist() == example.input_ids.tolist()
    )
    text = "Is <|im_start|> a tag?"  # plain characters, as in the folder it was made from
    assert again({"query": text}).input_ids.tolist() == ours({"query": text}).input_ids.tolist()
    start = ours.tokenizer.added.get("<|im_start|>")
    if start is not None:
        assert ours({"query": text}).input_ids.tolist().count(start.id) == ours(
            {"query": "Is it a tag?"}
        ).input_ids.tolist().count(start.id)


FORMS = [(architecture, tokenizer) for architecture, tokenizer, overrides in CASES if not overrides]


@pytest.mark.parametrize(("architecture", "tokenizer"), FORMS)
def test_a_folder_of_this_layout_is_exported_again(tmp_path, architecture, tokenizer):
    """In both layouts: the tokenizer is read from `tokenizer.json` then, and written from what was read."""
    base = write_checkpoint(tmp_path / "base", architecture, tokenizer=tokenizer)
    first = export(str(tmp_path / "first"), base=str(base), layout="hf")
    ours = Processor.from_pretrained(base).tokenizer
    for layout in ("hf", "released"):
        again = export(str(tmp_path / layout), base=str(first), layout=layout)
        assert [Tokenizer.load(again).encode(text, bos=True) for text in TEXTS] == [
            ours.encode(text, bos=True) for text in TEXTS
        ]
    theirs = [AutoProcessor.from_pretrained(folder).tokenizer for folder in (first, tmp_path / "hf")]
    assert theirs[0](list(TEXTS)).input_ids == theirs[1](list(TEXTS)).input_ids


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_each_token_of_the_processor_has_a_row_of_embeddings(tmp_path, tied):
    """`<video>` in a text, which no release has a token for."""
    base = write_checkpoint(tmp_path / "base", llm={"tie_word_embeddings": tied})
    out = export(str(tmp_path / "out"), base=str(base), layout="hf")
    tokenizer = AutoProcessor.from_pretrained(out).tokenizer
    twin = AutoModelForImageTextToText.from_pretrained(out)
    rows = twin.get_input_embeddings().weight
    assert max(tokenizer.get_vocab().values()) < len(rows) == twin.config.text_config.vocab_size
    logits = twin(**tokenizer("what is <video> in HTML", return_tensors="pt")).logits
    assert logits.isfinite().all()
    assert logits.argmax(-1).max() < len(InternVL.from_pretrained(base).language_model.lm_head.weight)
    again = export(str(tmp_path / "again"), base=str(out), layout="hf")
    assert json.loads((again / "config.json").read_text()) == json.loads((out / "config.json").read_text())


def test_spare_rows_are_used(tmp_path):
    base = write_checkpoint(tmp_path / "base", llm={"vocab_size": 512})
    out = export(str(tmp_path / "out"), base=str(base), layout="hf")
    assert read_config(out).llm["vocab_size"] == 512


def test_a_tokenizer_without_a_form_there_is_refused(tmp_path, monkeypatch):
    import ivl.data.text.fast_tokenizer as fast

    def none(tokenizer):
        raise UserError("the tokenizers library gives other ids to <img>")

    base = write_checkpoint(tmp_path / "base")
    monkeypatch.setattr(fast, "fast_tokenizer", none)
    with pytest.raises(UserError, match="its tokenizer has no form in the hf layout: the tokenizers library"):
        export(str(tmp_path / "out"), base=str(base), layout="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_no_command_is_printed_that_the_folder_does_not_serve(tmp_path, capsys):
    """The engines run a release's own .py files."""
    base = write_checkpoint(tmp_path / "base")
    export(str(tmp_path / "plain"), base=str(base))
    assert "trust" not in capsys.readouterr().out
    (base / "modeling_internvl_chat.py").write_text("")
    export(str(tmp_path / "whole"), base=str(base))
    assert "vllm serve" in capsys.readouterr().out


@torch.no_grad()
@pytest.mark.parametrize("name", ["internvl3_8b", "internvl3_5_4b"])
def test_transformers_gives_the_recorded_answers_of_3_and_3_5(golden, tmp_path, name):
    """Prompts by the folder's chat template, thinking ones too, and the reference's greedy tokens one by one."""
    out = export(str(tmp_path / "hf"), base=str(golden / "checkpoints" / name), layout="hf", dtype="float32")
    processor = AutoProcessor.from_pretrained(out)
    twin = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    recording = json.loads((golden / "refs" / name / "generation.json").read_text())
    pixels, seen = np.load(golden / "refs" / name / "generation.npz"), 0
    for case in recording["cases"]:
        if "question" not in case or case.get("history") or not case["images"]:
            continue
        mask = torch.tensor(case["attention_mask"])
        prompt, answer = torch.tensor(case["input_ids"])[mask == 1], torch.tensor(case["new_tokens"][0])
        images = [{"type": "image", "image": Image.new("RGB", (56, 56))} for _ in case["images"]]
        if len(images) == 1 and case["num_patches"] == [1]:
            words = case["question"].removeprefix("<image>")
            messages = [{"role": "user", "content": [*images, {"type": "text", "text": words}]}]
            if case.get("system_message") is not None:
                messages.insert(0, {"role": "system", "content": case["system_message"]})
            made = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
            assert made["input_ids"][0] == prompt.tolist(), case["name"]
        ids = torch.cat([prompt, answer])[None]
        tiles = torch.from_numpy(pixels[f"{case['name']}.pixel_values"])
        logits = twin(input_ids=ids, pixel_values=tiles).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer.tolist(), case["name"]
        seen += 1
    assert seen >= 2
