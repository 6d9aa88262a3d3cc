"""What the data module's loaders are made of: batches of rows for one rank, held-out rows, a position that is saved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.data.sets.index import cores
from ivl.data.worker_loader import WorkerLoader
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


class ResumableLoader(WorkerLoader):
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


@dataclass
class Pace:
    """How many workers keep a consumer from waiting, from the time that it waits and the time that it is busy."""

    workers: int
    most: int
    window: int = 32
    """Batches between two decisions"""
    tolerated: float = 0.05
    """Share of the time that may be spent waiting"""
    _seen: int = 0
    _waited: float = 0.0
    _busy: float = 0.0

    @classmethod
    def of(cls, asked: int | None, processes: int) -> Pace:
        """The workers asked for; None: four to begin with, and at most one less than the cores that each of the
        processes of this machine has."""
        if asked is not None:
            return cls(asked, asked)
        most = max(0, cores() // max(1, processes) - 1)
        return cls(min(4, most), most)

    def add(self, waited: float, busy: float) -> bool:
        """A batch, in seconds. Returns whether more workers are wanted from here on."""
        self._seen += 1
        if self._seen <= 2 * self.workers:  # while they start, nothing is in store
            return False
        self._waited += waited
        self._busy += busy
        if self._seen < 2 * self.workers + self.window:
            return False
        whole, share = self._waited + self._busy, self._waited / (self._waited + self._busy)
        # Workers together make a batch in the whole time of one; they must make it while the consumer is busy.
        wanted = min(self.most, math.ceil(self.workers * whole / max(self._busy, whole / self.most)))
        more = share > self.tolerated and wanted > self.workers
        if more:
            rank_zero_info(
                f"loader: {share:.0%} of the time went by waiting for rows; workers {self.workers} → {wanted} "
                f"(at most {self.most}; data.num_workers sets their number)"
            )
            self.workers = wanted
        self._seen, self._waited, self._busy = 0 if more else 2 * self.workers, 0.0, 0.0
        return more


class _Turn:
    """The batches of an epoch for one set of workers after another: until stopped, and then from there."""

    def __init__(self) -> None:
        self.stopped = self.over = False

    def begin(self, keys: Iterator[Any]) -> None:
        self.keys, self.stopped, self.over = keys, False, False

    def __iter__(self) -> Iterator[Any]:
        while not self.stopped:
            if (key := next(self.keys, None)) is None:
                self.over = True
                return
            yield key


class PacedLoader(ResumableLoader):
    """Takes more workers, between two batches, where its pace asks for them. What batches hold does not change."""

    def __init__(self, dataset: Dataset, pace: Pace, **given: Any) -> None:
        super().__init__(dataset, num_workers=pace.workers, **given)
        self._pace, self._turn = pace, _Turn()
        self._loader: DataLoader | None = None
        self._given = given | {"batch_sampler": self._turn}

    def __iter__(self) -> Any:
        pace, turn = self._pace, self._turn
        turn.begin(iter(self.batch_sampler))
        while not turn.over:
            if self._loader is None or self._loader.num_workers != pace.workers:
                self._loader, turn.stopped = WorkerLoader(self.dataset, num_workers=pace.workers, **self._given), False
            asked = time.perf_counter()
            for batch in self._loader:
                came = time.perf_counter()
                yield batch
                left = time.perf_counter()
                turn.stopped = turn.stopped or pace.add(came - asked, left - came)
                asked = left


class Asked(Dataset):
    """Held-out rows with their index, as a prompt and with the answer, whose loss is wanted."""

    def __init__(self, rows: RowDataset):
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
