"""Lines of a run about its rows: those that are left out or changed, and keys that are not read."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch.utilities import rank_zero_info

from ivl.data.sets.dataset import RowDataset
from ivl.data.sets.index import Index, build_index, progress_bar, reasons
from ivl.data.sets.unread_keys import describe


def looked_through(rows: RowDataset, name: str, probe_urls: bool = False) -> Index:
    """The index of rows, with a bar on the terminal where it is made."""
    with progress_bar(f"index {name}", rows) as progress:
        return build_index(rows, probe_urls=probe_urls, progress=progress)


def say_left_out(index: Index, report: str | None) -> None:
    """Count the problems of training rows by reason, and name the file that lists them."""
    if not index.problems:
        return
    counts = [f"{count:8} {reason}" for reason, count in reasons(index.problems.values()).most_common(10)]
    listed = f", listed in {report}" if report else " (--data.report FILE lists them)"
    text = f"{len(index.problems)} of {len(index)} rows cannot be used and are left out{listed}; by reason:"
    rank_zero_info("\n".join([text, *counts]))


def say_changed(index: Index) -> None:
    """Count the rows that max_length changes."""
    if changed := index.describe_changes():
        rank_zero_info(f"rows that max_length changes: {changed} (of {len(index)})")


def say_unread(index: Index, where: Callable[[int], str]) -> None:
    """Name the keys that are not read, with counts and the first row of each."""
    if found := index.unread_keys():
        rank_zero_info(f"keys that are not read: {describe(found, where)}")
