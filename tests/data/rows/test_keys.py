"""Keys of a row at every level: read, refused by name, or gathered for the list of keys that are not read."""

import json

import pytest

from ivl.data.index.index_build import build_index
from ivl.data.index.unread_keys import counts, describe, merged, number_of
from ivl.data.processor import Processor
from ivl.data.rows.formats import parse
from ivl.data.rows.keys import LOSS, WEIGHT
from ivl.data.sets.dataset import RowDataset
from ivl.system_text import NONE, R1
from ivl.types import Media, UserError
from tests.tiny import write_checkpoint

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def query(**keys):
    return {"query": "q", "response": "a"} | keys


def messages(*more, **keys):
    return {"messages": [USER, ANSWER, *more]} | keys


def conversations(**turn):
    return {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"} | turn]}


def content(*parts, **row):
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "q"}]}, ANSWER]} | row


UNREAD = [
    (query(score=3, width=4), {"score", "width"}),
    (query(start=1), {"start"}),
    (query(images=["a.jpg"], fps=1), {"fps"}),
    (query(images=[{"path": "a.jpg", "nframes": 1}]), {"images[].nframes"}),
    (conversations(model="x"), {"conversations[].model"}),
    (messages({"role": "user", "content": "q", "name": "Ann"}, ANSWER), {"messages[].name"}),
    (content({"type": "text", "text": "x", "cache_control": 1}), {"messages[].content[].cache_control"}),
    (
        content({"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}, "index": 2}),
        {"messages[].content[].detail", "messages[].content[].index"},
    ),
    (query(images=[{"path": "a.jpg", "width": 3}]), {"images[].width"}),
    (query(images=[{"path": "a.jpg", "start": 3}]), {"images[].start"}),
    (
        query(query="<bbox>", images=["a.jpg"], objects=[{"bbox": [1, 2, 3, 4], "caption": "c", "score": 1}]),
        {"objects[].score"},
    ),
    (query(query="<bbox>", images=["a.jpg"], objects={"bbox": [[1, 2, 3, 4]], "width": [9]}), {"objects.width"}),
    (query(answers=["a"], id=3, source="s", video=["a.mp4"], start=1, end=2, history=None, score=None), set()),
]


@pytest.mark.parametrize(
    ("row", "names"), UNREAD, ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else ""
)
def test_keys_that_are_not_read_are_gathered(row, names):
    assert set(parse(row, size=lambda _: (10, 10)).unread) == names


REFUSED = [
    (query(functions='[{"name": "w"}]'), "functions: this spelling is not read; write tools as `tools`"),
    (messages(audios=["a.wav"]), "audios: sound is not read"),
    (query(reasoning_content=["x"]), "reasoning_content: expected the text of a thought, found"),
    (query(response=None, thinking="x"), "thinking: a thought comes before an answer"),
    (query(response="<think>y</think>a", thinking="x"), "thinking: a thought apart, and </think> in the text"),
    (conversations(reasoning="x", thinking="y"), r"conversations\[1\]: reasoning and thinking do not agree"),
    (messages(USER | {"reasoning_content": "x"}, ANSWER), r"messages\[2\].reasoning_content: a thought comes before"),
    (messages(reasoning_content="x"), "reasoning_content: a row has several answers"),
    (
        messages(USER, {"role": "assistant", "content": None, "reasoning_content": "x"}),
        r"messages\[3\].reasoning_content: a thought comes before",
    ),
    (messages(USER, ANSWER | {"function_call": {"name": "f"}}), r"messages\[3\].function_call: this spelling"),
    (messages({"role": "user", "content": "q", "images": ["a.jpg"]}, ANSWER), r"messages\[2\].images: media of a turn"),
    (query(videos=[{"path": "a.mp4", "min_frames": 1}]), r"videos\[0\].min_frames: of a video are read: start, end"),
    (content({"type": "video", "video": "a.mp4", "sample_fps": 4}), r"messages\[0\].content\[0\].sample_fps"),
    (content({"type": "text", "text": "x", "loss": 0}), r"content\[0\].loss: a part is not weighed"),
    (query(weight=0), "weight: expected a number above 0, at most 1,000,000, found 0; leave out a row"),
    (query(weight=float("nan")), "weight: expected a number above 0"),
    (query(loss_weight="much"), "loss_weight: expected a number above 0"),
    (query(weight=True), "weight: expected a number above 0"),
    (query(weight=2, loss_scale=3), "weight and loss_scale do not agree; keep one"),
    (query(loss=False), "loss: expected 1 or true, found False; write it beside a turn"),
    (query(videos=["a.mp4"], video_fps=2), "video_fps: of a video are read"),
    (content({"type": "video", "video": "a.mp4"}, min_frames=2), "min_frames: of a video are read"),
    (query(videos=[{"path": "a.mp4", "start_time": 1}]), r"videos\[0\].start_time: of a video are read"),
    (conversations(masked=True), r"conversations\[1\].masked: write loss"),
    (messages(USER, ANSWER | {"mask": 0}), r"messages\[3\].mask: write loss"),
    (messages(USER, ANSWER | {"train_detail": [{"begin_offset": 0}]}), r"messages\[3\].train_detail: write loss"),
    ({"system": "one", "messages": [{"role": "system", "content": "two"}, USER, ANSWER]}, "two system messages"),
    (
        {"system": "one", "conversations": [{"from": "system", "value": "two"}, *conversations()["conversations"]]},
        r"system and conversations\[0\]: two system messages",
    ),
]


@pytest.mark.parametrize(("row", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_key_that_changes_the_meaning_is_refused_by_name(row, words):
    with pytest.raises(UserError, match=words):
        parse(row)


@pytest.mark.parametrize(
    "row",
    [
        query(reasoning_content="because <ref-object>", objects=[{"bbox": [1, 2, 3, 4], "caption": "c"}]),
        conversations(thinking="because", value="a"),
        messages(USER, ANSWER | {"reasoning": "because"}),
    ],
)
def test_a_thought_apart_from_its_answer(row):
    last = parse(row | ({"images": ["a.jpg"]} if "objects" in row else {}), size=lambda _: (10, 10)).messages[-1]
    assert last.parts == ("a",) and last.text == "a"
    assert last.reasoning is not None and last.reasoning.startswith("because") and "object>" not in last.reasoning


SYSTEMS = [(False, NONE), ("none", NONE), ("false", NONE), ("r1", R1), ("", ""), ("None", "None")]


@pytest.mark.parametrize(("system", "text"), SYSTEMS)
def test_the_system_turn_of_a_row(system, text):
    assert parse(query(system=system)).system == text
    if isinstance(system, str):
        assert parse({"messages": [{"role": "system", "content": system}, USER, ANSWER]}).system == text


@pytest.mark.parametrize("empty", [None, "", [], {}, "[]", False])
def test_an_empty_value_says_nothing(empty):
    row = query(tools=empty, audios=empty, reasoning_content=empty)
    assert parse(row) == parse(query())


def test_the_same_system_message_twice_is_one():
    row = {"system": "one", "messages": [{"role": "system", "content": "one"}, USER, ANSWER]}
    assert parse(row).system == "one"


@pytest.mark.parametrize("key", LOSS)
def test_what_is_learnt_is_said_by_turn(key):
    def trained(**keys):
        row = {"messages": [USER, ANSWER | keys, USER, ANSWER]}
        turns = [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"} | keys,
            *conversations()["conversations"],
        ]
        found = [[m.trained for m in parse(row).messages[1::2]] for row in (row, {"conversations": turns})]
        assert found[0] == found[1]
        return found[0]

    for value, first in ((0, False), (False, False), (0.0, False), (1, True), (True, True), (1.0, True), (None, True)):
        assert trained(**{key: value}) == [first, True], value
    for value in (0.5, 2, -1, "no", [0]):
        with pytest.raises(UserError, match=rf"\[1\].{key}: expected 0 or 1"):
            trained(**{key: value})
    with pytest.raises(UserError, match="do not agree"):
        trained(**{key: 0, "train" if key == "loss" else "loss": 1})
    with pytest.raises(UserError, match=rf"messages\[0\].{key}: only an assistant's turn"):
        parse({"messages": [USER | {key: 1}, ANSWER]})
    assert parse({"messages": [USER | {key: 0}, ANSWER]}).messages[1].trained
    assert not parse(query(**{key: 1})).unread and parse(query(**{key: 1})).weight == 1


@pytest.mark.parametrize("key", WEIGHT)
def test_the_weight_of_a_row(key):
    assert [parse(row | {key: 0.25}).weight for row in (query(), messages(), conversations())] == [0.25] * 3
    assert parse(query(**{key: "2.5"})).weight == 2.5  # a cell of a csv file is a text
    pair = parse(query(**{key: 2}, rejected_response="b"))
    assert (pair.weight, pair.rejected.weight) == (2, 2)


def test_a_path_between_img_tags_is_an_image_in_every_format():
    text = "One: <img>a.jpg</img>\nTwo: <img> https://b/c.png </img>?"
    expected = ("One: ", Media("image", "/m/a.jpg"), "\nTwo: ", Media("image", "https://b/c.png"), "?")
    rows = [
        {"query": text, "response": "<img>a.jpg</img>"},
        {"query": "q", "response": "a", "history": [[text, "<img>a.jpg</img>"]]},
        {"conversations": [{"from": "user", "value": text}, {"from": "gpt", "value": "<img>a.jpg</img>"}]},
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "<img>a.jpg</img>"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}, ANSWER]},
    ]
    for row in rows:
        conversation = parse(row, root="/m")
        assert conversation.messages[0].parts == expected
        assert all(isinstance(part, str) for part in conversation.messages[1].parts)


def test_an_img_tag_without_its_end(tmp_path):
    (tmp_path / "my picture").touch()
    for text in (
        "<img>a.jpg what?",
        "see <img> https://b/c \nwhat?",
        "<img>my picture",
        "<img>a b.PNG<img>c.png</img>",
    ):
        with pytest.raises(UserError, match="<img> without </img> before"):
            parse(query(query=text), root=tmp_path)
    conversation = parse(query(query="What does <img> do in HTML?"))
    assert conversation.messages[0].parts == ("What does <img> do in HTML?",)
    assert "".join(conversation.unread).startswith("<img> without </img>")


@pytest.mark.parametrize("mark", ["<IMAGE>", "<|image|>", "<|vision_start|>", "<|image_pad|>", "<image_1>", "[IMG]"])
def test_marks_of_other_programs_beside_an_image_without_a_mark(mark):
    text = f"{mark} What is it?"
    (named,) = parse(query(query=text, images=["a.jpg"])).unread
    assert named.startswith(f"{mark}, a mark of another program")
    assert not parse(query(query=text)).unread, "there is no image that it could stand for"
    assert not parse(query(query=f"<image> {text}", images=["a.jpg"])).unread


def test_the_times_of_a_part():
    row = content({"type": "video", "video": "a.mp4", "start": 1, "end": 2.5})
    assert parse(row).media == (Media("video", "a.mp4", 1.0, 2.5),)
    row = content({"type": "video", "video": {"path": "a.mp4", "start": 1}})
    assert parse(row).media == (Media("video", "a.mp4", 1.0, None),)


def test_sets_of_names():
    sets = [()]
    assert [number_of(names, sets) for names in ((), ("a",), ("b", "a"), ("a",))] == [0, 1, 2, 1]
    assert merged(sets, [(), ("c",), ("a",)]).tolist() == [0, 3, 1]
    found = counts(merged(sets, [("a",)] * 3 + [("c",), ("b", "a")]), sets)
    assert found == [("a", 4, 0), ("c", 1, 3), ("b", 1, 4)]
    assert describe(found, str, most=2) == "a 4 (0), c 1 (3) and 1 more"
    many = [()]
    numbers = merged(many, [(str(n),) for n in range(5000)])
    assert len(many) < 4200 and numbers[-1] == numbers[-2] == len(many) - 1


def test_an_index_counts_the_keys_that_are_not_read(tmp_path):
    write_checkpoint(tmp_path / "model", architecture="InternLM2ForCausalLM")
    files = {
        "a.jsonl": [query(), query(score=1), query(score=2, width=1)],
        "b.jsonl": [query(width=1), query(images=1)],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = RowDataset([tmp_path / name for name in files], Processor.from_pretrained(tmp_path / "model"))
    for _ in range(2):  # made, and from the cache
        index = build_index(rows, workers=0, cache_dir=tmp_path / "cache")
        assert index.unread_keys() == [("score", 2, 1), ("width", 2, 2)] and len(index.problems) == 1
    assert index.select([3, 0]).unread_keys() == [("width", 1, 0)]
