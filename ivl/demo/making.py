"""Making of the demo's rows by several processes, with a bar that moves; rows are those that one process makes.

Each further process is this module run as a program: it makes a share of the rows, and writes a row a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from ivl.demo.rows import TRAIN, Boards, Row, rows_of_kind

FEW = 1000
"""Rows for which a further process takes longer to start than it saves"""


@dataclass(frozen=True)
class Part:
    """Rows of one kind of a split."""

    folder: str
    split: str
    kind: str
    count: int
    seed: int


def make_rows(parts: Sequence[Part]) -> list[list[Row]]:
    """Make the rows of all parts, with their pictures and clips. Returns them in the order of the parts."""
    from ivl.data.workers import cores  # brings torch, and the other processes need none

    total = sum(part.count for part in parts)
    processes = max(1, min(cores(), total // FEW))
    rows: list[list[Row]] = [[{} for _ in range(part.count)] for part in parts]
    with tqdm(total=total, desc="rows with pictures and clips", unit="row") as bar:

        def collect(share: int, share_rows: Iterable[Row]) -> None:
            for (part, number), row in zip(_numbers(parts, share, processes), share_rows, strict=True):
                rows[part][number] = row
                bar.update()

        if processes == 1:
            collect(0, rows_of_share(parts, 0, 1))
            return rows
        with ThreadPoolExecutor(processes) as threads:
            runs = [
                threads.submit(collect, share, _rows_of_a_process(parts, share, processes))
                for share in range(processes)
            ]
            for run in runs:
                run.result()
    return rows


def rows_of_share(parts: Sequence[Part], share: int, shares: int) -> Iterator[Row]:
    """Make one of several equal shares of the rows of every part, one by one."""
    for part in parts:
        numbers = range(share, part.count, shares)
        boards = TRAIN if part.split == "train" else Boards()
        yield from rows_of_kind(Path(part.folder), part.split, part.kind, numbers, part.seed, boards)


def _numbers(parts: Sequence[Part], share: int, shares: int) -> Iterator[tuple[int, int]]:
    """Return which part each row of a share is of, and its number there."""
    return ((n, number) for n, part in enumerate(parts) for number in range(share, part.count, shares))


def _rows_of_a_process(parts: Sequence[Part], share: int, shares: int) -> Iterator[Row]:
    package = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    work = {"parts": [asdict(part) for part in parts], "share": share, "shares": shares}
    command = [sys.executable, "-m", "ivl.demo.making", json.dumps(work)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, encoding="utf-8", env=os.environ | {"PYTHONPATH": paths}
    ) as run:
        assert run.stdout is not None
        yield from map(json.loads, run.stdout)
    if run.returncode:
        raise RuntimeError(f"making the demo's rows: status {run.returncode}, see above")


if __name__ == "__main__":
    work = json.loads(sys.argv[1])
    for row in rows_of_share([Part(**part) for part in work["parts"]], work["share"], work["shares"]):
        print(json.dumps(row))
