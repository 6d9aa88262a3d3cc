"""Random conversations, reproducible by their seed: turns, pictures, systems, Chinese, emoji, blanks, empty answers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from PIL import Image

WORDS = (
    "red panda", "What is it?", "3.14", "How many sheep are there", "Yes.", "the left one", "a*b_c", "x = y + 1;", "OK",
    "你好", "请描述这张图片。", "书生·万象", "，", "日本語のテキスト", "한국어", "naïve café", "Ω≈ç√", "😀",
    "👩‍👩‍👧", "🇫🇷", "don't", "HTTP/2",
    "1,000,000", "<b>bold</b>", "{'a': [1, 2]}", "\t", "\n", "\n\n", "  ", " ", "\u3000", "...", "A.",
    "Привет", "مرحبا", "e\u0301", "ﬁ", "\u200b", "C:\\x", "100%", "#", "def f(x):\n    return x",
)  # fmt: skip
SYSTEMS = ("You are a careful reader.", "你是一个助手。", "Be brief 🙂.\nAnswer in one word.", " blanks ")
SIZES = ((64, 64), (200, 50), (50, 170), (300, 300), (31, 200), (112, 56))


def text(rng: random.Random, most: int = 8) -> str:
    """A text that is not blank alone."""
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, most))]
    joined = rng.choice(("", " ", " ")).join(words)
    return joined if joined.strip() else joined + "ok"


def pictures(folder: Path) -> list[str]:
    """Write a picture of each of SIZES."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for n, size in enumerate(SIZES):
        paths.append(str(folder / f"{n}.png"))
        Image.radial_gradient("L").resize(size).convert("RGB").save(paths[-1])
    return paths


def conversation(rng: random.Random, images: list[str], one_turn: bool = False) -> dict[str, Any]:
    """A row in the form of OpenAI's messages with `<image>` marks, as ms-swift and this program read it.

    `one_turn`: images stand in the first question alone.
    """
    messages: list[dict[str, str]] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    used: list[str] = []
    turns = rng.choice((1, 1, 2, 3, 5))
    for turn in range(turns):
        question = text(rng)
        number = rng.choice((0, 0, 1, 2)) if turn == 0 or not one_turn else 0
        used += [rng.choice(images) for _ in range(number)]
        places = [rng.choice((0, 0, len(question), rng.randint(0, len(question)))) for _ in range(number)]
        for place in sorted(places, reverse=True):
            question = question[:place] + "<image>" + rng.choice(("", "", "\n")) + question[place:]
        answer = text(rng)
        if turn < turns - 1 and rng.random() < 0.05:
            answer = ""
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages} | ({"images": used} if used else {})


def conversations(number: int, images: list[str], seed: int = 0, one_turn: bool = False) -> list[dict[str, Any]]:
    """So many conversations of one seed."""
    rng = random.Random(seed)
    return [conversation(rng, images, one_turn) for _ in range(number)]


def questions(images: list[str]) -> list[dict[str, Any]]:
    """Questions with no, one and two pictures, a system turn, and a second turn."""

    def user(text: str, number: int = 0) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "image"}] * number + [{"type": "text", "text": text}]}

    def said(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    asked = [
        ([user("What is it?")], 0),
        ([user("What is it?", 1)], 1),
        ([user("请描述这张图片。", 2)], 2),
        ([said("system", SYSTEMS[0]), user("How many sheep?", 1)], 1),
        ([user("How many?", 1), said("assistant", "four"), user("And cats?")], 1),
    ]
    return [
        {"messages": m, "images": [images[(k + n) % len(images)] for k in range(c)]} for n, (m, c) in enumerate(asked)
    ]
