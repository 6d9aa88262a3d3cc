"""DataLoaders: rows per rank, resumable position, number of workers, rows of validation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.data.worker_loader import WorkerLoader
from ivl.data.workers import cores
from ivl.types import IGNORE, Batch, Example


def data_rank(trainer: Trainer) -> tuple[int, int]:
    """Data-parallel rank and size of this process. Processes that share layers (tensor parallel) have one rank."""
    kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
    return kwargs["rank"], kwargs["num_replicas"]


class RankRows:
    """Batches of one rank, in order; every rank has equally many.

    Rank r takes rows r, r + ranks, …; a rank short of a row is padded with -1 - row. That row is computed, so that all
    ranks do the same work, and then left out.
    """

    def __init__(self, rows: int, batch_size: int, rank: int, ranks: int):
        indices = list(range(rank, rows, ranks))
        indices += [-1 - rank % rows] * (math.ceil(rows / ranks) - len(indices))
        self.batches = [indices[n : n + batch_size] for n in range(0, len(indices), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class ResumableLoader(WorkerLoader):
    """DataLoader whose position is saved with the run, and restored without reading the batches before it."""

    batch_sampler: Any
    used: Callable[[], tuple[int, int]] | None = None
    """(epoch, batches used in it), by the trainer's count, as the loader prefetches"""

    def state_dict(self) -> dict[str, Any]:
        assert self.used is not None, "set where the loader is made"
        epoch, used = self.used()
        return self.batch_sampler.state_dict(used) | {"epoch": epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch_sampler.load_state_dict(state)


@dataclass
class Pace:
    """Number of workers that keeps the consumer from waiting, by its times of waiting and of work."""

    workers: int
    most: int
    window: int = 32
    """Batches between two decisions"""
    tolerated: float = 0.05
    """Largest share of the time spent waiting"""
    _seen: int = 0
    _waited: float = 0.0
    _busy: float = 0.0

    @classmethod
    def of(cls, num_workers: int | None, processes: int) -> Pace:
        """Fixed number of workers; None: four to begin with, and at most one less than the cores of each process
        of this machine."""
        if num_workers is not None:
            return cls(num_workers, num_workers)
        most = max(0, cores() // max(1, processes) - 1)
        return cls(min(4, most), most)

    def add(self, waited: float, busy: float) -> bool:
        """Add the times of a batch, in seconds. Returns true if more workers are needed from here on."""
        self._seen += 1
        if self._seen <= 2 * self.workers:  # while they start, nothing is in store
            return False
        self._waited += waited
        self._busy += busy
        if self._seen < 2 * self.workers + self.window:
            return False
        total, share = self._waited + self._busy, self._waited / (self._waited + self._busy)
        # Workers together make a batch in the total time of one; they must make it while the consumer is busy.
        wanted = min(self.most, math.ceil(self.workers * total / max(self._busy, total / self.most)))
        grows = share > self.tolerated and wanted > self.workers
        if grows:
            rank_zero_info(
                f"loader: {share:.0%} of the time went by waiting for rows; workers {self.workers} → {wanted} "
                f"(at most {self.most}; data.num_workers sets their number)"
            )
            self.workers = wanted
        self._seen, self._waited, self._busy = 0 if grows else 2 * self.workers, 0.0, 0.0
        return grows


class _StoppableSampler:
    """Batch sampler of an epoch that can be stopped, and continued by another set of workers."""

    def __init__(self) -> None:
        self.stopped = self.exhausted = False

    def begin(self, keys: Iterator[Any]) -> None:
        self.keys, self.stopped, self.exhausted = keys, False, False

    def __iter__(self) -> Iterator[Any]:
        while not self.stopped:
            if (key := next(self.keys, None)) is None:
                self.exhausted = True
                return
            yield key


class PacedLoader(ResumableLoader):
    """DataLoader that adds workers between two batches where its pace asks for them. Batches stay the same."""

    def __init__(self, dataset: Dataset, pace: Pace, **options: Any) -> None:
        super().__init__(dataset, num_workers=pace.workers, **options)
        self._pace, self._sampler = pace, _StoppableSampler()
        self._loader: DataLoader | None = None
        self._options = options | {"batch_sampler": self._sampler}

    def __iter__(self) -> Any:
        pace, sampler = self._pace, self._sampler
        sampler.begin(iter(self.batch_sampler))
        while not sampler.exhausted:
            if self._loader is None or self._loader.num_workers != pace.workers:
                self._loader = WorkerLoader(self.dataset, num_workers=pace.workers, **self._options)
                sampler.stopped = False
            requested = time.perf_counter()
            for batch in self._loader:
                arrived = time.perf_counter()
                yield batch
                used = time.perf_counter()
                sampler.stopped = sampler.stopped or pace.add(arrived - requested, used - arrived)
                requested = used


def make_loader(dataset: Dataset, batches: Any, collate: Callable, pace: Pace, paced: bool = False) -> ResumableLoader:
    """Make a loader of batches of keys. `paced`: it takes more workers where rows are waited for."""
    options: dict[str, Any] = {
        "batch_sampler": batches,
        "collate_fn": collate,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": pace.workers > 0,
        "generator": torch.Generator(),  # what a loader draws for its workers is not taken from the run's numbers
    }
    if paced and pace.workers < pace.most:
        return PacedLoader(dataset, pace, **options)
    return ResumableLoader(dataset, num_workers=pace.workers, **options)


class ValidationRows(Dataset):
    """Held-out rows: index, prompt to answer, and example with the answer for its loss."""

    def __init__(self, rows: RowDataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Example, Example]:
        row = index if index >= 0 else -1 - index
        conversation, process = self.rows.conversation(row), self.rows.processor
        example = process(conversation)
        example.reference = self.rows.reference(row)
        return index, process(conversation.as_prompt()), example


def validation_batch(processor: Processor, items: list) -> tuple[list[int], Batch, Batch]:
    """Collate rows to be scored: indices, batch with answers, batch of prompts."""
    indices, prompts, examples = zip(*items)
    batch = processor.collate(examples)
    per_index = 2 if batch.paired else 1
    for n, index in enumerate(indices):
        if index < 0:  # padding: not counted in the loss
            batch.labels[per_index * n : per_index * (n + 1)] = IGNORE
    return list(indices), batch, processor.collate(prompts)
