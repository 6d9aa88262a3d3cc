"""Batch samplers: packs filled to the last token, or padded batches of rows of like length.

Batches are decided from lengths alone, before any Example is made. They are the same for the same seed and epoch on
every rank and with any number of workers. Their number is the same for each rank and epoch. Each row comes once.

An epoch is planned in sections (`ivl.data.packing.sections`). Packs of a section are those of `packing`.
Where their number is no multiple of the ranks, or below the number that the section must have, the packs with most rows
are split in two until it is. Then packs are shuffled within the section, so that those of one step, one a rank, take
about the same time.

An epoch of one section has as many packs as the epoch that needs most. The packs of longer ones are estimated from
pieces spread over the epoch, with a margin, since counting them takes as long as planning all. Rows for which a section
finds no room would be told by a warning.
"""

from __future__ import annotations

import math
import warnings
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from ivl.data.packing.packing import fill_packs
from ivl.data.packing.sections import Order, PlannedBatches, RowCosts

_PIECE, _PIECES = 1 << 15, 16
"""Rows and number of the pieces of an epoch from which its packs are estimated"""
_RISK = 0.01
"""Chance that any section of an epoch needs more packs than the estimate and its margin"""


class PackedBatches(PlannedBatches):
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
        same_rows: bool = False,
        **options: Any,
    ) -> None:
        """
        Args:
            tokens: (rows,) tokens of each row, `Index.tokens`.
            tiles: (rows,) tiles of each row, `Index.tiles`.
            order: epoch → rows; None: each row once, shuffled.
            window: rows that are packed together, at most.
            epochs: number of epochs; all get as many packs as the one that needs most.
            same_rows: True where all epochs have the same rows, so that long ones need not be looked at one by one.
            options: `section`, rows that are planned at a time; `costs` and `supervised` (rows,), by which steps are
                balanced (None: by tiles); `background`, whether another process plans; `cache`, folder of long orders.
        """
        super().__init__(tokens, tiles, order, rank, ranks, seed, epochs, **options)
        self.max_tokens, self.max_tiles, self.window = max_tokens, max_tiles, window
        self.same_rows = same_rows or order is None

    def efficiency(self, epoch: int = 0) -> float:
        """Share of the tokens of an epoch's packs, each `max_tokens` long, that belong to rows."""
        packs = self.batches(epoch)
        return float(sum(self.tokens[pack].sum() for pack in packs) / (len(packs) * self.max_tokens))

    def _settings(self) -> dict[str, Any]:
        sizes = {"max_tokens": self.max_tokens, "max_tiles": self.max_tiles, "window": self.window, "packs": self.count}
        return super()._settings() | sizes

    def _groups(self, tokens: np.ndarray, tiles: np.ndarray, count: int | None) -> list[list[int]]:
        limits = self.max_tokens, self.max_tiles
        if self.sections == 1 or count is None:
            return fill_packs(tokens, tiles, *limits, self.window, carry=self.sections > 1)
        packs = fill_packs(tokens, tiles, *limits, self.window, carry=True)
        if len(packs) > count:
            packs = fill_packs(tokens, tiles, *limits, len(tokens))  # slower, and fuller
        if len(packs) > count:
            packs.sort(key=lambda pack: -int(tokens[pack].sum()))
            rows = sum(len(pack) for pack in packs[count:])
            warnings.warn(f"packs: {rows} of {len(tokens)} rows of a section found no room in its packs", stacklevel=2)
            packs = packs[:count]
        return packs

    def _volumes(self, rows: np.ndarray) -> np.ndarray:
        """(rows,) share of a pack that each row takes, by tokens or, where tiles are scarcer, by tiles."""
        return self._lengths[rows] / self._limit

    @cached_property
    def _by_tiles(self) -> bool:
        totals = self.tokens.sum(dtype=np.int64) / self.max_tokens, self.tiles.sum(dtype=np.int64)
        return bool(self.max_tiles) and totals[1] / (self.max_tiles or 1) > totals[0]

    @property
    def _lengths(self) -> np.ndarray:
        return self.tiles if self._by_tiles else self.tokens

    @property
    def _limit(self) -> int:
        return (self.max_tiles or 0) if self._by_tiles else self.max_tokens

    @cached_property
    def _ratio(self) -> tuple[float, float]:
        """Packs for a volume of 1, and the margin of a section, from pieces spread over the first epoch."""
        order = self._rows(0)
        starts = np.linspace(0, len(order) - _PIECE, _PIECES).astype(int) if len(order) > _PIECE else np.array([0])
        pieces = [order[start : start + _PIECE] for start in starts]
        packs = np.array([len(self._groups(self.tokens[piece], self.tiles[piece], None)) for piece in pieces])
        volumes = np.array([self._volumes(piece).sum() for piece in pieces])
        ratio = packs.sum() / volumes.sum()
        deviation = np.std(packs - ratio * volumes)
        times = (self._num_rows / self.sections) / len(pieces[0])
        # The pieces of a section differ independently; the error of the ratio is the same for all of them.
        variance = deviation**2 * (times + times**2 / len(pieces))
        deviations = NormalDist().inv_cdf(1 - _RISK / self.sections)
        return float(ratio), float(deviations * math.sqrt(variance))

    def _count_sections(self) -> int:
        ratio, margin = self._ratio
        looked_at = range(1 if self.same_rows else self.epochs)
        volume = max(float(self._volumes(self._rows(epoch)).sum()) for epoch in looked_at)
        return self._multiple(min(math.ceil(ratio * volume + margin * self.sections), self._num_rows))

    def _counts(self, epoch: int) -> np.ndarray:
        if self.sections == 1:
            return super()._counts(epoch)
        return np.diff(self._ends) * self.ranks

    @property
    def _ends(self) -> np.ndarray:
        """(sections + 1,) steps before each section, and all."""
        return np.arange(self.sections + 1) * len(self) // self.sections

    def _bounds(self, epoch: int) -> np.ndarray:
        """Sections take a share of the epoch's volume that is in proportion to their steps."""
        if self.sections == 1:
            return super()._bounds(epoch)
        if self._bounded is None or self._bounded[0] != epoch:
            volumes = np.cumsum(self._volumes(self._rows(epoch)))
            bounds = np.searchsorted(volumes, volumes[-1] * self._ends / len(self))
            if self.count > 0.9 * self._num_rows:  # nearly each row is a pack
                bounds = (bounds + self.ranks // 2) // self.ranks * self.ranks
            bounds[0], bounds[-1] = 0, self._num_rows
            self._bounded = epoch, bounds
        return self._bounded[1]

    _bounded: tuple[int, np.ndarray] | None = None

    def _group_costs(
        self, groups: list[list[int]], tokens: np.ndarray, tiles: np.ndarray, supervised: np.ndarray
    ) -> np.ndarray:
        rows = tiles if self.costs is None else self.costs.of(tokens, tiles, supervised)
        ends = np.cumsum([len(group) for group in groups])
        return np.add.reduceat(rows[np.concatenate(groups)], np.concatenate([[0], ends[:-1]]))


class GroupedBatches(PlannedBatches):
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
        **options: Any,
    ) -> None:
        """`window`: batches whose rows are sorted by length together; 1: no grouping. `options`: see `PackedBatches`.

        Without grouping the batches of a step are the next rows of the order, however many ranks or micro-batches
        share the step.
        """
        super().__init__(tokens, tiles, order, rank, ranks, seed, **options)
        self.batch_size, self.window = batch_size, window

    def efficiency(self, epoch: int = 0) -> float:
        """Share of the tokens of an epoch's padded batches that belong to rows."""
        batches = self.batches(epoch)
        padded = sum(len(batch) * int(self.tokens[batch].max()) for batch in batches)
        return float(sum(self.tokens[batch].sum() for batch in batches) / padded)

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"batch_size": self.batch_size, "window": self.window}

    @cached_property
    def sections(self) -> int:
        return len(self._bounds(0)) - 1

    def _bounds(self, epoch: int) -> np.ndarray:
        if self._num_rows <= self.section:
            return super()._bounds(epoch)
        block = self.batch_size * self.window * self.ranks
        return np.append(np.arange(0, self._num_rows, -(-self.section // block) * block), self._num_rows)

    def _count_sections(self) -> int:
        return self._multiple(int(self._counts(0).sum()))

    def _counts(self, epoch: int) -> np.ndarray:
        if self.sections == 1:
            return super()._counts(epoch)
        steps = -(-np.diff(self._bounds(epoch)) // (self.batch_size * self.ranks))
        return steps * self.ranks

    def _dealt(self, costs: np.ndarray, epoch: int, section: int) -> np.ndarray:
        return np.arange(len(costs)) if self.window == 1 else super()._dealt(costs, epoch, section)

    def _groups(self, tokens: np.ndarray, tiles: np.ndarray, count: int | None) -> list[list[int]]:
        groups, size = [], self.batch_size * self.window
        for start in range(0, len(tokens), size):
            block = start + np.argsort(-tokens[start : start + size], kind="stable")
            groups += [block[n : n + self.batch_size].tolist() for n in range(0, len(block), self.batch_size)]
        return groups

    def _group_costs(
        self, groups: list[list[int]], tokens: np.ndarray, tiles: np.ndarray, supervised: np.ndarray
    ) -> np.ndarray:
        starts = np.concatenate([[0], np.cumsum([len(group) for group in groups])[:-1]])
        rows = np.concatenate(groups)
        longest = np.maximum.reduceat(tokens[rows], starts)
        if self.costs is None:
            return longest
        sizes = np.array([len(group) for group in groups])
        sums = [np.add.reduceat(values[rows], starts) for values in (tiles, supervised)]
        flat = RowCosts(self.costs.tile, 0, 0, self.costs.supervised).of(longest, *sums)
        return flat + sizes * (self.costs.token * longest + self.costs.pair * longest.astype(np.float64) ** 2)
