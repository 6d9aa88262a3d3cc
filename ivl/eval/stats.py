"""Bootstrap intervals of a benchmark's number, and tests of two files of answers.

Units are drawn within their category, since a benchmark's categories are fixed. Numbers for a seed are the same on
every machine: NumPy promises them for `RandomState`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ivl.eval.rules import Scored

LEVEL = 0.95
_AT_ONCE = 4_000_000
"""Number of draws held in memory together."""


@dataclass(frozen=True)
class Difference:
    """Difference of two files on the same questions: the second less the first."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided p of the paired bootstrap."""
    mcnemar: float | None
    """Two-sided exact p of McNemar's test; None where answers are not simply right or wrong."""


def _draws(scored: Scored, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield weights (r, U), the number of draws of each unit, `resamples` rows in all."""
    rng = np.random.RandomState(seed)
    members = [np.flatnonzero(scored.category == n) for n in range(len(scored.categories))]
    size = max(1, _AT_ONCE // len(scored.counts))
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        weights = np.zeros((rows, len(scored.counts)))
        for member in members:
            n = len(member)
            drawn = rng.randint(0, n, (rows, n)) + np.arange(rows)[:, None] * n
            weights[:, member] = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        yield weights


def _ends(values: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def interval(scored: Scored, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the reported number."""
    return _ends(np.concatenate([scored.total(weights) for weights in _draws(scored, resamples, seed)]))


def difference(a: Scored, b: Scored, resamples: int = 1000, seed: int = 0) -> Difference:
    """Compare two files whose rows are the same questions in the same order: the same units are drawn for both."""
    assert a.unit == b.unit, "the rows of two files must be aligned"
    gaps = np.concatenate([b.total(w) - a.total(w) for w in _draws(a, resamples, seed)])
    beyond = min((gaps <= 0).sum(), (gaps >= 0).sum())
    p = min(1.0, 2 * (1 + int(beyond)) / (resamples + 1))
    return Difference(float(b.total() - a.total()), *_ends(gaps), p, _mcnemar(a, b))


def _mcnemar(a: Scored, b: Scored) -> float | None:
    from scipy.stats import binomtest  # slow to import

    if a.counts.shape[1] != 2 or not {*a.counts[:, 0], *b.counts[:, 0]} <= {0.0, 1.0}:
        return None
    gained = int((b.counts[:, 0] > a.counts[:, 0]).sum())
    lost = int((b.counts[:, 0] < a.counts[:, 0]).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
