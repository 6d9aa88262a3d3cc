"""Index build rate in rows per second, memory and second start, and how full packs are.

    python benchmarks/index.py CHECKPOINT [--rows 100000] [--workers 2] [--parquet]

Rows are made: a third text only, a half with one picture of up to 12 tiles and a thumbnail, a sixth with three; texts
of 20 to 400 words. Pictures are 200 files of many shapes, so their headers come from the page cache. CHECKPOINT is any
checkpoint folder: its tokenizer does most of the work. Tiles are of 448 pixels, whatever its config says. `--parquet`:
the same rows are a parquet file with their pictures' bytes in cells.
"""

import argparse
import json
import platform
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ivl.architecture.config import Config
from ivl.data.index.index import drop_unusable
from ivl.data.index.index_build import build_index
from ivl.data.packing.samplers import GroupedBatches, PackedBatches
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.data.text.tokenizer import Tokenizer
from ivl.options import ProcessorOptions

TEXT = """the a picture shows four sheep on green grass under cloudy sky with small white house and an old red tractor
what is how many are there describe in detail please answer with single word number left right of image chart table
value year total increase text written sign street city people walking dog cat holding blue umbrella"""


def write(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for n in range(200):
        size = (int(rng.integers(200, 1600)), int(rng.integers(200, 1600)))
        Image.new("L", size, 128).save(folder / f"{n}.jpg")
    words = np.array(TEXT.split())
    with open(folder / "rows.jsonl", "w") as out:
        for n in range(count):
            texts = [
                " ".join(words[rng.integers(0, len(words), k)]) for k in (20, int(rng.lognormal(4, 0.8)) % 400 + 1)
            ]
            pictures = [0, 0, 1, 1, 1, 3][n % 6]
            row = {"query": "<image>" * pictures + texts[0], "response": texts[1]}
            if pictures:
                row["images"] = [f"{k}.jpg" for k in rng.integers(0, 200, pictures)]
            out.write(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


def write_parquet(folder: Path, lines: Path) -> Path:
    """Write the rows of a jsonl file as parquet, 1,000 a row group, pictures as {bytes, path}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = {f"{n}.jpg": (folder / f"{n}.jpg").read_bytes() for n in range(200)}
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("query", pa.string()), ("response", pa.string()), ("images", pa.list_(picture))])
    path = folder / "rows.parquet"
    # A dictionary page that holds all pictures: each is stored once in a row group.
    with open(lines) as opened, pq.ParquetWriter(path, schema, dictionary_pagesize_limit=1 << 26) as writer:
        rows = []
        for line in opened:
            row = json.loads(line)
            row["images"] = [{"bytes": pictures[name], "path": name} for name in row.get("images", [])]
            rows.append(row)
            if len(rows) == 1000:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=8192)
    parser.add_argument("--parquet", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write(folder, options.rows)
        if options.parquet:
            path = write_parquet(folder, path)
        config = replace(Config.load(options.checkpoint), force_image_size=448)
        processor = Processor(
            config, Tokenizer.load(options.checkpoint), ProcessorOptions(max_length=options.max_length)
        )
        print(f"{options.rows} rows, {path.stat().st_size / 1e6:.0f} MB; {options.workers} workers; ", end="")
        print(f"Python {platform.python_version()}, torch {torch.__version__}\n\n| what | result |\n| --- | --- |")

        began = time.perf_counter()
        rows = RowDataset(path, processor, cache_dir=folder / "cache")
        print(f"| find the rows of the file | {time.perf_counter() - began:.2f} s |")
        began = time.perf_counter()
        index = build_index(rows, options.workers, cache_dir=folder / "cache")
        taken = time.perf_counter() - began
        if options.parquet:
            disk = sum(file.stat().st_size for file in (folder / "cache/tables").iterdir())
            print(f"| the table in the cache | {disk / 1e6:.0f} MB |")
        print(f"| build the index | {taken:.1f} s, {options.rows / taken:.0f} rows a second |")
        began = time.perf_counter()
        rows = RowDataset(path, processor, cache_dir=folder / "cache")
        rows, index = drop_unusable(rows, build_index(rows, cache_dir=folder / "cache"))
        print(f"| second start | {time.perf_counter() - began:.2f} s |")
        print(f"| peak memory of this process | {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB |")
        tokens, tiles = index.tokens, index.tiles
        print(f"| tokens of a row | mean {tokens.mean():.0f}, largest {tokens.max()}; {tiles.mean():.1f} tiles |")
        for size in (options.max_length, 2 * options.max_length):
            for most in (None, size // 256):
                began = time.perf_counter()
                packed = PackedBatches(tokens, tiles, size, most, ranks=8)
                count, taken = len(packed), time.perf_counter() - began
                print(
                    f"| packs of {size} tokens, {most or 'any number of'} tiles, 8 ranks "
                    f"| {packed.efficiency():.2%} real tokens, {count} packs a rank, {taken:.1f} s |"
                )
        for window, kind in ((64, "grouped by length"), (1, "not grouped")):
            share = GroupedBatches(tokens, tiles, 8, ranks=8, window=window).efficiency()
            print(f"| padded batches of 8 rows, {kind} | {share:.2%} real tokens |")


if __name__ == "__main__":
    main()
