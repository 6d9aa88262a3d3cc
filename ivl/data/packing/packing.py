"""Packs of rows, filled to the last token: best fit, longest first, within limits of tokens and of tiles.

Rows are cut into windows of equal size. The rows of a window are taken longest first, those with tiles before those
without. Each goes into the open pack that it fills best, or opens a new one. At the end of a window its packs are
closed as they are; with `carry`, the rows of the emptiest go on to the next window.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from ivl.types import UserError

_CARRIED = 32
"""One of so many packs of a window may go on to the next, the emptiest ones"""
_FULL = 0.995
"""Share of a pack from which it stays closed"""


def fill_packs(
    tokens: np.ndarray,
    tiles: np.ndarray,
    max_tokens: int,
    max_tiles: int | None = None,
    window: int = 8192,
    carry: bool = False,
) -> list[list[int]]:
    """Fill packs of rows, each within both limits, by the rule at the top of this file.

    `tokens`, `tiles`: (rows,) in the order of the epoch. A pack lists positions in that order, ascending.
    Raises UserError where a row is above a limit by itself.
    """
    tokens, tiles = tokens.astype(np.int64), tiles.astype(np.int64)
    limit = int(tiles.sum()) if max_tiles is None else max_tiles
    for name, lengths, most in (("tokens", tokens, max_tokens), ("tiles", tiles, limit)):
        if len(lengths) and lengths.max() > most:
            raise UserError(
                f"packing: a row of {lengths.max()} {name} is above the {most} of a pack; "
                f"allow larger packs or shorter rows"
            )
    packs: list[list[int]] = []
    carried: list[int] = []
    windows = np.array_split(np.arange(len(tokens)), max(1, -(-len(tokens) // window)))
    for number, places in enumerate(windows):
        places = np.concatenate([np.array(carried, np.int64), places])
        filled, room = _fill(places.tolist(), tokens[places], tiles[places], max_tokens, limit)
        carried = []
        if carry and number < len(windows) - 1:
            emptiest = np.argsort(-room, kind="stable")[: len(filled) // _CARRIED]
            open_packs = {int(n) for n in emptiest if room[n] > 1 - _FULL}
            carried = [place for n in sorted(open_packs) for place in filled[n]]
            filled = [pack for n, pack in enumerate(filled) if n not in open_packs]
        packs += filled
    for pack in packs:
        pack.sort()
    return packs


def _fill(
    places: list[int], tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int
) -> tuple[list[list[int]], np.ndarray]:
    """Best fit, longest first; packs hold `places`. Rows with tiles come first, those without fill the room left.

    Returns the packs, and the share of each that is left: of tokens or tiles, whichever is less.
    """
    scale = max(max_tiles, 1)
    sizes, areas = tokens * scale, tiles * max_tokens  # in these units a pack has the same capacity for both
    capacity = max_tokens * scale
    costs = np.maximum(sizes, areas)
    packs: list[list[int]] = []
    left: list[tuple[int, int]] = []
    for with_tiles in (True, False):
        room = sorted((min(left[n]) if with_tiles else left[n][0], n) for n in range(len(packs)))
        order = np.flatnonzero((tiles > 0) == with_tiles)
        order = order[np.argsort(-costs[order], kind="stable")]
        for at, cost, size, area in zip(*(x.tolist() for x in (order, costs[order], sizes[order], areas[order]))):
            place = bisect_left(room, (cost, -1))
            if place < len(room):
                _, pack = room.pop(place)
            else:
                pack = len(packs)
                packs.append([])
                left.append((capacity, capacity))
            packs[pack].append(places[at])
            tokens_left, tiles_left = left[pack][0] - size, left[pack][1] - area
            left[pack] = tokens_left, tiles_left
            insort(room, (min(tokens_left, tiles_left) if with_tiles else tokens_left, pack))
    return packs, np.array([min(one) for one in left], np.float64) / capacity


def divide(groups: list[list[int]], count: int) -> None:
    """Split groups with most rows, in place, until there are `count`; all have at least one row."""
    missing = count - len(groups)
    if missing > 0 and count > (rows := sum(map(len, groups))):
        raise UserError(f"batches: {rows} rows cannot be spread over {count} batches; give fewer processes")
    while missing > 0:
        largest = sorted(range(len(groups)), key=lambda n: -len(groups[n]))[:missing]
        for n in largest:
            if len(groups[n]) > 1:
                half = len(groups[n]) // 2
                groups[n], rest = groups[n][:half], groups[n][half:]
                groups.append(rest)
                missing -= 1
