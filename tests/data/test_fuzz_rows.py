"""Rows spoilt at random: each gives a valid example or a UserError of ours, never anything else."""

import copy
import json
import random
import re

import pytest
from PIL import Image

from ivl.data.processor import Processor
from ivl.data.row_files.json_line import loads
from ivl.types import UserError
from tests.data.bounds import peak_bytes, within
from tests.tiny import write_checkpoint

BOX = {"caption": "cat", "bbox": [10, 10, 50, 40], "bbox_type": "real", "image": 0}
ROWS = [
    {"query": "What?", "response": "A cat.", "history": [["q", "a"], ["<image>r", "b"]], "images": ["a.png"]},
    {"query": "<image> and <image>", "response": "differ", "images": ["a.png", "b.jpg"], "system": "Be brief."},
    {"query": "one <img>a.png</img> two <img>b.jpg</img>", "response": "text", "images": []},
    {"query": "Find <ref-object>", "response": "<bbox>", "images": ["a.png"], "objects": json.dumps([BOX])},
    {
        "query": "Find <ref-object> <ref-object>",
        "response": "<bbox><bbox>",
        "images": ["a.png", "b.jpg"],
        "objects": [BOX, BOX | {"bbox": [[1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4]], "bbox_type": "norm_1", "image": 1}],
    },
    {"query": "Clip", "response": "moves", "videos": ["clip.gif"], "start": 0.1, "end": 0.3},
    {
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "<box>[[1,2,3,4]]</box>"},
        ],
        "image": "b.jpg",
        "id": 7,
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat.", "loss": True},
        ]
    },
]
NASTY = [
    None, True, False, 0, -1, 7, 10**30, 1e308, -0.0, float("nan"), float("inf"), "", " ", "\0", "\ud800", "x" * 3000,
    "<image>", "<video>", "<ref-object>", "<bbox>", "<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>", "a.png",
    "gone.png",
    "a.png,b.jpg", "ftp://x/y.png", "data:image/png;base64,!!", "data:,", "/", "..", "clip.gif", "NaN", "[1,2,3,4]",
    "{",
    [], {}, [[]], [None], ["a.png"] * 30, [["a", "b"]] * 9, [1, 2], {"bytes": "x"}, {"path": "a.png"}, {"url": None},
    b"bytes",
    [{"role": "user"}], [{"from": "human", "value": None}], [{"type": "text"}], {"caption": 1}, "real", "norm_1000",
    "gpt",
    "user",
]  # fmt: skip
BOXES = [
    [50, 10, 10, 40], [10, 40, 50, 10], [-5, 0, 10, 10], [0, 0, 1e9, 1e9], [0, 0, 1e300, 5], [float("nan")] * 4,
    [0, 0, float("inf"), 5], ["1", "2", "3", "4"], [1, 2, 3], [1, 2, 3, 4, 5], [[1, 2, 3, 4], [9, 9, 1, 1]],
    [[1, 2], 3, 4, 5],
    [True, False, True, True], [None] * 4, [1.5, 2.5, 3.5, 4.5], [0, 0, 0, 0], "10,10,50,40", {"x": 1},
    [10**400, 1, 2, 3],
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_checkpoint(folder / "model", architecture="InternLM2ForCausalLM")
    Image.new("RGB", (60, 45), "red").save(folder / "a.png")
    Image.new("RGB", (90, 30), "blue").save(folder / "b.jpg")
    frames = [Image.new("RGB", (20, 20), (n * 40, 0, 0)) for n in range(5)]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    return folder


def nonzero_indices(value, path=()):
    """Every place inside a row, the row itself left out."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from nonzero_indices(inner, (*path, key))


def spoilt(rng):
    row = copy.deepcopy(rng.choice(ROWS))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not isinstance(row, dict) or not row:
            return row
        *before, last = rng.choice(list(nonzero_indices(row)))
        inside = row
        for key in before:
            inside = inside[key]
        way = rng.randrange(6)
        boxes = isinstance(row.get("objects"), list) and row["objects"] and isinstance(row["objects"][0], dict)
        if way == 0 and boxes:
            row["objects"][0]["bbox"] = copy.deepcopy(rng.choice(BOXES))
        elif way == 1:
            del inside[last]
        elif way == 2 and isinstance(inside[last], str):
            at = rng.randrange(len(inside[last]) + 1)
            inside[last] = inside[last][:at] + str(rng.choice(NASTY)) + inside[last][at + rng.randrange(3) :]
        elif way == 3:
            inside[last] = copy.deepcopy(rng.choice(rng.choice(ROWS).get("objects") or [BOX]))
        elif way == 4:
            row |= copy.deepcopy({key: value for key, value in rng.choice(ROWS).items() if rng.random() < 0.5})
        else:
            inside[last] = copy.deepcopy(rng.choice(NASTY))
    return row


def tried(row, processor, number, folder) -> bool:
    """Whether a row is valid; then its lengths are those of its Example. If not, the error says where."""
    try:
        conversation = processor.parse(row, f"rows.jsonl:{number + 1}", folder)
        lengths = processor.lengths(conversation)
    except UserError as error:
        assert str(error).startswith(f"rows.jsonl:{number + 1}: "), (row, error)
        return False
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} for {row!r}") from error
    assert 0 <= lengths.supervised < lengths.tokens <= processor.max_length, row
    for box in re.findall(r"<box> \[\[(.*?)\]\] </box>", " ".join(m.text for m in conversation.messages)):
        assert all(0 <= int(v) <= 1000 for v in re.findall(r"-?\d+", box)), row
    if number % 20 == 0:
        try:
            example = processor(conversation)
        except UserError as error:  # times outside of a video are seen where it is read
            assert "videos" in row and str(error).startswith("rows.jsonl:"), row
            return True
        assert (len(example), len(example.tiles), example.num_supervised) == lengths[:3], row
    return True


def fuzz(folder, count, seed):
    rng = random.Random(seed)
    options = ({}, {"max_length": 130}, {"max_length": 90, "on_too_long": "truncate_text"})
    processors = [Processor.from_pretrained(folder / "model", max_tiles=4, **given) for given in options]
    valid, before = 0, peak_bytes()
    for number in range(count):
        row = spoilt(rng)
        with within(5, row):
            valid += tried(row, processors[number % 3], number, folder)
    assert count / 10 < valid < 0.9 * count, "both kinds are met"
    assert peak_bytes() - before < 300e6


def test_spoilt_rows(folder):
    fuzz(folder, 2_000, seed=0)


@pytest.mark.slow
def test_many_spoilt_rows(folder):
    fuzz(folder, 20_000, seed=1)


def test_spoilt_lines():
    """Bytes of a line of jsonl changed at random: JSON, or the errors that a file of rows turns into one of ours."""
    rng = random.Random(2)
    for _ in range(2_000):
        line = bytearray(json.dumps(rng.choice(ROWS)).encode())
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(line))
            line[at : at + rng.randrange(3)] = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
        try:
            loads(bytes(line))
        except (ValueError, RecursionError):
            continue


@pytest.mark.parametrize("bbox", BOXES, ids=lambda bbox: repr(bbox)[:40])
def test_each_bad_box(folder, bbox):
    processor = Processor.from_pretrained(folder / "model", max_tiles=4)
    row = {"query": "Find <ref-object>", "response": "<bbox>", "images": ["a.png"], "objects": [BOX | {"bbox": bbox}]}
    if bbox in ([1.5, 2.5, 3.5, 4.5], [0, 0, 0, 0]):
        assert processor.lengths(row, root=folder).supervised
    else:
        with pytest.raises(UserError, match=r"rows.jsonl:1: objects\[0\]\.bbox"):
            processor.parse(row, "rows.jsonl:1", folder)
