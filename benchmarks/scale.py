"""Index and packs of millions of rows: time and memory, start on an index that exists, fill, balance of the ranks.

    python benchmarks/scale.py [--rows 1000000 5000000] [--simulated 50000000] [--folder FOLDER]

Rows are made: a third text only, a half with one picture of up to 12 tiles and a thumbnail, a sixth with more; texts of
20 to 400 words, as in benchmarks/index.py. `--rows`: a file of so many rows (0.6 KB each) is written, indexed and
opened. Its records are made, not measured (a record takes 0.5 ms of a core, see benchmarks/index.md): blocks, joining,
cache and start are the product's. `--simulated`: lengths alone, planned for 64 ranks. Each size has a process of its
own.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ivl.architecture.config import Config
from ivl.architecture.families import config_for, find_model
from ivl.data.index import index_build, index_file
from ivl.data.index.index import RECORD, Index, drop_unusable
from ivl.data.index.media_stamps import MediaStamps, stamp
from ivl.data.packing.samplers import PackedBatches
from ivl.data.sets.dataset import Mixture, MixtureSource, RowDataset
from ivl.lit.training.row_costs import row_costs
from ivl.options import Tune

LIMIT = 8192
MODELS = ("internvl3_5-1b", "internvl3_5-8b", "internvl3_5-30b-a3b")
_PART = 1_000_000
SECTIONS = 3
"""Sections of a simulated epoch whose plans are looked at"""


def lengths(count: int) -> np.ndarray:
    """Tokens, tiles and supervised tokens of rows, (count, 3) int32."""
    starts = range(0, count, _PART)
    return np.concatenate([_lengths(min(_PART, count - start), start) for start in starts])


def _lengths(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, count, p=[1 / 3, 1 / 2, 1 / 6]).astype(np.int8)
    one, more = (rng.choice([1, 2, 3, 5, 7, 9, 10, 11, 13], (count, n)).astype(np.int8).sum(1) for n in (1, 2))
    tiles = np.choose(kind, [0 * one, one, one + more])
    answer = (rng.lognormal(4, 0.8, count).astype(np.float32) % 400 + 1) * 1.4
    values = np.stack([np.minimum(256 * tiles + 30 + answer, LIMIT), tiles, answer + 2], 1)
    return values.astype(np.int32)


def anonymous() -> float:
    """Memory of this process in GB that it shares with no other and no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1e6


def row(text: str, result: str) -> None:
    print(f"| {text} | {result} |", flush=True)


