"""Samples per second of the training loader, and the share of a run that waits for it: ours, and transformers' own
processor in a plain DataLoader.

python benchmarks/dataloader.py [--rows 128] [--workers 1] [--max_tiles 12] [--step 0.5] [--repeats 3]

The same rows (1 to 3 pictures each, texts of mixed lengths), batches of 4 in the same order, and as many workers. Every
measurement is a process of its own; sides alternate. Samples per second are those of a consumer that does nothing; data
wait is the share of its time that a consumer waits which is busy for `--step` seconds with each batch, as a device is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from models import SIZES, write, write_twin
from predict import machine
from torch.utils.data import DataLoader, Dataset
from train_step import write_rows

BATCH, LONGEST = 4, 16384
SIDES = ("transformers' processor", "ivl", "ivl, resize fast")


def ours(args: argparse.Namespace) -> DataLoader:
    """The loader of `fit`."""
    from ivl.lit.datamodule import IvlData

    data = IvlData(
        str(args.model), train=str(args.data), batch_size=BATCH, packing=False, max_tiles=args.max_tiles,
        max_length=LONGEST, shuffle=False, num_workers=args.workers, resize="fast" if "fast" in args.side else "exact",
    )  # fmt: skip
    epoch = SimpleNamespace(current=SimpleNamespace(processed=0))
    data.trainer = SimpleNamespace(
        log_dir=None, is_global_zero=True, strategy=None, max_epochs=1, max_steps=-1, num_devices=1,
        fit_loop=SimpleNamespace(epoch_progress=epoch),
    )  # fmt: skip
    data.setup("fit")
    return data.train_dataloader()


class Pictures(Dataset):
    """Rows with their pictures open."""

    def __init__(self, path: Path) -> None:
        self.folder, self.rows = path.parent, [json.loads(line) for line in path.read_text().splitlines()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> tuple[list[dict[str, Any]], list[Any]]:
        from PIL import Image

        row = self.rows[n]
        images = [Image.open(self.folder / name).convert("RGB") for name in row["images"]]
        asked = [{"type": "image"} for _ in images] + [{"type": "text", "text": row["query"].replace("<image>", "")}]
        said = [{"type": "text", "text": row["response"]}]
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}], images


def theirs(args: argparse.Namespace) -> DataLoader:
    """A plain DataLoader that calls transformers' processor for each batch; every text token is a label."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(f"{args.model}-hf")
    tiling = {"crop_to_patches": True, "min_patches": 1, "max_patches": args.max_tiles}

    def collate(rows: list) -> dict[str, torch.Tensor]:
        texts = [processor.apply_chat_template(messages, tokenize=False) for messages, _ in rows]
        images = [pictures for _, pictures in rows]
        batch = dict(processor(text=texts, images=images, padding=True, return_tensors="pt", **tiling))
        unlearnt = (batch["attention_mask"] == 0) | (batch["input_ids"] == processor.image_token_id)
        return batch | {"labels": batch["input_ids"].masked_fill(unlearnt, -100)}

    return DataLoader(Pictures(args.data), BATCH, num_workers=args.workers, collate_fn=collate)


def consumed(loader: Iterable[Any], step: float) -> dict[str, float]:
    """One pass, `step` seconds for each batch; counted from when the first has come."""
    batches, waited, tiles = iter(loader), 0.0, 0
    tiles += len(_tiles(next(batches)))
    begun, count = time.perf_counter(), 0
    while True:
        if step:
            time.sleep(step)
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        waited += time.perf_counter() - asked
        count += 1
        tiles += len(_tiles(batch))
    seconds = time.perf_counter() - begun - step
    return {"rate": BATCH * count / seconds, "wait": waited / seconds, "tiles": tiles}


def _tiles(batch: Any) -> torch.Tensor:
    return batch["pixel_values"] if isinstance(batch, dict) else batch.tiles


def measure(args: argparse.Namespace, side: str) -> dict[str, float]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--model", str(args.model), "--data", str(args.data)]
    for name in ("workers", "max_tiles", "step"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(args: argparse.Namespace) -> str:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.repeats):
        for side in SIDES:
            found[side].append(measure(args, side))
    lines = [
        (
            f"{machine()}; {args.rows} rows, batches of {BATCH}, up to {args.max_tiles} tiles of {SIZES[args.size][0]} "
            f"pixels and a thumbnail, {args.workers} worker(s), {args.repeats} repeats"
        ),
        "",
        f"| side | samples/s, median | least and most | ratio | data wait beside {args.step:g} s a batch | tiles |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    base = statistics.median(run["rate"] for run in found[SIDES[0]])
    for side, runs in found.items():
        rates = sorted(run["rate"] for run in runs)
        rate, wait = statistics.median(rates), statistics.median(run["wait"] for run in runs)
        lines.append(
            f"| {side} | {rate:.3g} | {rates[0]:.3g} to {rates[-1]:.3g} | {rate / base:.2f} | {wait:.0%} | "
            f"{runs[0]['tiles']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument("--size", default="448", help="checkpoint of benchmarks/models.py whose tiles are made")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max_tiles", type=int, default=12)
    parser.add_argument("--step", type=float, default=0.5, help="seconds that a consumer is busy with a batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ivl-dataloader"))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    for name in ("--model", "--data"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        torch.set_num_threads(1)
        loader = ours(args) if args.side.startswith("ivl") else theirs(args)
        print(json.dumps(consumed(loader, 0.0) | {"wait": consumed(loader, args.step)["wait"]}))
        return
    args.model = write(args.folder / args.size, args.size)
    write_twin(args.folder / f"{args.size}-hf", args.model)
    args.data = write_rows(args.folder / f"rows-{args.rows}", args.rows)
    print(table(args))


if __name__ == "__main__":
    main()
