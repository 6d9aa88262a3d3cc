"""Ids, labels and prompts equal those recorded from the reference."""

import json
import unicodedata
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ivl.architecture.config import Config
from ivl.data.rows.formats import parse
from ivl.data.text.template import (
    TEMPLATES,
    Template,
    Thoughts,
    encode,
    find_template,
    release_system_message,
    written,
)
from ivl.data.text.tokenizer import Tokenizer
from ivl.system_text import NAMED, NONE, R1
from ivl.types import IGNORE, Conversation, Media, Message, UserError
from tests.tiny import write_tokenizer

CHECKPOINTS = (
    "internvl2_1b", "internvl2_2b", "internvl2_4b", "internvl2_26b", "internvl_chat_v1_5", "internvl3_8b",
    "internvl3_5_4b", "internvl3_5_30b_a3b",
)  # fmt: skip

NOT_FOLLOWED = {
    # name: (templates or checkpoints, why); "labels": ids are equal, labels are not
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


def excepted(table: dict, name: str, *places: str) -> bool:
    return name in table and any(place in table[name][0].split() for place in ("all", *places))


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
        if excepted(NOT_FOLLOWED, case["name"], case["template"], name):
            continue
        row = {"conversations": case["conversations"]}
        tiles = []
        if not case["text_only"]:
            tiles = [[n // P] for n in case["num_image_token_list"]]
            row["image"] = ["x.jpg"] * len(tiles)
        ids, labels = encode(parse(row), tiles, tokenizer, template, P, config.system_message)
        wanted = case["input_ids"]
        if "truncated" in case["name"]:
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
            asked = parse(row | {"system": case["system_message"]})
            prompt = case["prompt"] if "question" in case else case["prompt"][n]
            args = (template, config.tokens_per_tile, config.system_message)
            assert written(asked, tiles, *args) == prompt, case["name"]
            ids, _ = encode(asked, tiles, tokenizer, *args)
            mask = case["attention_mask"][n]
            assert ids == [i for i, m in zip(case["input_ids"][n], mask) if m], case["name"]
            assert tokenizer.token_id(template.end) == case["eos_token_id"]


def conversation(*texts: str, system: str | None = None) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[n % 2], (text,)) for n, text in enumerate(texts)), system)


def test_recorded_templates(golden):
    recorded = json.loads((golden / "templates.json").read_text())
    assert set(recorded) == set(TEMPLATES)
    for name, case in recorded.items():
        template = find_template(name)
        assert template.system_message == case["system_message"]
        texts = [text for turn in case["turns"] for text in turn if text is not None]
        assert written(conversation(*texts), None, template, 0) == case["prompt"]


