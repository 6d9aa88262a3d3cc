"""What the data module's loaders are made of: batches of rows for one rank, held-out rows, a position that is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ivl.data.dataset import Rows
from ivl.data.processor import Processor
from ivl.types import IGNORE, Batch, Example


class RankRows:
    """Batches of rows in their order for one rank: as many on every rank.

    Rank r takes rows r, r + ranks, …; a rank short of a row is filled up with -1 - row, a row that is computed, so
    that all ranks do the same work, and then left out.
    """

    def __init__(self, rows: int, batch_size: int, rank: int, ranks: int):
        mine = list(range(rank, rows, ranks))
        mine += [-1 - rank % rows] * (math.ceil(rows / ranks) - len(mine))
        self.batches = [mine[n : n + batch_size] for n in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class ResumableLoader(DataLoader):
    """A DataLoader whose position is saved with the run and found again without reading what was used."""

    batch_sampler: Any
    used: Callable[[], tuple[int, int]] | None = None
    """(epoch, batches used in it), by the trainer's count: the loader's own runs ahead of it"""

    def state_dict(self) -> dict[str, Any]:
        assert self.used is not None, "set where the loader is made"
        epoch, used = self.used()
        return self.batch_sampler.state_dict(used) | {"epoch": epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch_sampler.load_state_dict(state)


class Asked(Dataset):
    """Held-out rows with their index, as a prompt and with the answer, whose loss is wanted."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Example, Example]:
        conversation = self.rows.conversation(index if index >= 0 else -1 - index)
        process = self.rows.processor
        return index, process(conversation.as_prompt()), process(conversation)


def validation_batch(processor: Processor, items: list) -> tuple[list[int], Batch, Batch]:
    """Rows to be scored: their numbers, with their answers, and as prompts."""
    indices, prompts, examples = zip(*items)
    batch = processor.collate(examples)
    for row, index in enumerate(indices):
        if index < 0:  # filled up: not counted in the loss
            batch.labels[row] = IGNORE
    return list(indices), batch, processor.collate(prompts)
