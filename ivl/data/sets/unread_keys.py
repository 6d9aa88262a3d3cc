"""Keys that are not read, of all rows of an index: each row holds the number of one of the sets of names there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ivl.types import printable

Names = tuple[str, ...]
_MOST = 4096
_OTHERS: Names = ("keys that differ from row to row",)


def number_of(names: Names, sets: list[Names]) -> int:
    """The number of a set of names in `sets`, which it is added to; 0 is the empty one, which `sets` begins with."""
    return int(merged(sets, [names])[0])


def merged(sets: list[Names], others: Sequence[Names]) -> np.ndarray:
    """(others,) uint16: the numbers of other sets in `sets`, which they are added to.

    Beyond some thousands of sets one stands for all others, as where keys are made of names or dates.
    """
    known = {names: number for number, names in enumerate(sets)}
    numbers = np.empty(len(others), np.uint16)
    for at, names in enumerate(others):
        names = names if names in known or len(sets) < _MOST else _OTHERS
        if names not in known:
            known[names] = len(sets)
            sets.append(names)
        numbers[at] = known[names]
    return numbers


def counts(numbers: np.ndarray, sets: Sequence[Names]) -> list[tuple[str, int, int]]:
    """Name, rows that hold it, and the first of them; most frequent first. `numbers`: (rows,) of the rows' sets."""
    present, first, times = np.unique(numbers, return_index=True, return_counts=True)
    found: dict[str, tuple[int, int]] = {}
    for number, row, count in zip(present.tolist(), first.tolist(), times.tolist()):
        for name in sets[number]:
            before, at = found.get(name, (0, row))
            found[name] = before + count, min(at, row)
    return sorted(((name, count, row) for name, (count, row) in found.items()), key=lambda one: (-one[1], one[2]))


def describe(found: Sequence[tuple[str, int, int]], where: Callable[[int], str], most: int = 10) -> str:
    """`counts` in one line: name, rows, `file:line` of the first."""
    texts = [f"{printable(name, ' ')} {count} ({where(row)})" for name, count, row in found[:most]]
    rest = len(found) - most
    return ", ".join(texts) + (f" and {rest} more" if rest > 0 else "")
