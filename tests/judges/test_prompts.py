"""Prompts that the tests of other programs expect, as data of ours (`prompts.json`): one image token for a tile."""

import json
from pathlib import Path

import pytest

from ivl.commands.export import export
from ivl.data.rows.formats import parse
from ivl.data.text.template import find_template, written
from tests.tiny import write_checkpoint

CASES = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))
OURS = "书生·万象"


@pytest.mark.parametrize("case", CASES, ids=[f"{case['judge']}: {case['about']}" for case in CASES])
def test_a_prompt_is_what_others_write(case):
    conversation = parse(case["row"])
    tiles = [[1] * case.get("frames", 1) for _ in conversation.media]
    template, prefix = find_template(case["template"]), case.get("frame_prefix", "Frame{i}: ")
    assert written(conversation, tiles, template, 1, case.get("system_message"), prefix) == case["prompt"]


@pytest.mark.parametrize("layout", ["released", "hf"])
@pytest.mark.parametrize("system", [None, "none"])
def test_the_chat_template_of_an_export_writes_lmdeploys_prompts(tmp_path, layout, system):
    """lmdeploy gives it texts with the image tokens already in them."""
    transformers = pytest.importorskip("transformers")
    overrides = {"system_turn": False} if system == "none" else {}
    base = write_checkpoint(tmp_path / "base", "Qwen3ForCausalLM", overrides=overrides)
    out = export(str(tmp_path / "out"), base=str(base), layout=layout)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for case in CASES:
        if case["judge"] == "lmdeploy" and case.get("system_message") == system:
            text = case["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
            messages = [{"role": "user", "content": text}]
            if "messages" in case["row"]:
                messages.insert(0, case["row"]["messages"][0])
            made = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert made == case["prompt"]
