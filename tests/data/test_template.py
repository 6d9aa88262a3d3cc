"""Ids, labels and prompts equal those recorded from the reference."""

import json
from dataclasses import replace

import pytest

from ivl.config import Config
from ivl.data.formats import parse
from ivl.data.template import TEMPLATES, encode, find_template, written
from ivl.data.tokenizer import Tokenizer
from ivl.types import IGNORE, Conversation, Media, Message, UserError

CHECKPOINTS = ("internvl2_1b", "internvl2_2b", "internvl2_4b", "internvl2_26b", "internvl_chat_v1_5")

NOT_FOLLOWED = {
    # name: (templates, why); "labels": ids are equal, labels are not
    "ends_with_human": ("all", "a trailing question is a prompt here, not a supervised turn"),
    "more_placeholders_than_images": ("all", "an error here"),
    "fewer_placeholders_than_images": ("all", "an error here"),
    "empty_answer": ("all", "an error here: nothing to learn"),
    "newline_only_answer": ("internlm2-chat", "blanks are dropped, then as an empty answer"),
    "special_tokens_in_text": ("internlm2-chat phi3-chat", "a user's <s> is plain text here"),
    "system_first": ("all", "the reference raises KeyError; here it is the system message"),
}
LABELS_NOT_FOLLOWED = {
    "im_end_in_answer": ("Hermes-2 phi3-chat", "the reference masks the whole row after its mismatch warning"),
    "empty_answer_then_turn": ("Hermes-2 phi3-chat", "the reference masks the whole row after its mismatch warning"),
}


def excepted(table: dict, name: str, template: str) -> bool:
    return name in table and (table[name][0] == "all" or template in table[name][0].split())


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, golden):
    folder = golden / "checkpoints" / request.param
    return request.param, Config.load(folder), Tokenizer.load(folder)


def test_recorded_labels(checkpoint, golden):
    name, config, tokenizer = checkpoint
    template = find_template(config.template)
    P = config.tokens_per_tile
    seen = 0
    for case in json.loads((golden / "refs" / name / "labels.json").read_text()):
        if excepted(NOT_FOLLOWED, case["name"], case["template"]):
            continue
        row = {"conversations": case["conversations"]}
        tiles = []
        if not case["text_only"]:
            tiles = [[n // P] for n in case["num_image_token_list"]]
            row["image"] = ["x.jpg"] * len(tiles)
        ids, labels = encode(parse(row), tiles, tokenizer, template, P, config.system_message)
        wanted = case["input_ids"]
        if case["name"].startswith("truncated"):
            assert len(ids) > len(wanted)
            ids, labels = ids[: len(wanted)], labels[: len(wanted)]
        assert ids == wanted[: len(ids)], case["name"]
        assert all(i == tokenizer.pad_id for i in wanted[len(ids) :]), case["name"]
        if not excepted(LABELS_NOT_FOLLOWED, case["name"], case["template"]):
            assert labels == case["labels"][: len(labels)], case["name"]
            seen += 1
    assert seen >= 17


def test_recorded_prompts(checkpoint, golden):
    name, config, tokenizer = checkpoint
    template = find_template(config.template)
    recording = json.loads((golden / "refs" / name / "prompts.json").read_text())
    assert recording["default_system_message"] == template.system_message
    assert recording["img_context_token_id"] == tokenizer.context_id
    for case in recording["cases"]:
        questions = case.get("questions") or [case["question"]]
        counts = case.get("num_patches_list") or ([case["num_tiles"]] if case["num_tiles"] else [])
        for n, question in enumerate(questions):
            tiles = [[c] for c in (counts if "question" in case else counts[n : n + 1]) if c]
            row = {"query": question, "history": case.get("history"), "images": ["x.jpg"] * len(tiles)}
            conversation = parse(row | {"system": case["system_message"]})
            prompt = case["prompt"] if "question" in case else case["prompt"][n]
            args = (template, config.tokens_per_tile, config.system_message)
            assert written(conversation, tiles, *args) == prompt, case["name"]
            ids, labels = encode(conversation, tiles, tokenizer, *args)
            mask = case["attention_mask"][n]
            assert ids == [i for i, m in zip(case["input_ids"][n], mask) if m], case["name"]
            assert tokenizer.token_id(template.end) == case["eos_token_id"]
