"""Examples → batches. Masks come from lengths."""

import pytest
import torch

from ivl.data.collate import collate
from ivl.types import IGNORE, Conversation, Example, Message

PAD = 7


def example(length: int, tiles: int, trained_from: int) -> Example:
    ids = torch.full((length,), PAD)  # every token is the pad token: nothing may be read from ids
    labels = ids.clone()
    labels[:trained_from] = IGNORE
    pixels = torch.full((tiles, 3, 2, 2), length, dtype=torch.uint8)
    row = Conversation((Message("user", (str(length),)),))
    return Example(ids, labels, pixels, [1] * tiles, row)


ROWS = [example(5, 2, 2), example(3, 0, 0), example(4, 1, 1)]


def test_padded():
    batch = collate(ROWS, pad_id=PAD)
    assert batch.input_ids.shape == batch.labels.shape == (3, 5)
    assert batch.attention_mask.sum(1).tolist() == [5, 3, 4]
    assert batch.attention_mask[1].tolist() == [True] * 3 + [False] * 2
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4]
    assert batch.labels[1].tolist() == [IGNORE, PAD, PAD, IGNORE, IGNORE]
    assert batch.tiles_per_row.tolist() == [2, 0, 1]
    assert batch.tiles[:, 0, 0, 0].tolist() == [5, 5, 4]
    assert batch.row_ids is None
    assert [row.messages[0].text for row in batch.rows] == ["5", "3", "4"]


def test_packed():
    batch = collate(ROWS, pad_id=0, packed=True)
    assert batch.input_ids.shape == (1, 12)
    assert batch.input_ids[0].tolist() == [PAD] * 12
    assert batch.attention_mask[0].tolist() == [True] * 12
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]
    assert batch.row_ids[0].tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert batch.labels[0].tolist() == [IGNORE] * 2 + [PAD] * 3 + [IGNORE, PAD, PAD] + [IGNORE] + [PAD] * 3
    assert len(batch) == 3


@pytest.mark.parametrize("packed", [False, True])
def test_the_same_tokens_are_trained_on(packed):
    batch = collate(ROWS, pad_id=0, packed=packed)
    assert batch.num_supervised == sum(row.num_supervised for row in ROWS) == 3 + 2 + 3
    assert (batch.lengths.tolist(), batch.supervised) == ([5, 3, 4], [3, 2, 3])
    moved = batch.to("cpu")
    assert (moved.lengths.tolist(), moved.supervised, moved.num_tokens) == ([5, 3, 4], [3, 2, 3], 12)
    assert batch.num_tokens == int(batch.attention_mask.sum())
