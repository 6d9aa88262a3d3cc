"""A lack of memory says with what, and what to lower."""

import pytest
import torch

from ivl.lit.training.out_of_memory import out_of_memory
from ivl.types import Batch, UserError
from tests.lit.callbacks.test_nonfinite import rows


def test_out_of_memory_says_with_what_and_what_to_lower():
    ids = torch.zeros(2, 5, dtype=torch.long)
    batch = Batch(
        ids,
        ids.bool(),
        ids,
        ids,
        torch.zeros(3, 3, 2, 2),
        torch.tensor([1, 2]),
        rows=rows("a", "b"),
        lengths=torch.tensor([5, 4]),
    )
    batch.rows = rows("a", "b")
    with pytest.raises(UserError) as caught, out_of_memory(batch, "lower data.batch_size (2)", "backward"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")
    assert str(caught.value) == (
        "out of memory in backward, with 2 rows of 9 tokens (the longest 5) and 3 tiles: train.jsonl:1 (a), "
        "train.jsonl:2 (b); lower data.batch_size (2) (CUDA out of memory. Tried to allocate 20 GiB.)"
    )
    with pytest.raises(RuntimeError, match="something else"), out_of_memory(batch, "", ""):
        raise RuntimeError("something else")