def test_a_prompt_keeps_the_blanks_that_training_drops():
    """As the reference's chat and its trainer."""
    template = find_template("internlm2-chat")
    prompt = written(conversation(" a\n", " b ", " c "), None, template, 0)
    assert prompt.endswith(
        "user\n a\n<|im_end|><|im_start|>assistant\n b <|im_end|><|im_start|>user\n c <|im_end|><|im_start|>assistant\n"
    )
    trained = written(conversation(" a\n", " b "), None, template, 0)
    assert trained.endswith("user\na<|im_end|><|im_start|>assistant\nb<|im_end|>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_that_only_newer_templates_keep(name):
    """An answer before the first question, and in training the end of an empty one."""
    template = find_template(name)
    first = Message("assistant", ("Welcome!",))
    asked = conversation("a", "", "b", "c")
    whole = written(replace(asked, messages=(first, *asked.messages)), None, template, 0)
    prompt = written(replace(asked, messages=(first, *asked.messages[:-1])), None, template, 0)
    kept = name == "internvl2_5"
    assert ("Welcome!" in whole) == ("Welcome!" in prompt) == kept
    empty = template.answer + template.lead + template.end + template.gap
    assert (empty in whole) == kept and empty not in prompt
    assert template.answer + template.user + "b" in prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_system_turn_differs_from_an_empty_one(name):
    template = find_template(name)
    empty, none = (written(conversation("q", "a", system=s), None, template, 0) for s in ("", NONE))
    assert empty == template.system + template.after_user + none
    assert none.startswith(template.user)
    default = written(conversation("q", "a"), None, template, 0, NONE)
    assert default == none
    assert written(conversation("q", "a", system="s"), None, template, 0, NONE).startswith(template.system + "s")


THOUGHTFUL = Conversation(
    (
        Message("user", ("q",)),
        Message("assistant", ("one",), reasoning="because"),
        Message("user", ("r",)),
        Message("assistant", ("<think>\nso\n</think>\n\ntwo",)),
        Message("user", ("s",)),
        Message("assistant", ("three",)),
    )
)


def answers_of(template: Template, asked: Conversation = THOUGHTFUL) -> list[str]:
    text = written(asked, None, template, 0)
    return [part.partition(template.end)[0] for part in text.split(template.answer)[1:]]


def test_thoughts_as_the_template_writes_them():
    """A thought of a row's own key is written before its answer, and one in the text stays as it stands."""
    template = find_template("internvl2_5")
    so = "<think>\nso\n</think>\n\ntwo"
    assert answers_of(template) == ["<think>\nbecause\n</think>\n\none", so, "three"]
    as_qwen3 = replace(template, thoughts=Thoughts(in_history=False, empty=True))
    assert answers_of(as_qwen3) == ["one", "two", "<think>\n\n</think>\n\nthree"]
    assert answers_of(as_qwen3, replace(THOUGHTFUL, messages=THOUGHTFUL.messages[:4])) == ["one", so]
    prompt = replace(THOUGHTFUL, messages=THOUGHTFUL.messages[:-1])
    assert answers_of(as_qwen3, prompt) == ["one", "two", ""]


def test_a_thought_is_learnt_with_its_answer(checkpoint):
    _, _, tokenizer = checkpoint
    for template in supported(tokenizer):
        asked = replace(THOUGHTFUL, messages=THOUGHTFUL.messages[:2])
        _, labels = encode(asked, [], tokenizer, template, 4)
        learnt = tokenizer.decode([label for label in labels if label != IGNORE])
        assert learnt.strip() == f"<think>\nbecause\n</think>\n\none{template.end}"


def test_tokens_that_are_no_control_tokens_are_tokens_in_every_text(tmp_path):
    """3.5's own R1 prompt spells <think>; only special tokens are plain characters there."""
    write_tokenizer(tmp_path, "qwen3")
    tokenizer, template = Tokenizer.load(tmp_path), find_template("internvl2_5")
    tokens = ("<think>", "</think>", "<tool_call>", "<tool_response>", "<|fim_prefix|>")
    text = "".join(tokens) + "<|im_end|><|vision_start|>"
    ids, _ = encode(conversation(text, "y", system=text), [], tokenizer, template, 4)
    assert [ids.count(tokenizer.token_id(token)) for token in tokens] == [2] * len(tokens)
    assert ids.count(tokenizer.token_id("<|im_end|>")) == 3
    assert tokenizer.token_id("<|vision_start|>") not in ids
    r1, _ = encode(conversation("x", system=R1), [], tokenizer, template, 4)
    assert r1.count(tokenizer.token_id("<think>")) == r1.count(tokenizer.token_id("</think>")) == 1


def test_unknown_template():
    with pytest.raises(UserError, match=r"'vicuna' is not one .* Hermes-2, internlm2-chat, internvl2_5"):
        find_template("vicuna")


def test_the_system_message_of_a_release(tmp_path):
    template = find_template("internlm2-chat")
    assert release_system_message(tmp_path, template) is None
    code = """
import os
os._exit(3)
register_conv_template(Conversation(name='Hermes-2', system_message='no', sep='x'))
register_conv_template(
    Conversation(
        name='internlm2-chat',
        system_template='<|im_start|>system\\n{system_message}',
        system_message='You are an AI assistant whose name is InternLM (书生·浦语).',
        roles=('<|im_start|>user\\n', '<|im_start|>assistant\\n'),
    )
)
"""
    (tmp_path / "conversation.py").write_text(code, encoding="utf-8")
    assert release_system_message(tmp_path, template) == "You are an AI assistant whose name is InternLM (书生·浦语)."
    assert release_system_message(tmp_path, find_template("phi3-chat")) is None
    (tmp_path / "conversation.py").write_text("def (", encoding="utf-8")
    with pytest.raises(UserError, match=r"conversation\.py: not Python"):
        release_system_message(tmp_path, template)


def test_video_prefix(golden, checkpoint):
    _, config, _ = checkpoint
    recorded = json.loads((golden / "video.json").read_text())["prompt_prefix"]
    video = Media("video", "v.mp4")
    args = (find_template(config.template), 1)
    for case in recorded:
        tiles = [[1]] * case["num_frames"]
        for spelling, prefix in (("chat_readme", "Frame{i}: "), ("root_readme", "Frame-{i}: ")):
            asked = case[spelling] + "What?"
            images = parse({"query": asked, "images": ["x"] * case["num_frames"]})
            wanted = written(images, tiles, *args)
            for parts in ((video, "\nWhat?"), (video, "What?")):
                ours = Conversation((Message("user", parts),))
                assert written(ours, [[1] * case["num_frames"]], *args, frame_prefix=prefix) == wanted


def supported(tokenizer: Tokenizer) -> list:
    rows = TEMPLATES.values()
    return [
        t
        for t in rows
        if t.end in tokenizer.added and (t.name == "internvl_zh" or t.user[:12] in "".join(tokenizer.added))
    ]


plain = st.text(st.characters(codec="utf-8", exclude_characters="<▁["), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(plain, min_size=2, max_size=5), st.booleans())
def test_ids_are_those_of_the_whole_text(checkpoint, texts, image):
    """Span by span, and yet as the reference tokenises the joined text; labels cover the answers and their ends."""
    _, config, tokenizer = checkpoint
    P = config.tokens_per_tile
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    asked = conversation(*texts)
    if image:
        first = Message("user", ("Look: ", Media("image", "x"), texts[0]))
        asked = replace(asked, messages=(first, *asked.messages[1:]))
    for template in supported(tokenizer):
        ids, labels = encode(asked, [[2]] * image, tokenizer, template, P)
        assert ids == tokenizer.encode(written(asked, [[2]] * image, template, P), bos=True)
        assert len(labels) == len(ids)
        assert all(label in (IGNORE, i) for i, label in zip(ids, labels))
        learnt = tokenizer.decode([label for label in labels if label != IGNORE])
        # blanks before an answer may be in a token that begins in the template, or swallowed by <|assistant|>
        said = [text.lstrip() for text in learnt.split(template.end)]
        dropped = template.strip and len(texts) % 2 == 0
        assert said == [text.strip() if dropped else text.lstrip() for text in texts[1::2]] + [""]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            ["<IMG_CONTEXT>", "<img>", "</img>", "<|im_end|>", "<|end|>", "<s>", "</s>", "[UNUSED_TOKEN_145]"]
        )
        | plain,
        min_size=1,
    )
)
def test_control_tokens_of_a_user_are_plain_text(checkpoint, pieces):
    _, config, tokenizer = checkpoint
    text = "".join(pieces)
    assume(text not in NAMED)  # such as none: no system turn
    template = find_template(config.template)
    harmless = encode(conversation("x", "y", system="z"), [], tokenizer, template, 4)[0]
    ids, _ = encode(conversation(text, "y", system=text), [], tokenizer, template, 4)
    control = {token.id for token in tokenizer.added.values() if token.special}
    assert [i for i in ids if i in control] == [i for i in harmless if i in control]


