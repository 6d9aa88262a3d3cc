"""Pairs of answers in every form they are written in; several images, boxes and videos in them; what is refused."""

import json

import pytest
from PIL import Image

from ivl.__main__ import main
from ivl.data.processor import Processor
from ivl.data.rows.formats import parse
from ivl.types import Media, UserError
from tests.lit.rows import write_rows
from tests.tiny import write_checkpoint

GOOD, BAD, ASKED = "It is a cat.", "A dog.", "<image>What is it?"
HUMAN, GPT = {"from": "human", "value": ASKED}, {"from": "gpt", "value": GOOD}
USER, ANSWER = {"role": "user", "content": ASKED}, {"role": "assistant", "content": GOOD}
BAD_GPT, BAD_ANSWER = {"from": "gpt", "value": BAD}, {"role": "assistant", "content": BAD}
PARTS = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
FORMS = {
    "LLaMA-Factory": {"conversations": [HUMAN], "chosen": GPT, "rejected": BAD_GPT},
    "its openai form": {"messages": [USER], "chosen": ANSWER, "rejected": BAD_ANSWER},
    "texts beside turns": {"conversations": [HUMAN], "chosen": GOOD, "rejected": BAD},
    "lists beside turns": {"conversations": [HUMAN], "chosen": [GPT], "rejected": [BAD_GPT]},
    "rejected object": {"conversations": [HUMAN, GPT], "rejected": BAD_GPT},
    "rejected text": {"messages": [USER, ANSWER], "rejected": BAD},
    "ShareGPT, ms-swift": {"conversations": [HUMAN, GPT], "rejected_response": BAD},
    "TRL": {"prompt": [USER], "chosen": [ANSWER], "rejected": [BAD_ANSWER]},
    "TRL, text": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "TRL, parts": {"prompt": [{"role": "user", "content": PARTS}], "chosen": [ANSWER], "rejected": [BAD_ANSWER]},
    "TRL, prompt inside": {"chosen": [USER, ANSWER], "rejected": [USER, BAD_ANSWER]},
    "TRL, prompt twice": {"prompt": "What is it?", "chosen": [USER, ANSWER], "rejected": [USER, BAD_ANSWER]},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_forms_of_pairs(row):
    conversation = parse(row | {"images": ["a.png"], "id": 7})
    assert conversation.messages[-1].text == GOOD and conversation.rejected.messages[-1].text == BAD
    assert conversation.messages[:-1] == conversation.rejected.messages[:-1] and len(conversation.messages) == 2
    assert conversation.media == conversation.rejected.media == (Media("image", "a.png"),)
    assert "".join(conversation.messages[0].text.split()) == "<image>Whatisit?"
    assert conversation.unread == conversation.rejected.unread == () and conversation.id == "7"


def test_several_turns_images_and_a_system_text():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nAnd <image>?"},
        {"from": "gpt", "value": "Two pictures."},
        {"from": "human", "value": "Which is older?"},
    ]
    row = {"conversations": turns, "chosen": {"from": "gpt", "value": "1"}, "rejected": {"from": "gpt", "value": "2"}}
    for conversation in ((both := parse(row | {"image": ["a.png", "b.png"]})), both.rejected):
        assert [medium.source for medium in conversation.media] == ["a.png", "b.png"]
        assert conversation.system == "Be brief." and len(conversation.messages) == 4
    assert (both.messages[-1].text, both.rejected.messages[-1].text) == ("1", "2")
    other = parse(row | {"image": ["a.png", "b.png"], "rejected_images": ["c.png", "d.png"]})
    assert [medium.source for medium in other.rejected.media] == ["c.png", "d.png"]


