"""A long row is shortened as if one turn after another were dropped, with work that grows like the row."""

import random

import pytest

from ivl.data.truncation import EncodedRow, Shape, fitted, lowered
from ivl.types import IGNORE, Conversation, Media, Message, UserError

P = 4
"""Tokens of a tile"""


def tiles_of(shape, limit):
    return min(shape.width, limit)


class Encoder:
    """A message has a token for each character, and P for each tile; says how many tokens it has made."""

    def __init__(self):
        self.work = 0

    def __call__(self, conversation, shapes, limits):
        tiles = [[tiles_of(shape, limit)] for shape, limit in zip(shapes, limits, strict=True)]
        length = 3 + sum(len(part) for m in conversation.messages for part in m.parts if isinstance(part, str))
        length += P * sum(map(sum, tiles))
        self.work += length
        return EncodedRow(conversation, list(shapes), list(limits), tiles, [0] * length, [IGNORE] * length)


def dialogue(draw, turns, length, images=0.3, first="user"):
    messages, shapes = [], []
    for n in range(first == "assistant", turns):
        parts = ["x" * draw.randrange(1, length)]
        if n % 2 == 0 and draw.random() < images:
            parts.insert(0, Media("image", "a.jpg"))
            shapes.append(Shape(1, draw.randrange(1, 13), 1))
        messages.append(Message("assistant" if n % 2 else "user", tuple(parts)))
    return Conversation(tuple(messages)), shapes


def one_by_one(conversation, shapes, most, encode):
    """Turns dropped until the row fits, encoded again each time; None where it never does."""
    limits = [12] * len(shapes)
    starts = [n for n, message in enumerate(conversation.messages) if n == 0 or message.role == "user"]
    for start in starts:
        messages = conversation.messages[start:]
        gone = len(conversation.media) - len(Conversation(messages).media)
        plan = encode(Conversation(messages), shapes[gone:], limits[gone:])
        found = lowered(plan.shapes, plan.limits, (most - len(plan.ids) + plan.num_tiles * P) // P, tiles_of)
        if found is not None:
            return messages, found
    return None


def test_the_same_turns_go_as_one_by_one():
    draw, dropped, never = random.Random(0), 0, 0
    for _ in range(300):
        first = draw.choice(["user", "user", "assistant"])
        conversation, shapes = dialogue(draw, draw.randrange(2, 30), draw.choice([4, 40]), first=first)
        encode, most = Encoder(), draw.choice([20, 60, 200])
        expected = one_by_one(conversation, shapes, most, encode)
        plan = encode(conversation, shapes, [12] * len(shapes))
        if expected is None:
            never += 1
            with pytest.raises(UserError, match=f"max_length is {most}, and the last turn alone"):
                fitted(plan, most, P, encode, tiles_of)
            continue
        found = fitted(plan, most, P, encode, tiles_of)
        assert (found.conversation.messages, found.limits) == expected
        gone = conversation.messages[: len(conversation.messages) - len(expected[0])]
        turns = sum(n == 0 or message.role == "user" for n, message in enumerate(gone))
        dropped += turns > 1
        assert [note for note in found.notes if note.startswith("dropped")] == (
            [f"dropped {turns} turn{'s' * (turns != 1)}"] if turns else []
        )
    assert dropped > 50 and never > 20


def test_work_grows_like_the_row():
    for turns in (400, 4_000):
        conversation, shapes = dialogue(random.Random(1), turns, 80, images=0)
        encode = Encoder()
        plan = encode(conversation, shapes, [])
        for share in (0.9, 0.5, 0.1):
            encode.work = 0
            fitted(plan, int(share * len(plan.ids)), P, encode, tiles_of)
            assert encode.work < 8 * len(plan.ids), "a dozen tries, not one for each turn"
        encode.work = 0
        fitted(plan, 300, P, encode, tiles_of)
        assert encode.work < 10_000, "that of what stays"


def test_tiles_of_many_images_are_lowered_with_few_questions():
    asked = []

    def count(shape, limit):
        asked.append(limit)
        return tiles_of(shape, limit)

    for images in (100, 1_000):
        asked.clear()
        shapes = [Shape(1, 12, 1)] * images
        assert lowered(shapes, [12] * images, images, count) == [1] * images
        assert len(asked) < 20 * images
        assert lowered(shapes, [12] * images, images - 1, count) is None
    assert lowered([Shape(1, 6, 1), Shape(2, 6, 1), Shape(1, 6, 1)], [6, 6, 6], 22, tiles_of) == [6, 5, 6]
    assert lowered([Shape(1, 6, 1), Shape(1, 6, 1)], [6, 6], 11, tiles_of) == [5, 6], "the first of several"
