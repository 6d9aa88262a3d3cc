"""Unread keys of all rows of an index; a row holds the number of its set of names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ivl.types import printable

Names = tuple[str, ...]
MOST = 4096
"""Sets of names from which one stands for all further ones, as where keys are built from names or dates"""
_OTHERS: Names = ("keys that differ from row to row",)


def number_of(names: Names, sets: list[Names]) -> int:
    """Number of a set of names in `sets`, to which it is added if new; 0 is the empty set, the first of `sets`."""
    return int(merged(sets, [names])[0])


def merged(sets: list[Names], others: Sequence[Names], most: int = MOST) -> np.ndarray:
    """Numbers, (others,) uint16, of other sets in `sets`, to which new ones are added.

    Beyond `most` sets one stands for all further ones.
    """
    known = {names: number for number, names in enumerate(sets)}
    numbers = np.empty(len(others), np.uint16)
    for at, names in enumerate(others):
        names = names if names in known or len(sets) < most else _OTHERS
        if names not in known:
            known[names] = len(sets)
            sets.append(names)
        numbers[at] = known[names]
    return numbers


def counts(numbers: np.ndarray, sets: Sequence[Names]) -> list[tuple[str, int, int]]:
    """Name, number of rows that hold it, and the first of them; most frequent first.

    `numbers`: (rows,) number of each row's set.
    """
    present, first, times = np.unique(numbers, return_index=True, return_counts=True)
    totals: dict[str, tuple[int, int]] = {}
    for number, row, count in zip(present.tolist(), first.tolist(), times.tolist()):
        for name in sets[number]:
            before, at = totals.get(name, (0, row))
            totals[name] = before + count, min(at, row)
    return sorted(((name, count, row) for name, (count, row) in totals.items()), key=lambda one: (-one[1], one[2]))


def describe(keys: Sequence[tuple[str, int, int]], where: Callable[[int], str], most: int = 10) -> str:
    """Format `counts` as one line: name, rows, `file:line` of the first."""
    texts = [f"{printable(name, ' ')} {count} ({where(row)})" for name, count, row in keys[:most]]
    rest = len(keys) - most
    return ", ".join(texts) + (f" and {rest} more" if rest > 0 else "")
