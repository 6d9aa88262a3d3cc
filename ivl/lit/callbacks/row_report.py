"""Report of a run on its rows: left out, changed, or with keys that are not read."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch.utilities import rank_zero_info

from ivl.data.index.index import Index, progress_bar, reasons
from ivl.data.index.index_build import build_index
from ivl.data.index.unread_keys import describe
from ivl.data.process_group import ProcessGroup
from ivl.data.sets.dataset import RowDataset


def index_rows(rows: RowDataset, name: str, group: ProcessGroup, probe_urls: bool = False) -> Index:
    """Build the index of rows, each process of a group its share, with a progress bar on the terminal."""
    with progress_bar(f"index {name}", rows) as progress:
        return build_index(rows, probe_urls=probe_urls, progress=progress, group=group)


def report_left_out(index: Index, report: str | None) -> None:
    """Log the number of training rows left out, by reason, and the file that lists them."""
    if not index.problems:
        return
    counts = [f"{count:8} {reason}" for reason, count in reasons(index.problems.values()).most_common(10)]
    listed = f", listed in {report}" if report else " (--data.report FILE lists them)"
    text = f"{len(index.problems)} of {len(index)} rows cannot be used and are left out{listed}; by reason:"
    rank_zero_info("\n".join([text, *counts]))


def report_changed(index: Index) -> None:
    """Log the number of rows that max_length changes."""
    if changed := index.describe_changes():
        rank_zero_info(f"rows that max_length changes: {changed} (of {len(index)})")


def report_unread(index: Index, where: Callable[[int], str]) -> None:
    """Log the keys that are not read, with counts and the first row of each."""
    if keys := index.unread_keys():
        rank_zero_info(f"keys that are not read: {describe(keys, where)}")
