"""Truncation of rows that are too long: fewer tiles, fewer turns, or the end cut off.

Image tokens count. All is decided from a row's text and the headers of its media, so lengths are known before pixels.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ivl.data.text.tokenizer import Tokenizer
from ivl.types import IGNORE, Conversation, UserError, plural


class Shape(NamedTuple):
    """Frames and size of a medium, from its header. Size in pixels; 0 where it is not known."""

    frames: int
    width: int
    height: int
    times: tuple[float, ...] = ()
    """Seconds of the frames of a video, where they are written into the prompt"""


@dataclass
class EncodedRow:
    """Encoded row: token ids, labels, and the tiles of its media."""

    conversation: Conversation
    shapes: list[Shape]
    """Shape of each medium; `limits` and `tiles` have one entry for each medium, too"""
    limits: list[int]
    """Most tiles of the image, or of each frame of the video"""
    tiles: list[list[int]]
    """Tiles of the image, or of each frame of the video"""
    ids: list[int]
    labels: list[int]
    notes: list[str] = field(default_factory=list)
    """Changes that made the row fit"""

    @property
    def num_tiles(self) -> int:
        return sum(map(sum, self.tiles))

    @property
    def num_supervised(self) -> int:
        """As `Example.num_supervised`."""
        return len(self.labels) - self.labels.count(IGNORE) - (self.labels[:1] not in ([], [IGNORE]))


CHANGES = {"tiles": "fewer tiles", "dropped": "oldest turns dropped", "text": "end of the text cut off"}
"""First word of a note → name of the change"""


def changes(notes: Sequence[str]) -> int:
    """Encode notes as a number: the bit n is set where the change n of CHANGES was made."""
    return sum(1 << n for n, word in enumerate(CHANGES) if any(note.startswith(word) for note in notes))


Encode = Callable[[Conversation, Sequence[Shape], Sequence[int]], EncodedRow]
Count = Callable[[Shape, int], int]


def truncated(row: EncodedRow, max_length: int, tokenizer: Tokenizer, tokens_per_tile: int) -> EncodedRow:
    """Cut off the end of a row. An image that the cut would go through is left out with all its tiles."""
    opening, closing = tokenizer.token_id("<img>"), tokenizer.token_id("</img>")
    ids = row.ids[:max_length]
    if ids.count(opening) > ids.count(closing):
        ids = ids[: -1 - ids[::-1].index(opening)]
    # `<img>` written by a user is never that token, so the image tokens left give the number of tiles
    tiles_left = ids.count(tokenizer.context_id) // tokens_per_tile
    tiles: list[list[int]] = []
    for frames in row.tiles:
        tiles.append([])
        for count in frames:
            tiles_left -= count
            if tiles_left >= 0:
                tiles[-1].append(count)
    notes = [f"text {len(row.ids)} -> {len(ids)} tokens"]
    return replace(row, tiles=tiles, ids=ids, labels=row.labels[: len(ids)], notes=notes)


def fitted(row: EncodedRow, max_length: int, tokens_per_tile: int, encode: Encode, count: Count) -> EncodedRow:
    """Lower the tiles, the largest image first; where that is not enough, drop the oldest turns.

    The last turn stays. Raises UserError where it does not fit with the fewest tiles there can be. A long conversation
    is encoded only a few times around a guess, not once for each dropped turn.
    """

    def lower(row: EncodedRow) -> list[int] | None:
        text = len(row.ids) - row.num_tiles * tokens_per_tile
        return lowered(row.shapes, row.limits, (max_length - text) // tokens_per_tile, count)

    full, turns = row, 0
    limits = lower(full)
    if limits is None:
        guess = _turns_to_drop(full, max_length, tokens_per_tile)
        row, limits, turns = _shortest_cut(full, guess, encode, lower)
    if limits is None:
        raise UserError(
            f"{len(full.ids)} tokens ({full.num_tiles * tokens_per_tile} of them image) but max_length is "
            f"{max_length}, and the last turn alone with the fewest tiles does not fit; shorten it or raise it"
        )
    before = row.num_tiles
    row = encode(row.conversation, row.shapes, limits)
    assert len(row.ids) <= max_length
    if row.num_tiles < before:
        row.notes.append(f"tiles {before} -> {row.num_tiles}")
    if turns:
        row.notes.append(f"dropped {plural(turns, 'turn')}")
    return row


Fit = tuple[EncodedRow, list[int] | None, int]
"""Row without its oldest turns, the limits under which it fits (None: there are none), and number of dropped turns"""


def _shortest_cut(full: EncodedRow, guess: int, encode: Encode, lower: Callable[[EncodedRow], list[int] | None]) -> Fit:
    """Drop as few of the oldest turns as needed; all but the last where the row does not fit even then.

    Search: `guess`, then numbers ever further from it until one fits and another does not, then those between.
    """
    messages, starts = full.conversation.messages, _starts(full)

    def without(turns: int) -> Fit:
        gone = sum(not isinstance(part, str) for message in messages[: starts[turns]] for part in message.parts)
        rest = replace(full.conversation, messages=messages[starts[turns] :])
        row = encode(rest, full.shapes[gone:], full.limits[gone:]) if turns else full
        return row, lower(row), turns

    best, too_few = without(len(starts) - 1), 0  # the row with all turns does not fit
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


def _starts(row: EncodedRow) -> list[int]:
    """Index of each turn's first message: a user's, or 0 where an answer comes before all questions."""
    messages = row.conversation.messages
    return [n for n, message in enumerate(messages) if n == 0 or message.role == "user"]


def _turns_to_drop(row: EncodedRow, max_length: int, tokens_per_tile: int) -> int:
    """Estimate of the number of turns to drop, by the characters of each turn and its fewest tiles."""
    sizes = [
        len(m.reasoning or "") + sum(len(p) if isinstance(p, str) else 0 for p in m.parts)
        for m in row.conversation.messages
    ]
    media = iter(row.shapes)
    fewest = [sum(next(media).frames for p in m.parts if not isinstance(p, str)) for m in row.conversation.messages]
    ratio = (len(row.ids) - row.num_tiles * tokens_per_tile) / max(1, sum(sizes))
    room: float = max_length
    n = len(sizes)
    while n and room >= 0:
        n -= 1
        room -= ratio * sizes[n] + fewest[n] * tokens_per_tile
    return bisect.bisect_right(_starts(row), n)


def lowered(shapes: Sequence[Shape], limits: Sequence[int], budget: int, count: Count) -> list[int] | None:
    """Lower limits until all media together have at most `budget` tiles; None where that is impossible.

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
