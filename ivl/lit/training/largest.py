"""Largest training batch of a run, from the lengths of its rows."""

from __future__ import annotations

import math

import numpy as np

from ivl.estimate.training_step import BatchShape
from ivl.lit.types import RunData


def largest_batch(data: RunData) -> BatchShape:
    """Largest batch of the training rows: the longest row, the most tiles, the mean number of supervised tokens."""
    index = data.training_index()
    tokens, tiles, supervised = (int(counts.sum()) for counts in (index.tokens, index.tiles, index.supervised))
    options = data.options
    if options.is_packed:
        length = options.tokens_per_pack
        most = options.pack_tiles or math.ceil(length * tiles / tokens)
        most, targets = max(most, int(index.tiles.max())), math.ceil(length * supervised / tokens)
        return BatchShape(1, length, most, max(1, targets), packed=True)
    rows = min(options.rows_per_batch, len(index))
    most = int(np.sort(index.tiles)[-rows:].sum())
    return BatchShape(rows, int(index.tokens.max()), most, max(1, math.ceil(rows * supervised / len(index))))