@contextmanager
def timed(text: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    row(text, f"{time.perf_counter() - began:.2f} s")


def apart(function: Callable, *values: Any) -> None:
    """Call a function in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=values)
    process.start()
    process.join()
    assert process.exitcode == 0, process.exitcode


def open_rows(folder: Path) -> RowDataset:
    return RowDataset(folder / "rows.jsonl", SimpleNamespace(max_length=LIMIT), cache_dir=folder / "cache")  # type: ignore[arg-type]


def write(folder: Path, count: int) -> None:
    """Write rows; the same few lines again and again, as their text is not read here."""
    texts = "".join(json.dumps({"query": "what " * (20 + n % 60), "response": "a " * 130}) + "\n" for n in range(1000))
    with open(folder / "rows.jsonl", "w") as out:
        out.writelines(texts for _ in range(count // 1000))
    for n in range(200):
        (folder / f"{n}.jpg").write_bytes(b"")
    time.sleep(2.5)  # a file that has just been written is read through at the next start


def build(folder: Path, count: int) -> None:
    with timed("read through the file of rows, once"):
        rows = open_rows(folder)
    path = folder / "cache/index" / index_build._key(rows, index_build.fingerprint(rows.processor), False)
    blocks = index_file.IndexBlocks(path, count, index_build._BLOCK)
    records = np.zeros(count, RECORD)
    records["tokens"], records["tiles"], records["supervised"] = lengths(count).T
    records["exact"] = records["usable"] = True
    names = [os.fsencode(folder / f"{n}.jpg") for n in range(200)]
    seen = [(n, names[n % 200], stamp(names[n % 200])) for n in range(index_build._BLOCK)]
    with timed("write the measured blocks"):
        for block in range(len(blocks)):
            numbers = blocks.numbers(block)
            part = Index(records[numbers], media=MediaStamps.of(seen[: len(numbers)]))
            blocks.write(block, index_file.to_bytes(part))
    del records
    before = anonymous()
    with timed("join them, and look at the pictures"):
        index = index_build.build_index(rows, cache_dir=folder / "cache")
    assert len(index) == count
    row("memory while joining, of one process", f"{anonymous() - before + index.records.nbytes / 1e9:.2f} GB")
    kept = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())
    row("index and table of the rows on disk", f"{kept / 1e6:.0f} MB, {kept / count:.1f} bytes a row")


def start(folder: Path, count: int) -> None:
    multiprocessing.set_start_method(None, force=True)  # as in a program that was not spawned
    before, began = anonymous(), time.perf_counter()
    rows = open_rows(folder)
    opened = time.perf_counter()
    index = index_build.build_index(rows, cache_dir=folder / "cache")
    indexed = time.perf_counter()
    rows, index = drop_unusable(rows, index, cache=folder / "cache")
    mixture = Mixture([MixtureSource(rows)])
    packs = PackedBatches(
        index.tokens, index.tiles, LIMIT, order=mixture.order, ranks=64, same_rows=True, cache=folder / "cache"
    )
    len(packs)
    counted = time.perf_counter()
    batches = iter(packs)  # kept: its end would wait for the process that plans the next section
    next(batches)
    ended = time.perf_counter()
    row(
        "start: rows, index, estimate of the packs",
        f"{opened - began:.2f} s, {indexed - opened:.2f} s, {counted - indexed:.2f} s",
    )
    row("**start until the first pack**", f"**{ended - began:.2f} s**")
    row("memory of this process alone", f"{anonymous() - before:.2f} GB")


def before_sections(count: int) -> None:
    tokens, tiles, _ = lengths(count).T
    packs = PackedBatches(tokens, tiles, LIMIT, ranks=64, section=count)
    began = time.perf_counter()
    next(iter(packs))
    row("first pack where the whole epoch is planned before it", f"{time.perf_counter() - began:.2f} s")


def simulate(count: int) -> None:
    tokens, tiles, supervised = (np.ascontiguousarray(column) for column in lengths(count).T)
    before = anonymous()
    for ranks in (8, 64):
        began = time.perf_counter()
        packs = PackedBatches(tokens, tiles, LIMIT, ranks=ranks, background=False)
        total = len(packs) * ranks
        counted = time.perf_counter()
        plans = [packs.plan(0, section) for section in range(min(SECTIONS, packs.sections))]
        planned = time.perf_counter() - counted
        rows = sum(len(pack) for plan in plans for pack in plan)
        fill = tokens.sum(dtype=np.int64) / (total * LIMIT)
        row(f"{ranks} ranks: order and estimate", f"{counted - began:.2f} s, {packs.sections} sections")
        row(f"{ranks} ranks: a section of {rows // len(plans)} rows", f"{planned / len(plans):.2f} s in the background")
        row(f"{ranks} ranks: fill", f"{fill:.2%} of {total:,} packs")
        del packs, plans
    row("memory of planning, beside lengths", f"{anonymous() - before:.2f} GB")
    for name in MODELS:
        model = find_model(name)
        assert model is not None, name
        costs = row_costs(Config.from_dict(config_for(model)), Tune("full", "full", "full"))
        by_row = costs.of(tokens[: 1 << 20], tiles[: 1 << 20], supervised[: 1 << 20])
        for ranks in (8, 64):
            spreads = []
            for balanced in (costs, None):
                packs = PackedBatches(
                    tokens[: 1 << 20], tiles[: 1 << 20], LIMIT, ranks=ranks, background=False,
                    costs=balanced, supervised=supervised[: 1 << 20],
                )  # fmt: skip
                steps = [by_row[pack].sum() for n in range(packs.sections) for pack in packs.plan(0, n)]
                by_step = np.array(steps).reshape(-1, ranks)
                spread = (by_step.max(1) - by_step.mean(1)) / by_step.mean(1)
                spreads.append(f"{spread.mean():.2%} (95 %: {np.quantile(spread, 0.95):.2%})")
            row(f"{name}, {ranks} ranks: spread of a step", f"{spreads[0]}; by tiles alone {spreads[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000, 5_000_000])
    parser.add_argument("--simulated", type=int, nargs="*", default=[5_000_000, 50_000_000])
    parser.add_argument("--folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, torch {torch.__version__}")
    for count in options.rows:
        print(f"\n{count:,} rows\n\n| what | result |\n| --- | --- |", flush=True)
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            for function in (write, build, start):
                apart(function, Path(name), count)
        if count <= 1_000_000:
            apart(before_sections, count)
    for count in options.simulated:
        print(f"\n{count:,} rows, lengths alone\n\n| what | result |\n| --- | --- |", flush=True)
        apart(simulate, count)


if __name__ == "__main__":
    main()
