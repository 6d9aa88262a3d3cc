"""OpenGVLab's `chat`, `batch_chat` and label functions on random conversations, live and recorded (`internvl.json`)."""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from ivl.data.rows.formats import parse
from ivl.data.text.template import encode, find_template, written
from ivl.data.text.tokenizer import Tokenizer
from ivl.types import IGNORE
from tests.judges.conversations import conversations, text
from tests.judges.results import Result, record, versions_in
from tests.judges.side import answer, checkout
from tests.tiny import write_checkpoint

RECORDED = Path(__file__).with_name("internvl.json")
CASES = {
    "Hermes-2": "Qwen2ForCausalLM",
    "internlm2-chat": "InternLM2ForCausalLM",
    "phi3-chat": "Phi3ForCausalLM",
    "internvl2_5": "Qwen2ForCausalLM",
    "internvl2_5 (InternLM2)": "InternLM2ForCausalLM",
}
"""Template → language model, whose tokenizer's form is used"""
ROWS, CHATS, TOKENS = 300, 100, 4
FEW = 6
"""Conversations that are kept in the recording"""


def training_rows(template: str) -> list[dict[str, Any]]:
    """Rows in the form of its data; only the newest template takes a system turn."""
    rng, rows = random.Random(7), []
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    for row in conversations(ROWS, ["a.png", "b.png", "c.png"], seed=5):
        turns = [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]
        if template != "internvl2_5":
            turns = [turn for turn in turns if turn["from"] != "system"]
        rows.append({"conversations": turns, "tiles": [rng.randint(1, 3) for _ in row.get("images", ())]})
    return rows


def chats() -> list[dict[str, Any]]:
    """Questions with and without pictures, some after a history."""
    rng, made = random.Random(11), []
    for _ in range(CHATS):
        history = [[text(rng), text(rng)] for _ in range(rng.choice((0, 0, 1, 3)))]
        tiles = [rng.randint(1, 3) for _ in range(rng.choice((0, 1, 1, 2)))]
        marks = "<image>\n" * len(tiles)
        if history and rng.random() < 0.5:
            history[0][0] = marks + history[0][0]
            marks = ""
        made.append({"question": marks + text(rng), "history": history or None, "tiles": tiles})
    return made


def batch() -> list[dict[str, Any]]:
    rng = random.Random(13)
    return [{"question": text(rng), "tiles": rng.randint(1, 3)} for _ in range(20)]


def prompt(asked: dict[str, Any], template: str, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """Our prompt and its ids."""
    tiles = [asked["tiles"]] if isinstance(asked["tiles"], int) else asked["tiles"]
    question = asked["question"]
    if isinstance(asked["tiles"], int):
        question = "<image>\n" + question  # as batch_chat does, and `Chat`
    row = {"query": question, "history": asked.get("history"), "images": ["a.png"] * len(tiles)}
    arguments = (find_template(template), TOKENS, None)
    counts, conversation = [[n] for n in tiles], parse(row)
    return written(conversation, counts, *arguments), encode(conversation, counts, tokenizer, *arguments)[0]


def labels(row: dict[str, Any], template: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Our ids and labels of a training row."""
    parsed = parse({"conversations": row["conversations"], "image": ["a.png"] * len(row["tiles"])})
    made = encode(parsed, [[n] for n in row["tiles"]], tokenizer, find_template(template), TOKENS, None)
    return list(made[0]), list(made[1])


def trained(ids: list[int], marks: list[int], tokenizer: Tokenizer) -> list[str]:
    """Texts that are learnt from, one for each run of labels."""
    runs = groupby(zip(ids, marks, strict=True), lambda pair: pair[1] != IGNORE)
    return [tokenizer.decode([i for i, _ in run]) for learnt, run in runs if learnt]


def folder_of(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """Template and a folder with its tokenizer: InternLM2's as released, since the label functions count its tokens."""
    template = name.split()[0]
    if CASES[name] == "InternLM2ForCausalLM":
        return template, request.getfixturevalue("golden") / "checkpoints/internvl2_2b"
    return template, write_checkpoint(tmp_path / "base", CASES[name], template=template)


@pytest.mark.judge
@pytest.mark.parametrize("name", CASES)
def test_prompts_ids_and_labels(name, tmp_path, request):
    code = checkout("IVL_INTERNVL", "OpenGVLab/InternVL", "internvl_chat/internvl/train/dataset.py")
    template, folder = folder_of(name, tmp_path, request)
    tokenizer = Tokenizer.load(folder)
    asked, rows, many = chats(), training_rows(template), batch()
    task = {"checkout": str(code / "internvl_chat"), "folder": str(folder), "template": template, "system": None}
    task |= {"tokens": TOKENS, "chats": asked, "batch": many, "rows": rows}
    made = answer("internvl", task, tmp_path, PYTHONPATH="")
    different: list[Any] = []
    for question, theirs in zip(asked + many, made["chats"] + made["batch"], strict=True):
        if prompt(question, template, tokenizer) != (theirs["prompt"], theirs["ids"]):
            different.append((question, theirs, prompt(question, template, tokenizer)))
    known = Counter[str]()
    for row, theirs in zip(rows, made["rows"], strict=True):
        ids, marks = labels(row, template, tokenizer)
        if theirs["mismatch"]:
            known["whole row masked there after its mismatch warning"] += 1
            marks = theirs["labels"]
        if (ids, marks) != (theirs["ids"], theirs["labels"]):
            different.append((row, theirs, (ids, marks)))
    versions = versions_in("internvl", "transformers", "tokenizers")
    what = f"`chat`, `batch_chat` and label functions: prompts, ids and labels, {name}"
    cases = len(asked) + len(many) + len(rows)
    record(
        "internvl_" + re.sub(r"\W+", "_", name).strip("_"),
        [Result("OpenGVLab", what, cases, len(different), dict(known), versions)],
    )
    assert not different, different[0]
    if os.environ.get("IVL_RECORD"):
        keep(name, asked, rows, made, tokenizer)


def keep(name: str, asked: list[dict], rows: list[dict], made: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Write a few conversations with their prompts and learnt texts into the recording."""
    told = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.is_file() else {}
    pairs = [(row, theirs) for row, theirs in zip(rows, made["rows"], strict=True) if not theirs["mismatch"]]
    told[name] = {
        "chats": [q | {"prompt": theirs["prompt"]} for q, theirs in zip(asked[:FEW], made["chats"][:FEW], strict=True)],
        "rows": [
            row
            | {"text": tokenizer.decode(theirs["ids"]), "trained": trained(theirs["ids"], theirs["labels"], tokenizer)}
            for row, theirs in pairs[:FEW]
        ],
    }
    told = {key: told[key] for key in CASES if key in told}
    RECORDED.write_text(json.dumps(told, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_recorded_conversations(name, tmp_path, request):
    template, folder = folder_of(name, tmp_path, request)
    tokenizer, told = Tokenizer.load(folder), json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    assert len(told["chats"]) == len(told["rows"]) == FEW
    for question in told["chats"]:
        assert prompt(question, template, tokenizer)[0] == question["prompt"]
    for row in told["rows"]:
        ids, marks = labels(row, template, tokenizer)
        assert (tokenizer.decode(ids), trained(ids, marks, tokenizer)) == (row["text"], row["trained"])
