"""Planning of an epoch's batches in sections, and the position among them: the base of the batch samplers.

The rows of an epoch, in their shuffled order, are planned in sections of at most `SECTION` rows. While the batches of
one are used, another process plans the next, and a run that resumes plans the section it is in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ivl.data.mapped_array import spooled
from ivl.data.packing.packing import divide
from ivl.data.sets.dataset import permutation
from ivl.data.worker_loader import WorkerLoader, unchanged
from ivl.types import UserError

Order = Callable[[int], np.ndarray]
"""Epoch → the numbers of its rows, shuffled; `Mixture.order` is one"""

SECTION = 1 << 18
"""Rows that are planned at a time, at most"""
_BLOCK, _COSTS_BLOCK = 16, 64
"""Steps among which batches are exchanged so that those of one step cost about the same"""


_B = TypeVar("_B", bound="PlannedBatches")


@dataclass(frozen=True)
class RowCosts:
    """Time of a row in training, by its tiles, tokens, square of its tokens, and supervised tokens."""

    tile: float = 0.0
    token: float = 1.0
    pair: float = 0.0
    supervised: float = 0.0

    def of(self, tokens: np.ndarray, tiles: np.ndarray, supervised: np.ndarray) -> np.ndarray:
        """(rows,) float64."""
        squares = tokens.astype(np.float64) ** 2
        return self.tile * tiles + self.token * tokens + self.pair * squares + self.supervised * supervised


class PlannedBatches(Sampler[list[tuple[int, int]]]):
    """Base of the batch samplers of one rank. A batch is a list of keys (epoch, row) of a `RowDataset` or `Mixture`."""

    def __init__(
        self,
        tokens: np.ndarray,
        tiles: np.ndarray,
        order: Order | None,
        rank: int,
        ranks: int,
        seed: int,
        epochs: int = 1,
        section: int = SECTION,
        costs: RowCosts | None = None,
        supervised: np.ndarray | None = None,
        background: bool = True,
        cache: Path | None = None,
    ):
        if len(tokens) == 0:
            raise UserError("batches: no rows; expected at least one")
        if not 0 <= rank < ranks:
            raise UserError(f"batches: rank {rank} of {ranks}; expected 0 to {ranks - 1}")
        self.tokens, self.tiles = np.asarray(tokens), np.asarray(tiles)
        self.supervised = np.zeros_like(self.tokens) if supervised is None else supervised
        self.costs = costs
        self.rank, self.ranks, self.seed = rank, ranks, seed
        self.epochs = epochs
        self.section, self.background, self.cache = section, background, cache
        self.epoch = 0
        self.done = 0
        """Number of batches of this epoch already used; the next pass begins there"""
        self.sampler = self
        """Attribute whose `set_epoch` Lightning calls"""
        self._order = order
        self._ordered: tuple[int, np.ndarray] | None = None
        self._cached: tuple[int, list[list[int]]] | None = None

    def fresh(self: _B, epochs: int | None = None) -> _B:
        """The same batches from the beginning of epoch 0; what was counted is not counted again.

        `epochs`: number of epochs, where it differs.
        """
        other = object.__new__(type(self))
        other.__dict__ = self.__dict__ | {"epoch": 0, "done": 0, "sampler": other}
        if epochs is not None and epochs != self.epochs:
            other.epochs = epochs
            other.__dict__.pop("count", None)
        return other

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose batches the next pass yields."""
        self.epoch = epoch

    def batches(self, epoch: int) -> list[list[int]]:
        """Batches of an epoch for all ranks, as rows; rank r has those at r, r + ranks, …"""
        return [rows for section in range(self.sections) for rows in self.plan(epoch, section)]

    def plan(self, epoch: int, section: int) -> list[list[int]]:
        """Batches of a section of an epoch for all ranks, as rows."""
        if self._cached is not None and self._cached[0] == epoch:
            return self._cached[1]
        bounds = self._bounds(epoch)
        order = self._rows(epoch)[bounds[section] : bounds[section + 1]]
        tokens, tiles = self.tokens[order].astype(np.int64), self.tiles[order].astype(np.int64)
        count = int(self._counts(epoch)[section])
        groups = self._groups(tokens, tiles, count)
        divide(groups, count)
        costs = self._group_costs(groups, tokens, tiles, self.supervised[order])
        plan = [order[groups[n]].tolist() for n in self._dealt(costs, epoch, section)]
        if self.sections == 1:
            self._cached = epoch, plan
        return plan

    @cached_property
    def sections(self) -> int:
        """Number of sections of an epoch."""
        return -(-self._num_rows // self.section)

    @cached_property
    def count(self) -> int:
        """Number of batches of all ranks in an epoch: that of the epoch that needs most, rounded up to a multiple of
        the ranks.
        """
        if self.sections > 1:
            return self._count_sections()
        orders = (self._rows(epoch) for epoch in range(self.epochs))
        most = max(len(self._groups(self.tokens[order], self.tiles[order], None)) for order in orders)
        return self._multiple(most)

    def _multiple(self, most: int) -> int:
        count = most + -most % self.ranks
        if count > (rows := self._num_rows):  # raised before training begins, not at its first batch
            raise UserError(
                f"batches: {rows} rows cannot be spread over {count} batches; give more rows or fewer processes"
            )
        return count

    def __len__(self) -> int:
        """Number of batches of this rank in an epoch."""
        return self.count // self.ranks

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start = self.epoch, self.done
        self.done = 0
        ends = np.cumsum(self._counts(epoch) // self.ranks)
        first = int(np.searchsorted(ends, start, side="right"))
        used = start - int(ends[first - 1]) if first else start
        for plan in self._plans(epoch, first):
            for rows in plan[self.rank + used * self.ranks :: self.ranks]:
                yield [(epoch, int(row)) for row in rows]
            used = 0

    def _plans(self, epoch: int, first: int) -> Iterator[list[Any]]:
        """Plans of the sections from `first` on; each is made by another process while the one before is used."""
        later = range(first + 1, self.sections)
        if not self.background or not later:
            for section in range(first, self.sections):
                yield self.plan(epoch, section)
            return
        options: dict[str, Any] = {"batch_size": None, "collate_fn": unchanged, "generator": torch.Generator()}
        loader = WorkerLoader(_Sections(self, epoch), sampler=later, num_workers=1, prefetch_factor=1, **options)
        plans = iter(loader)  # its process begins with the next section while this one plans the first
        yield self.plan(epoch, first)
        for rows, ends in plans:
            yield np.split(rows, ends[:-1])

    def state_dict(self, used: int) -> dict[str, Any]:
        """Position after `used` batches of this epoch; a loader's workers have fetched more than were used."""
        return {"epoch": self.epoch, "done": used, "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position. Raises UserError where, inside an epoch, rows, limits, seed or ranks have changed."""
        if "costs" not in state["settings"]:  # of a run that did not know them: its steps go on as they were dealt
            self.costs = None
            self._cached = None
        settings = self._settings()
        changed = {k: (v, state["settings"].get(k)) for k, v in settings.items() if v != state["settings"].get(k)}
        if changed and state["done"]:
            changes = ", ".join(f"{name} was {was!r} and is now {now!r}" for name, (now, was) in changed.items())
            raise UserError(
                f"batches: cannot go on in the middle of an epoch: {changes}; restore it or begin a new run"
            )
        self.epoch, self.done = state["epoch"], state["done"]

    def _rows(self, epoch: int) -> np.ndarray:
        """Numbers of an epoch's rows; those of a long one are kept, and shared by the processes of a machine."""
        if self._ordered is not None and self._ordered[0] == epoch:
            return self._ordered[1]
        if self._order is None:
            rows = permutation(len(self.tokens), self.seed, "order", epoch)
        else:
            rows = np.asarray(self._order(epoch), np.int64)
        if len(rows) > self.section:
            rows = rows.astype(np.uint32) if len(self.tokens) < 1 << 32 else rows
            rows = rows if self.cache is None else spooled(rows, self.cache)
            self._ordered = epoch, rows
        return rows

    @cached_property
    def _num_rows(self) -> int:
        return len(self._rows(0))

    def _bounds(self, epoch: int) -> np.ndarray:
        """(sections + 1,) first row of each section in the order of an epoch, and the end."""
        return np.array([0, self._num_rows])

    def _counts(self, epoch: int) -> np.ndarray:
        """(sections,) batches of all ranks in each section of an epoch."""
        return np.array([self.count])

    def _count_sections(self) -> int:
        raise NotImplementedError

    @cached_property
    def _lengths_digest(self) -> str:
        return _digest(self.tokens, self.tiles)

    @cached_property
    def _supervised_digest(self) -> str:
        return _digest(self.supervised)

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"lengths": self._lengths_digest, "ranks": self.ranks, "seed": self.seed}
        if self.costs is not None:
            settings |= {"costs": list(astuple(self.costs)), "supervised": self._supervised_digest}
        return settings | ({"section": self.section} if self.sections > 1 else {})

    def _dealt(self, costs: np.ndarray, epoch: int, section: int) -> np.ndarray:
        """Order of the batches in which those of one step, one a rank, cost about the same."""
        key = (epoch, section) if self.sections > 1 else (epoch,)
        order = permutation(len(costs), self.seed, "batches", *key)
        if self.ranks == 1:
            return order
        draw = np.random.default_rng([self.seed, *key])
        size = (_BLOCK if self.costs is None else _COSTS_BLOCK) * self.ranks
        for start in range(0, len(order), size):
            block = order[start : start + size]
            steps = block[np.argsort(costs[block], kind="stable")].reshape(-1, self.ranks)
            draw.shuffle(steps)
            order[start : start + len(block)] = draw.permuted(steps, axis=1).ravel()
        return order

    def _groups(self, tokens: np.ndarray, tiles: np.ndarray, count: int | None) -> list[list[int]]:
        """Batches of rows, as their places. `count`: their largest number; None: as many as it takes."""
        raise NotImplementedError

    def _group_costs(
        self, groups: list[list[int]], tokens: np.ndarray, tiles: np.ndarray, supervised: np.ndarray
    ) -> np.ndarray:
        """(groups,) cost of each batch."""
        raise NotImplementedError


class _Sections(Dataset):
    """Data set of the sections of an epoch: number → rows of all batches, and the end of each."""

    def __init__(self, batches: PlannedBatches, epoch: int) -> None:
        part = object.__new__(type(batches))
        batches._counts(epoch), batches._bounds(epoch)  # kept in the copy
        part.__dict__ = batches.__dict__ | {"_order": None, "_ordered": (epoch, batches._rows(epoch))}
        part.sampler = part
        self.batches, self.epoch = part, epoch

    def __getitem__(self, section: int) -> tuple[np.ndarray, np.ndarray]:
        plan = self.batches.plan(self.epoch, section)
        return np.concatenate([np.array(rows, np.int64) for rows in plan]), np.cumsum([len(rows) for rows in plan])


def _digest(*columns: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for column in columns:
        for start in range(0, len(column), 1 << 20):
            digest.update(column[start : start + (1 << 20)].astype(np.int64).tobytes())
    return digest.hexdigest()
