"""Rows that begin the answer (`prefix: true`): prompts whose last words are the model's own."""

import json

import pytest

from ivl.data.index.index_build import build_index
from ivl.data.processor import Processor
from ivl.data.rows.formats import parse
from ivl.data.sets.dataset import RowDataset
from ivl.data.text.template import TEMPLATES, written
from ivl.types import UserError
from tests.tiny import write_checkpoint

QUESTION, BEGINNING = "Which animal?", "The animal is"
FORMS = {
    "query": {"query": QUESTION, "response": BEGINNING, "prefix": True},
    "conversations": {
        "conversations": [
            {"from": "human", "value": QUESTION},
            {"from": "gpt", "value": BEGINNING, "prefix": True},
        ]
    },
    "messages": {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": BEGINNING, "prefix": True},
        ]
    },
    "messages in parts": {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": [{"type": "text", "text": BEGINNING}], "prefix": True},
        ]
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_marked_answer_is_the_beginning_of_the_one_that_is_asked_for(form):
    conversation = parse(FORMS[form])
    assert [(m.role, m.text) for m in conversation.messages] == [("user", QUESTION)]
    assert conversation.prefix == BEGINNING and not conversation.unread and conversation.reference is None
    assert conversation.as_prompt() is conversation


@pytest.mark.parametrize("value", [False, None])
@pytest.mark.parametrize("form", ["query", "messages"])
def test_a_mark_that_is_off_changes_nothing(form, value):
    row = {"query": QUESTION, "response": "A cat.", "prefix": value}
    if form == "messages":
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "A cat.", "prefix": value}]
        row = {"messages": turns}
    conversation = parse(row)
    assert conversation.prefix == "" and conversation.messages[-1].text == "A cat." and not conversation.unread


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "prefix": True}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [USER, ANSWER, USER]}, r"messages\[1\].prefix: only the last turn, by the assistant"),
        ({"messages": [USER | {"prefix": True}]}, r"messages\[0\].prefix: only the last turn, by the assistant"),
        ({"messages": [USER, ANSWER | {"prefix": "Hello"}]}, r"messages\[1\].prefix: expected true or false, found 'H"),
        ({"messages": [USER, ANSWER | {"content": ""}]}, r"messages\[1\].prefix: the beginning of the answer is empty"),
        ({"messages": [USER, ANSWER | {"content": None}]}, r"messages\[1\].prefix: the beginning of the answer is emp"),
        ({"messages": [USER, ANSWER | {"content": [{"type": "text", "text": ""}]}]}, "beginning of the answer .* is e"),
        ({"messages": [USER, ANSWER | {"reasoning_content": "Hm."}]}, r"messages\[1\]: a thought apart, and the begin"),
        ({"messages": [ANSWER]}, "no user's turn"),
        ({"query": "Hi", "prefix": True}, "^prefix: the beginning of the answer is empty"),
        ({"query": "Hi", "prefix": "Hello"}, "^prefix: expected true or false, found 'Hello'"),
    ],
)
def test_a_mark_that_makes_no_sense_is_refused_by_name(row, problem):
    with pytest.raises(UserError, match=problem):
        parse(row)


def test_marks_of_a_prompt_without_media_stay_text_as_in_other_prompts():
    row = {"query": "What does <image> mean? <bbox>", "response": "The mark", "prefix": True}
    assert parse(row).messages[0].text == "What does <image> mean? <bbox>"


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_is_the_beginning_of_the_row_with_the_whole_answer(template):
    prompt = parse(FORMS["query"])
    whole = parse({"query": QUESTION, "response": f"{BEGINNING} a cat."})
    texts = [written(row, None, TEMPLATES[template], 0) for row in (prompt, whole)]
    assert texts[1].startswith(texts[0]) and texts[0].endswith(BEGINNING)


def test_it_stands_where_a_thinking_models_opening_would(tmp_path):
    processor = Processor.from_pretrained(write_checkpoint(tmp_path, overrides={"answer_prefill": "<think>\n"}))
    texts = [processor.prompt_text(processor.parse(row)) for row in ({"query": QUESTION}, FORMS["query"])]
    assert texts[0].endswith("<think>\n") and texts[1].endswith(BEGINNING) and "<think>" not in texts[1]


def test_nothing_is_learnt_from_it_and_rows_to_learn_from_are_refused(tmp_path):
    processor = Processor.from_pretrained(write_checkpoint(tmp_path / "model"))
    assert (processor(FORMS["query"]).labels == -100).all()
    path, rows = tmp_path / "rows.jsonl", [{"query": "Hi", "response": "Hello."}, FORMS["query"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"rows.jsonl:2: prefix: true marks the beginning of an answer that is asked "):
        RowDataset(path, processor)[1]
    prompts = RowDataset(path, processor, as_prompt=True)
    assert prompts[1].conversation.prefix == BEGINNING
    learnt, asked = (build_index(rows, 0, cache_dir=tmp_path) for rows in (RowDataset(path, processor), prompts))
    assert list(learnt.problems) == [1] and f"{path}:2: prefix: true marks" in learnt.problems[1]
    assert not asked.problems and not asked.unread_keys() and asked.tokens[1] == len(prompts[1])