def test_grounding_tokens_are_tokens_everywhere(checkpoint):
    _, config, tokenizer = checkpoint
    template = find_template(config.template)
    for text in ("<ref>a</ref>", "<box>[[1, 2, 3, 4]]</box>", "<quad>a</quad>"):
        ids, _ = encode(conversation(text, text, system=text), [], tokenizer, template, 4)
        for name in (text[: text.index(">") + 1], text[text.rindex("<") :]):
            assert ids.count(tokenizer.token_id(name)) == 3


def test_image_tokens_of_an_answer_are_plain_text(checkpoint):
    _, config, tokenizer = checkpoint
    ids, labels = encode(
        conversation("x", "<img><IMG_CONTEXT></img>"), [], tokenizer, find_template(config.template), 4
    )
    assert not {tokenizer.token_id(t) for t in ("<img>", "<IMG_CONTEXT>", "</img>")} & set(ids)
    assert "<img><IMG_CONTEXT></img>" in tokenizer.decode([i for i in labels if i != IGNORE])


def test_another_spelling_of_a_control_token_in_an_answer(golden):
    """InternLM2's vocabulary calls `<|im_end|>` by another name too; as the reference reads it, it is the token."""
    folder = golden / "checkpoints" / "internvl2_2b"
    tokenizer, template = Tokenizer.load(folder), find_template("internlm2-chat")
    ids, labels = encode(conversation("x", "so [UNUSED_TOKEN_145] on"), [], tokenizer, template, 4)
    again, _ = encode(conversation("x", "so <|im_end|> on"), [], tokenizer, template, 4)
    assert ids == again
    assert tokenizer.decode([i for i in labels if i != IGNORE]) == "so <|im_end|> on<|im_end|>"


def test_what_is_trained(checkpoint):
    """Of the template's words only the end of an answer; nothing of an answer that is not trained on."""
    _, _, tokenizer = checkpoint
    for template in supported(tokenizer):
        asked = conversation("q", "first", "q", "second", "q", "third")
        untrained = replace(asked.messages[1], trained=False)
        asked = replace(asked, messages=(asked.messages[0], untrained, *asked.messages[2:]))
        _, labels = encode(asked, [], tokenizer, template, 4)
        learnt = tokenizer.decode([label for label in labels if label != IGNORE])
        assert learnt == f"{template.lead}second{template.end}{template.lead}third{template.end}"
        assert labels[-1] == (IGNORE if template.gap else tokenizer.token_id(template.end))
