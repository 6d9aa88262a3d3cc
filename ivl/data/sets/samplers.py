"""Batch samplers: packs filled to the last token, or padded batches of rows of like length.

Batches are decided from lengths alone, before any Example is made. They are the same for the same seed and epoch on
every rank and with any number of workers. Their number is the same for each rank and epoch. Each row comes once.

Packing: the epoch's rows, in their shuffled order, are cut into windows of equal size. The rows of a window are taken
longest first, those with tiles before those without. Each goes into the open pack that it fills best, or opens a new
one. At the end of a window its packs are closed as they are. Where the number of packs is no multiple of the ranks, or
below that of the epoch that needs most, the packs with most rows are split in two until it is. Then packs are shuffled
over the epoch.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ivl.data.sets.dataset import permutation
from ivl.types import UserError

Order = Callable[[int], np.ndarray]
"""Epoch → the numbers of its rows, shuffled; `Mixture.order` is one"""

_BLOCK = 16


def fill_packs(
    tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int | None = None, window: int = 8192
) -> list[list[int]]:
    """Fill packs of rows, each within both limits, by the rule at the top of this file.

    `tokens`, `tiles`: (rows,) in the order of the epoch. A pack lists positions in that order, ascending.
    Raises UserError where a row is above a limit by itself.
    """
    limit = int(tiles.sum()) if max_tiles is None else max_tiles
    for name, lengths, most in (("tokens", tokens, max_tokens), ("tiles", tiles, limit)):
        if len(lengths) and lengths.max() > most:
            raise UserError(
                f"packing: a row of {lengths.max()} {name} is above the {most} of a pack; "
                f"allow larger packs or shorter rows"
            )
    packs: list[list[int]] = []
    for places in np.array_split(np.arange(len(tokens)), max(1, -(-len(tokens) // window))):
        packs += _fill(places.tolist(), tokens[places], tiles[places], max_tokens, limit)
    for pack in packs:
        pack.sort()
    return packs


def _fill(places: list[int], tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int) -> list[list[int]]:
    """Best fit, longest first; packs hold `places`. Rows with tiles come first, those without fill the room left."""
    scale = max(max_tiles, 1)
    sizes, areas = tokens * scale, tiles * max_tokens  # in these units a pack has the same capacity for both
    capacity = max_tokens * scale
    costs = np.maximum(sizes, areas)
    packs: list[list[int]] = []
    left: list[tuple[int, int]] = []
    for with_tiles in (True, False):
        room = sorted((min(left[n]) if with_tiles else left[n][0], n) for n in range(len(packs)))
        order = np.flatnonzero((tiles > 0) == with_tiles)
        order = order[np.argsort(-costs[order], kind="stable")]
        for at, cost, size, area in zip(*(x.tolist() for x in (order, costs[order], sizes[order], areas[order]))):
            place = bisect_left(room, (cost, -1))
            if place < len(room):
                _, pack = room.pop(place)
            else:
                pack = len(packs)
                packs.append([])
                left.append((capacity, capacity))
            packs[pack].append(places[at])
            tokens_left, tiles_left = left[pack][0] - size, left[pack][1] - area
            left[pack] = tokens_left, tiles_left
            insort(room, (min(tokens_left, tiles_left) if with_tiles else tokens_left, pack))
    return packs


class _Batches(Sampler[list[tuple[int, int]]]):
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
    ):
        if len(tokens) == 0:
            raise UserError("batches: no rows; expected at least one")
        if not 0 <= rank < ranks:
            raise UserError(f"batches: rank {rank} of {ranks}; expected 0 to {ranks - 1}")
        self.tokens, self.tiles = np.asarray(tokens, np.int64), np.asarray(tiles, np.int64)
        self.rank, self.ranks, self.seed = rank, ranks, seed
        self.epochs = epochs
        self.epoch = 0
        self.done = 0
        """Number of batches of this epoch already used; the next pass begins there"""
        self.sampler = self
        """Attribute whose `set_epoch` Lightning calls"""
        self._order = order
        self._cached: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose batches the next pass yields."""
        self.epoch = epoch

    def batches(self, epoch: int) -> list[list[int]]:
        """Batches of an epoch for all ranks, as rows; rank r has those at r, r + ranks, …"""
        if self._cached is None or self._cached[0] != epoch:
            order = self._rows(epoch)
            groups = self._groups(self.tokens[order], self.tiles[order])
            _divide(groups, self.count)
            costs = np.array([self._cost(order[group]) for group in groups])
            self._cached = epoch, [order[groups[n]].tolist() for n in self._dealt(costs, epoch)]
        return self._cached[1]

    @cached_property
    def count(self) -> int:
        """Number of batches of all ranks in an epoch: that of the epoch that needs most, rounded up to a multiple of
        the ranks.
        """
        orders = (self._rows(epoch) for epoch in range(self.epochs))
        most = max(len(self._groups(self.tokens[order], self.tiles[order])) for order in orders)
        count = most + -most % self.ranks
        if count > (rows := len(self._rows(0))):  # raised before training begins, not at its first batch
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
        for rows in self.batches(epoch)[self.rank + start * self.ranks :: self.ranks]:
            yield [(epoch, row) for row in rows]

    def state_dict(self, used: int) -> dict[str, Any]:
        """Position after `used` batches of this epoch; a loader's workers have fetched more than were used."""
        return {"epoch": self.epoch, "done": used, "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position. Raises UserError where, inside an epoch, rows, limits, seed or ranks have changed."""
        changed = {
            k: (v, state["settings"].get(k)) for k, v in self._settings().items() if v != state["settings"].get(k)
        }
        if changed and state["done"]:
            changes = ", ".join(f"{name} was {was!r} and is now {now!r}" for name, (now, was) in changed.items())
            raise UserError(
                f"batches: cannot go on in the middle of an epoch: {changes}; restore it or begin a new run"
            )
        self.epoch, self.done = state["epoch"], state["done"]

    def _rows(self, epoch: int) -> np.ndarray:
        if self._order is None:
            return permutation(len(self.tokens), self.seed, "order", epoch)
        return np.asarray(self._order(epoch), np.int64)

    def _settings(self) -> dict[str, Any]:
        lengths = hashlib.blake2b(self.tokens.tobytes() + self.tiles.tobytes(), digest_size=8).hexdigest()
        return {"lengths": lengths, "ranks": self.ranks, "seed": self.seed}

    def _dealt(self, costs: np.ndarray, epoch: int) -> np.ndarray:
        """Order of the batches in which those of one step, one a rank, cost about the same."""
        order = permutation(len(costs), self.seed, "batches", epoch)
        if self.ranks == 1:
            return order
        draw = np.random.default_rng([self.seed, epoch])
        for start in range(0, len(order), _BLOCK * self.ranks):
            block = order[start : start + _BLOCK * self.ranks]
            steps = block[np.argsort(costs[block], kind="stable")].reshape(-1, self.ranks)
            draw.shuffle(steps)
            order[start : start + len(block)] = draw.permuted(steps, axis=1).ravel()
        return order

    def _groups(self, tokens: np.ndarray, tiles: np.ndarray) -> list[list[int]]:
        raise NotImplementedError

    def _cost(self, rows: np.ndarray) -> int:
        raise NotImplementedError


class PackedBatches(_Batches):
    """Batch sampler of packs of at most `max_tokens` and `max_tiles`; rows are not cut, one pack a batch."""

    def __init__(
        self,
        tokens: np.ndarray,
        tiles: np.ndarray,
        max_tokens: int,
        max_tiles: int | None = None,
        order: Order | None = None,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        window: int = 8192,
        epochs: int = 1,
    ) -> None:
        """
        Args:
            tokens: (rows,) tokens of each row, `Index.tokens`.
            tiles: (rows,) tiles of each row, `Index.tiles`.
            order: epoch → rows; None: each row once, shuffled.
            window: rows that are packed together, at most.
            epochs: number of epochs; all get as many packs as the one that needs most.
        """
        super().__init__(tokens, tiles, order, rank, ranks, seed, epochs)
        self.max_tokens, self.max_tiles, self.window = max_tokens, max_tiles, window

    def efficiency(self, epoch: int = 0) -> float:
        """Share of the tokens of an epoch's packs, each `max_tokens` long, that belong to rows."""
        packs = self.batches(epoch)
        return float(sum(self.tokens[pack].sum() for pack in packs) / (len(packs) * self.max_tokens))

    def _settings(self) -> dict[str, Any]:
        sizes = {"max_tokens": self.max_tokens, "max_tiles": self.max_tiles, "window": self.window, "packs": self.count}
        return super()._settings() | sizes

    def _groups(self, tokens: np.ndarray, tiles: np.ndarray) -> list[list[int]]:
        return fill_packs(tokens, tiles, self.max_tokens, self.max_tiles, self.window)

    def _cost(self, rows: np.ndarray) -> int:
        return int(self.tiles[rows].sum())


class GroupedBatches(_Batches):
    """Batch sampler of `batch_size` rows of like length, to be padded to the longest."""

    def __init__(
        self,
        tokens: np.ndarray,
        tiles: np.ndarray,
        batch_size: int,
        order: Order | None = None,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        window: int = 64,
    ) -> None:
        """`window`: batches whose rows are sorted by length together; 1: no grouping.

        Without grouping the batches of a step are the next rows of the order, however many ranks or micro-batches
        share the step.
        """
        super().__init__(tokens, tiles, order, rank, ranks, seed)
        self.batch_size, self.window = batch_size, window

    def efficiency(self, epoch: int = 0) -> float:
        """Share of the tokens of an epoch's padded batches that belong to rows."""
        batches = self.batches(epoch)
        padded = sum(len(batch) * int(self.tokens[batch].max()) for batch in batches)
        return float(sum(self.tokens[batch].sum() for batch in batches) / padded)

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"batch_size": self.batch_size, "window": self.window}

    def _dealt(self, costs: np.ndarray, epoch: int) -> np.ndarray:
        return np.arange(len(costs)) if self.window == 1 else super()._dealt(costs, epoch)

    def _groups(self, tokens: np.ndarray, tiles: np.ndarray) -> list[list[int]]:
        groups, size = [], self.batch_size * self.window
        for start in range(0, len(tokens), size):
            block = start + np.argsort(-tokens[start : start + size], kind="stable")
            groups += [block[n : n + self.batch_size].tolist() for n in range(0, len(block), self.batch_size)]
        return groups

    def _cost(self, rows: np.ndarray) -> int:
        return int(self.tokens[rows].max())


def _divide(groups: list[list[int]], count: int) -> None:
    """Split groups with most rows, in place, until there are `count`."""
    missing = count - len(groups)
    while missing > 0:
        largest = sorted(range(len(groups)), key=lambda n: -len(groups[n]))[:missing]
        for n in largest:
            if len(groups[n]) > 1:
                half = len(groups[n]) // 2
                groups[n], rest = groups[n][:half], groups[n][half:]
                groups.append(rest)
                missing -= 1
