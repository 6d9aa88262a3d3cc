"""How the cost of a training step grows with tokens: packs of rows of one length, on the tiny model.

python benchmarks/scaling.py [--row 256] [--threads 2]

For each size, forward and backward of a pack, best of `--repeats`; the sizes take turns. Linear means that seconds a
token stay the same; the last column is their ratio to those of the line through the smallest and the largest pack.
"""

from __future__ import annotations

import argparse
import time

import torch

from ivl.architecture.config import Config
from ivl.model.internvl import InternVL
from ivl.types import Batch


def pack(rows: int, length: int, vocabulary: int) -> Batch:
    ids = torch.randint(0, vocabulary, (1, rows * length), generator=torch.Generator().manual_seed(0))
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        position_ids=torch.arange(length).repeat(rows)[None],
        labels=ids,
        tiles=torch.zeros(0, 3, 56, 56, dtype=torch.uint8),
        tiles_per_row=torch.zeros(rows, dtype=torch.long),
        row_ids=torch.arange(rows).repeat_interleave(length)[None],
        lengths=torch.full((rows,), length),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", type=int, default=256, help="tokens of a row")
    parser.add_argument("--most", type=int, default=8192, help="tokens of the largest pack")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from models import BASE, SIZES

    pixels, vision, llm = SIZES["tiny"]
    raw = BASE | {"force_image_size": pixels, "vision_config": BASE["vision_config"] | {"image_size": pixels} | vision}
    raw |= {"llm_config": BASE["llm_config"] | llm | {"max_position_embeddings": 16384}}
    model = InternVL.from_config(Config.from_dict(raw))
    sizes = [size for n in range(20) if args.row <= (size := args.row * 2**n) <= args.most]
    packs = {size: pack(size // args.row, args.row, model.vocab_size) for size in sizes}
    best = dict.fromkeys(sizes, float("inf"))
    for turn in range(args.repeats + 1):
        for size in sizes:
            model.zero_grad()
            start = time.perf_counter()
            model(**packs[size]).loss.backward()
            if turn:
                best[size] = min(best[size], time.perf_counter() - start)
    slope = (best[sizes[-1]] - best[sizes[0]]) / (sizes[-1] - sizes[0])
    print(f"rows of {args.row} tokens, {args.threads} threads, torch {torch.__version__}\n")
    print("| tokens | ms | µs a token | of the line |\n| --- | --- | --- | --- |")
    for size, seconds in best.items():
        line = best[sizes[0]] + slope * (size - sizes[0])
        print(f"| {size} | {1e3 * seconds:.1f} | {1e6 * seconds / size:.2f} | {seconds / line:.2f} |")


if __name__ == "__main__":
    main()
