"""A row that is too long is made to fit: fewer tiles, fewer turns, or its end cut off. Image tokens are counted.

Everything is decided from a row's text and the headers of its media, so that lengths are known before pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ivl.data.tokenizer import Tokenizer
from ivl.types import IGNORE, Conversation, UserError, many


class Shape(NamedTuple):
    """What the header of a medium says. Size in pixels; 0 where it is not known."""

    frames: int
    width: int
    height: int


@dataclass
class Plan:
    """How a row is encoded."""

    conversation: Conversation
    shapes: list[Shape]
    """One for each medium, as the two lists that follow"""
    limits: list[int]
    """Most tiles of the image, or of each frame of the video"""
    tiles: list[list[int]]
    """Tiles of the image, or of each frame of the video"""
    ids: list[int]
    labels: list[int]
    notes: list[str] = field(default_factory=list)
    """What was changed to make the row fit"""

    @property
    def num_tiles(self) -> int:
        return sum(map(sum, self.tiles))

    @property
    def num_supervised(self) -> int:
        """As `Example.num_supervised`."""
        return len(self.labels) - self.labels.count(IGNORE) - (self.labels[:1] not in ([], [IGNORE]))


CHANGES = {"tiles": "fewer tiles", "dropped": "oldest turns dropped", "text": "end of the text cut off"}
"""First word of a note → what was changed"""


def changes(notes: Sequence[str]) -> int:
    """Notes as a number: the bit n is set where the change n of CHANGES was made."""
    return sum(1 << n for n, word in enumerate(CHANGES) if any(note.startswith(word) for note in notes))


Encode = Callable[[Conversation, Sequence[Shape], Sequence[int]], Plan]
Count = Callable[[Shape, int], int]


def truncated(plan: Plan, max_length: int, tokenizer: Tokenizer, tokens_per_tile: int) -> Plan:
    """The end cut off. An image that the cut would go through is left out whole, with its tiles."""
    opening, closing = tokenizer.token_id("<img>"), tokenizer.token_id("</img>")
    ids = plan.ids[:max_length]
    if ids.count(opening) > ids.count(closing):
        ids = ids[: -1 - ids[::-1].index(opening)]
    # `<img>` written by a user is never that token, so what is left tells how many tiles are
    kept = ids.count(tokenizer.context_id) // tokens_per_tile
    tiles: list[list[int]] = []
    for frames in plan.tiles:
        tiles.append([])
        for count in frames:
            kept -= count
            if kept >= 0:
                tiles[-1].append(count)
    notes = [f"text {len(plan.ids)} -> {len(ids)} tokens"]
    return replace(plan, tiles=tiles, ids=ids, labels=plan.labels[: len(ids)], notes=notes)


def fitted(plan: Plan, max_length: int, tokens_per_tile: int, encode: Encode, count: Count) -> Plan:
    """Fewer tiles, the largest image first; where that is not enough, without the oldest turns.

    The last turn stays. Raises UserError where it does not fit with the fewest tiles there can be.
    """
    whole, turns = plan, 0
    while True:
        text = len(plan.ids) - plan.num_tiles * tokens_per_tile
        limits = lowered(plan.shapes, plan.limits, (max_length - text) // tokens_per_tile, count)
        if limits is not None:
            break
        if sum(message.role == "user" for message in plan.conversation.messages) < 2:
            raise UserError(
                f"{len(whole.ids)} tokens ({whole.num_tiles * tokens_per_tile} of them image) but max_length is "
                f"{max_length}, and the last turn alone with the fewest tiles does not fit; shorten it or raise it"
            )
        messages = plan.conversation.messages
        gone = sum(not isinstance(part, str) for part in messages[0].parts)
        rest = replace(plan.conversation, messages=messages[2 if messages[0].role == "user" else 1 :])
        plan, turns = encode(rest, plan.shapes[gone:], plan.limits[gone:]), turns + 1
    before = plan.num_tiles
    plan = encode(plan.conversation, plan.shapes, limits)
    assert len(plan.ids) <= max_length
    if plan.num_tiles < before:
        plan.notes.append(f"tiles {before} -> {plan.num_tiles}")
    if turns:
        plan.notes.append(f"dropped {many(turns, 'turn')}")
    return plan


def lowered(shapes: Sequence[Shape], limits: Sequence[int], budget: int, count: Count) -> list[int] | None:
    """Limits under which all media together have at most `budget` tiles; None where there are none such.

    The medium with the most tiles, the first of several, is lowered by one step at a time.
    """
    limits = list(limits)
    counts = [shape.frames * count(shape, limit) for shape, limit in zip(shapes, limits, strict=True)]
    open_to_change = set(range(len(counts)))
    while sum(counts) > budget:
        if not open_to_change:
            return None
        n = max(sorted(open_to_change), key=lambda n: counts[n])
        lower = next(
            (limit for limit in range(limits[n] - 1, 0, -1) if shapes[n].frames * count(shapes[n], limit) < counts[n]),
            None,
        )
        if lower is None:
            open_to_change.remove(n)
        else:
            limits[n], counts[n] = lower, shapes[n].frames * count(shapes[n], lower)
    return limits
