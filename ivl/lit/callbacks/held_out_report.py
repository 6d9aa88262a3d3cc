"""Page of the held-out rows of a fit: held_out.html in the run's folder, with the answers of the last validation."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ivl.eval import own, report
from ivl.lit.types import as_lit
from ivl.types import Conversation

PAGE = "held_out.html"
RESAMPLES = 1000


class HeldOutReport(Callback):
    """At the end of fit, a page with the answers to held-out rows: pictures, boxes, expected answers and scores.

    Args:
        rows: Most rows on the page, evenly picked from those answered in the last validation; 0: no page.
    """

    def __init__(self, rows: int = 200) -> None:
        self.rows = rows

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        folder = trainer.log_dir  # asks all ranks
        if not self.rows or folder is None:
            return
        rows = [_row(answer) for answer in as_lit(module).answers if answer["row"].reference is not None]
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, rows)
            rows = [row for part in parts for row in part]
        if rows and trainer.is_global_zero:
            write_page(Path(folder) / PAGE, sorted(rows, key=lambda row: row["index"]), self.rows, trainer.global_step)


def write_page(path: Path, rows: list[report.Row], most: int, step: int) -> None:
    """Write the page, with scores of all rows, and `most` of them."""
    scores = own.score_rows(rows)
    totals = own.summarized(rows, scores, RESAMPLES, seed=0)[own.ALL]
    picked = [n * len(rows) // most for n in range(most)] if len(rows) > most else list(range(len(rows)))
    part = "" if len(picked) == len(rows) else f" ({len(picked)} of them here)"
    title = f"held-out rows after step {step}{part}"
    report.write_own(path, title, [totals], [[rows[n] for n in picked]], [[scores[n] for n in picked]])


def _row(answer: dict[str, Any]) -> report.Row:
    """Row of an answer of validation, as files of predictions have it."""
    row: Conversation = answer["row"]
    sources = [m.source for m in row.media if m.kind == "image"]
    return {
        "index": answer["index"],
        "id": row.id if row.id is not None else row.where,
        "where": row.where,
        "source": row.source or None,
        "prompt": row.question,
        "response": answer["answer"],
        "reasoning": answer["reasoning"],
        "reference": row.reference,
        "images": [_address(source) for source in sources],
    }


def _address(source: Any) -> str | None:
    """Path or data: URI of a picture; None for any other kind."""
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    return f"data:;base64,{base64.b64encode(source).decode()}" if isinstance(source, bytes) else None
