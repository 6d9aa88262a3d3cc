"""A row that is too long is made to fit: fewer tiles, fewer turns, or its end cut off. Image tokens are counted.

Everything is decided from a row's text and the headers of its media, so that lengths are known before pixels.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ivl.data.text.tokenizer import Tokenizer
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
    tiles_left = ids.count(tokenizer.context_id) // tokens_per_tile
    tiles: list[list[int]] = []
    for frames in plan.tiles:
        tiles.append([])
        for count in frames:
            tiles_left -= count
            if tiles_left >= 0:
                tiles[-1].append(count)
    notes = [f"text {len(plan.ids)} -> {len(ids)} tokens"]
    return replace(plan, tiles=tiles, ids=ids, labels=plan.labels[: len(ids)], notes=notes)


def fitted(plan: Plan, max_length: int, tokens_per_tile: int, encode: Encode, count: Count) -> Plan:
    """Fewer tiles, the largest image first; where that is not enough, without the oldest turns.

    The last turn stays. Raises UserError where it does not fit with the fewest tiles there can be. A long conversation
    is not encoded again for each turn that goes, but a few times around a guess.
    """

    def limits_of(plan: Plan) -> list[int] | None:
        text = len(plan.ids) - plan.num_tiles * tokens_per_tile
        return lowered(plan.shapes, plan.limits, (max_length - text) // tokens_per_tile, count)

    full, turns = plan, 0
    limits = limits_of(full)
    if limits is None:
        guess = _turns_to_drop(full, max_length, tokens_per_tile)
        plan, limits, turns = _shortest_cut(full, guess, encode, limits_of)
    if limits is None:
        raise UserError(
            f"{len(full.ids)} tokens ({full.num_tiles * tokens_per_tile} of them image) but max_length is "
            f"{max_length}, and the last turn alone with the fewest tiles does not fit; shorten it or raise it"
        )
    before = plan.num_tiles
    plan = encode(plan.conversation, plan.shapes, limits)
    assert len(plan.ids) <= max_length
    if plan.num_tiles < before:
        plan.notes.append(f"tiles {before} -> {plan.num_tiles}")
    if turns:
        plan.notes.append(f"dropped {many(turns, 'turn')}")
    return plan


Fit = tuple[Plan, list[int] | None, int]
"""A plan without its oldest turns, the limits under which it fits (None: there are none), and how many turns went"""


def _shortest_cut(full: Plan, guess: int, encode: Encode, limits_of: Callable[[Plan], list[int] | None]) -> Fit:
    """Without as few of the oldest turns as will do; without all but the last where that does not fit either.

    Tried are `guess`, then numbers ever further from it until one fits and another does not, then those between.
    """
    messages, starts = full.conversation.messages, _starts(full)

    def without(turns: int) -> Fit:
        gone = sum(not isinstance(part, str) for message in messages[: starts[turns]] for part in message.parts)
        rest = replace(full.conversation, messages=messages[starts[turns] :])
        plan = encode(rest, full.shapes[gone:], full.limits[gone:]) if turns else full
        return plan, limits_of(plan), turns

    best, too_few = without(len(starts) - 1), 0  # to drop none is known not to do
    step, turns, bounded = 1, guess, {True: False, False: False}
    while best[1] is not None and best[2] - too_few > 1:
        turns = min(max(turns, too_few + 1), best[2] - 1)
        tried = without(turns)
        fits = tried[1] is not None
        if fits:
            best = tried
        else:
            too_few = turns
        bounded[fits] = True
        step = 2 * step
        turns = (best[2] + too_few) // 2 if all(bounded.values()) else turns - step + 1 if fits else turns + step - 1
    return best


def _starts(plan: Plan) -> list[int]:
    """The message that each turn begins with: a user's, or the first where an answer comes before all questions."""
    messages = plan.conversation.messages
    return [n for n, message in enumerate(messages) if n == 0 or message.role == "user"]


def _turns_to_drop(plan: Plan, max_length: int, tokens_per_tile: int) -> int:
    """About how many turns are too many, by the characters of each and its fewest tiles."""
    sizes = [sum(len(p) if isinstance(p, str) else 0 for p in m.parts) for m in plan.conversation.messages]
    media = iter(plan.shapes)
    fewest = [sum(next(media).frames for p in m.parts if not isinstance(p, str)) for m in plan.conversation.messages]
    ratio = (len(plan.ids) - plan.num_tiles * tokens_per_tile) / max(1, sum(sizes))
    room: float = max_length
    n = len(sizes)
    while n and room >= 0:
        n -= 1
        room -= ratio * sizes[n] + fewest[n] * tokens_per_tile
    return bisect.bisect_right(_starts(plan), n)


def lowered(shapes: Sequence[Shape], limits: Sequence[int], budget: int, count: Count) -> list[int] | None:
    """Limits under which all media together have at most `budget` tiles; None where there are none such.

    The medium with the most tiles, the first of several, is lowered by one step at a time.
    """
    fewest = (shape.frames * min(count(shape, 1), count(shape, limit)) for shape, limit in zip(shapes, limits))
    if sum(fewest) > budget:
        return None
    limits = list(limits)
    counts = [shape.frames * count(shape, limit) for shape, limit in zip(shapes, limits, strict=True)]
    total = sum(counts)
    largest = [(-tiles, n) for n, tiles in enumerate(counts)]
    heapq.heapify(largest)
    while total > budget:
        if not largest:
            return None
        tiles, n = heapq.heappop(largest)
        for limit in range(limits[n] - 1, 0, -1):
            fewer = shapes[n].frames * count(shapes[n], limit)
            if fewer < -tiles:
                limits[n], total = limit, total + fewer + tiles
                heapq.heappush(largest, (-fewer, n))
                break
    return limits
