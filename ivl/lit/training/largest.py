"""Largest training batch of a run, from the lengths of its rows."""

from __future__ import annotations

import math

import numpy as np

from ivl.estimate.training_step import BatchShape
from ivl.lit.types import RunData


def computed_tokens(data: RunData) -> np.ndarray:
    """Tokens of each training row that are computed, (rows,): those of a pair's prompt once, for both answers."""
    index = data.training_index()
    tokens = index.tokens.astype(int)
    return (tokens + index.supervised + 1) // 2 if data.processor.pairs else tokens


def largest_batch(data: RunData) -> BatchShape:
    """Largest batch of the training rows: the longest row, the most tiles, the mean number of supervised tokens.

    A pair counts as one row of its prompt and both answers.
    """
    index, computed = data.training_index(), computed_tokens(data)
    tokens, tiles, supervised = (int(counts.sum()) for counts in (index.tokens, index.tiles, index.supervised))
    options = data.options
    if options.is_packed:
        length = options.tokens_per_pack
        most = options.pack_tiles or math.ceil(length * tiles / tokens)
        most, targets = max(most, int(index.tiles.max())), math.ceil(length * supervised / tokens)
        length = math.ceil(length * float((computed / index.tokens).max()))
        return BatchShape(1, length, most, max(1, targets), packed=True)
    rows = min(options.rows_per_batch, len(index))
    most = int(np.sort(index.tiles)[-rows:].sum())
    return BatchShape(rows, int(computed.max()), most, max(1, math.ceil(rows * supervised / len(index))))
