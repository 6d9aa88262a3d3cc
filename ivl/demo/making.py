"""Making of the demo's rows by several processes, with a bar that moves; rows are those that one process makes.

Each further process is this module run as a program: it reads a part as JSON and writes a row a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ivl.demo.rows import Row, rows_of_kind

FEW = 1000
"""Rows up to which further processes take longer to start than they save"""


@dataclass(frozen=True)
class Part:
    """Rows of one kind of a split."""

    folder: str
    split: str
    kind: str
    count: int
    seed: int

    @property
    def cost(self) -> int:
        """Time it takes, roughly, in rows without a clip."""
        return self.count * (8 if self.kind == "video" else 1)


def make_rows(parts: Sequence[Part]) -> list[list[Row]]:
    """Make the rows of all parts, with their pictures and clips. Returns them in the order of the parts."""
    from ivl.data.workers import cores  # brings torch, and the other processes need none

    total = sum(part.count for part in parts)
    processes = min(cores(), len(parts)) if total > FEW else 1
    rows: list[list[Row]] = [[] for _ in parts]
    with tqdm(total=total, desc="rows with pictures and clips", unit="row") as bar:

        def collect(number: int, make: Callable[[Part], Iterator[Row]]) -> None:
            for row in make(parts[number]):
                rows[number].append(row)
                bar.update()

        if processes == 1:
            for number in range(len(parts)):
                collect(number, rows_of)
            return rows
        longest_first = sorted(range(len(parts)), key=lambda number: -parts[number].cost)
        with ThreadPoolExecutor(processes) as threads:
            for ended in [threads.submit(collect, number, _rows_of_a_process) for number in longest_first]:
                ended.result()
    return rows


def rows_of(part: Part) -> Iterator[Row]:
    """Make the rows of a part, one by one."""
    return rows_of_kind(Path(part.folder), part.split, part.kind, part.count, part.seed)


def _rows_of_a_process(part: Part) -> Iterator[Row]:
    package = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "ivl.demo.making", json.dumps(vars(part))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, encoding="utf-8", env=os.environ | {"PYTHONPATH": paths}
    ) as run:
        assert run.stdout is not None
        yield from map(json.loads, run.stdout)
    if run.returncode:
        raise RuntimeError(f"making the demo's rows {part.split}, {part.kind}: status {run.returncode}, see above")


if __name__ == "__main__":
    for row in rows_of(Part(**json.loads(sys.argv[1]))):
        print(json.dumps(row), flush=True)
