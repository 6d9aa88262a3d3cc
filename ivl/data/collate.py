"""Collation: a list of Example → Batch, padded on the right or packed into one row.

Masks come from lengths: a pad id inside a text is an ordinary token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ivl.types import IGNORE, Batch, Example, SequenceLayout, nonzero_indices, supervised_indices


def collate(examples: Sequence[Example], pad_id: int, packed: bool = False, image_id: int | None = None) -> Batch:
    """Batch of the examples in order: (B, T) with T the longest length, or packed (1, T) with T the sum.

    The first label of every row is IGNORE: no token precedes it, and in a pack it would be predicted from the row
    before. `image_id`: id of image tokens. A pair becomes two rows, which share their tiles and, in the layout, their
    prompt.
    """
    assert examples, "a batch of no examples"
    paired = any(example.rejected for example in examples)
    reference = [losses for example in examples for losses in example.reference or ()]
    examples = [row for example in examples for row in (example, example.rejected) if row is not None]
    lengths = [len(example) for example in examples]
    B, T = (1, sum(lengths)) if packed else (len(examples), max(lengths))
    batch = {
        "input_ids": torch.full((B, T), pad_id, dtype=torch.int64),
        "attention_mask": torch.zeros((B, T), dtype=torch.bool),
        "position_ids": torch.zeros((B, T), dtype=torch.int64),
        "labels": torch.full((B, T), IGNORE, dtype=torch.int64),
    }
    row_ids = torch.full((B, T), -1, dtype=torch.int64)
    start = 0
    for n, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        at = (0, slice(start, start + length)) if packed else (n, slice(0, length))
        batch["input_ids"][at] = example.input_ids
        batch["attention_mask"][at] = True
        batch["position_ids"][at] = torch.arange(length)
        batch["labels"][at] = example.labels
        batch["labels"][at[0], at[1].start] = IGNORE
        row_ids[at] = n
        start += length
    references = [one for example in examples for one in example.stored or []]
    cached = [features for *_, features in references if features is not None]
    return Batch(
        **batch,
        tiles=torch.cat([example.tiles for example in examples]),
        tiles_per_row=torch.tensor([sum(example.tiles_per_image) for example in examples], dtype=torch.int64),
        row_ids=row_ids if packed else None,
        lengths=torch.tensor(lengths, dtype=torch.int64),
        layout=SequenceLayout.of(torch.tensor(lengths), T, packed, _shared_prompts(examples)),
        image_positions=None if image_id is None else nonzero_indices(batch["input_ids"] == image_id),
        supervised_positions=supervised_indices(batch["labels"]),
        row_weights=_row_weights(examples),
        tile_index=_tile_index(examples),
        features=torch.cat(cached) if cached else None,
        stored=[(key, tiles, features is not None) for key, tiles, features in references],
        rows=[example.conversation for example in examples],
        supervised=[int((example.labels[1:] != IGNORE).sum()) for example in examples],
        paired=paired,
        reference=torch.tensor(reference, dtype=torch.float32) if reference else None,
    )


def _row_weights(rows: Sequence[Example]) -> Tensor | None:
    weights = [row.conversation.weight for row in rows]
    return None if all(weight == 1 for weight in weights) else torch.tensor(weights, dtype=torch.float32)


def _tile_index(rows: Sequence[Example]) -> Tensor | None:
    """Tile of each place for one, where a rejected row shares those of the row before it; None: none does."""
    if not any(row.shares_tiles and row.tiles_per_image for row in rows):
        return None
    index: list[int] = []
    total = first = 0
    for row in rows:
        count = sum(row.tiles_per_image)
        if not row.shares_tiles:
            first, total = total, total + count
        index += range(first, first + count)
    return torch.tensor(index, dtype=torch.int64)


def _shared_prompts(rows: Sequence[Example]) -> list[int]:
    """Tokens that each row has in common with the row before it, where it is the rejected answer to the same prompt.

    The last token before the answer is not shared: the answers' first tokens are predicted there, one for each row.
    """
    counts = [0] * len(rows)
    for n, row in enumerate(rows):
        if row.shares_tiles:
            pair = rows[n - 1], row
            shortest = min(map(len, pair))
            differs = (pair[0].input_ids[:shortest] != row.input_ids[:shortest]).nonzero()
            answers = [int((one.labels[1:] != IGNORE).nonzero()[0]) for one in pair if one.num_supervised]
            counts[n] = min([shortest - 1, *differs[:1, 0].tolist(), *answers])
    return counts
