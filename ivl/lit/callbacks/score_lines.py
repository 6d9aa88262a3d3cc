"""Lines of held-out scores, one after each validation of a fit: a table that grows as the run goes on."""

from __future__ import annotations

import time

from lightning.pytorch import Callback, LightningModule, Trainer

from ivl.lit.callbacks.monitor import clock
from ivl.lit.metrics import cell, title
from ivl.types import printable

WIDTH = 79
"""Columns of a line at most; kinds of rows that do not fit are left to the table at the end"""


class ScoreLines(Callback):
    """Prints epoch, step, time, loss and scores of all held-out rows after each validation, and a score of each kind of
    row where they fit."""

    def __init__(self) -> None:
        self._titles: list[str] = []
        self._start = time.perf_counter()

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        scores: dict[str, dict[str, float]] = module.scores  # type: ignore[assignment]
        values = line_of(scores)
        if not values:
            return
        values = {
            "epoch": str(trainer.current_epoch + 1),
            "step": str(trainer.global_step),
            "time": clock(time.perf_counter() - self._start),
            **values,
        }
        lines = []
        if [*values] != self._titles:
            self._titles = [*values]
            lines.append(_aligned(self._titles, self._titles))
        lines.append(_aligned(self._titles, list(values.values())))
        bar = trainer.progress_bar_callback
        for line in lines:
            bar.print(line) if bar is not None else print(line, flush=True)


def line_of(scores: dict[str, dict[str, float]]) -> dict[str, str]:
    """Return the columns of one validation by title: loss and scores of all rows, then one score of each kind."""
    total = scores.get("", {})
    names = [name for name in total if name != "rows"]
    values = {title(name): cell(name, total[name]) for name in names}
    kinds = sorted(kind for kind in scores if kind)
    first = next((name for name in names if name != "loss"), None)
    if first is None or len(kinds) < 2:
        return values
    for kind in kinds:
        name = printable(kind, " ")
        with_kind = values | {name: cell(first, scores[kind].get(first))}
        if name in values or len(_aligned(["epoch", "step", "time", *with_kind], [""] * (3 + len(with_kind)))) > WIDTH:
            break
        values = with_kind
    return values


def _aligned(titles: list[str], cells: list[str]) -> str:
    return "  ".join(f"{text:>{max(len(name), 7)}}" for name, text in zip(titles, cells, strict=True))