def test_boxes_of_each_answer():
    turns = [{"from": "human", "value": "<image>Find <ref-object>"}, {"from": "gpt", "value": "<bbox>"}]
    boxes = [[{"caption": "cat", "bbox": [x, 100, 800, 900], "bbox_type": "norm1000", "image": 0}] for x in (10, 700)]
    row = {"conversations": turns, "images": ["a.png"], "objects": boxes[0], "rejected": "<bbox>"}
    conversation = parse(row | {"rejected_objects": boxes[1]})
    assert conversation.messages[0] == conversation.rejected.messages[0]
    assert "[[10, 100, 800, 900]]" in conversation.messages[-1].text
    assert "[[700, 100, 800, 900]]" in conversation.rejected.messages[-1].text
    assert parse(row | {"rejected": "There is none."}).rejected.messages[-1].text == "There is none."
    with pytest.raises(UserError, match="rejected answer: 2 <bbox> marks but 1 object"):
        parse(row | {"rejected": "<bbox> and <bbox>"})


def test_a_pair_about_a_video_opens_it_once(tmp_path):
    write_checkpoint(tmp_path / "model")
    for n in range(3):
        Image.new("RGB", (60, 60), (80 * n, 0, 0)).save(tmp_path / f"{n}.png")
    processor = Processor.from_pretrained(tmp_path / "model")
    processor.pairs = True
    turns = [{"from": "human", "value": "<video>\nWhat happens?"}]
    row = {"video": [[f"{n}.png" for n in range(3)]], "conversations": turns, "chosen": GPT, "rejected": BAD_GPT}
    example = processor(row, root=tmp_path)
    assert example.rejected.shares_tiles and len(example.rejected.tiles) == 0 < len(example.tiles) == example.num_tiles
    assert example.tiles_per_image == example.rejected.tiles_per_image


REFUSED = [
    ({"conversations": [HUMAN], "chosen": GPT}, "rejected: not given; expected the worse answer, beside conversations"),
    ({"conversations": [HUMAN], "rejected": BAD_GPT}, "chosen: not given, and conversations ends with a question"),
    ({"conversations": [HUMAN, GPT], "chosen": GPT, "rejected": BAD}, "chosen: conversations ends with an answer"),
    ({"conversations": [HUMAN], "chosen": HUMAN, "rejected": BAD}, "chosen.from: expected gpt, found 'human'"),
    ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"role": "x"}}, "rejected: expected a text or {from: gpt"),
    ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": None}}, "expected a text, found"),
    ({"conversations": [HUMAN, GPT], "rejected": BAD, "rejected_response": BAD}, "expected one of them, found both"),
    ({"conversations": [HUMAN, GPT], "rejected_messages": [USER]}, "rejected_messages: belongs to messages"),
    ({"prompt": [USER], "chosen": [ANSWER]}, "rejected: not given; expected an answer, beside prompt"),
    ({"chosen": [ANSWER], "rejected": [BAD_ANSWER]}, "chosen: begins with the answer, and the row has no prompt"),
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant"}]}, "rejected answer: is missing"),
    ({"messages": [USER, ANSWER], "rejected_messages": [USER]}, "rejected answer: is missing; expected an assistant"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_no_pair_is_named(row, message):
    with pytest.raises(UserError, match=message):
        parse(row | {"images": ["a.png"]})


def test_words_of_other_meaning_are_no_answers():
    row = {"conversations": [HUMAN, GPT], "images": ["a.png"], "rejected": False, "chosen": True}
    conversation = parse(row)
    assert conversation.rejected is None and set(conversation.unread) == {"chosen", "rejected"}


def test_check_names_bad_pairs_of_every_form(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "model")
    write_rows(tmp_path)
    rows = [FORMS["LLaMA-Factory"], FORMS["TRL"], *(row for row, _ in REFUSED[:2])]
    rows.append({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row | {"images": ["0.png"]}) + "\n" for row in rows))
    argv = ["check", "--model.pretrained", str(folder), "--pairs", "--data.train", str(path)]
    assert main([*argv, "--out", str(tmp_path / "check"), "--workers", "0"]) == 2
    printed = capsys.readouterr().out
    for line, message in ((3, "rejected: not given"), (4, "chosen: not given"), (5, "the chosen and the rejected")):
        assert f"pairs.jsonl:{line}: {message}" in printed
    assert "5 rows, 3 with a problem" in printed
