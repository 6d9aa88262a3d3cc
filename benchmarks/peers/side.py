"""Parts that the peers of train_step.py share: arguments, rows, the same start, times and losses of steps."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_step import BATCH, LORA, RATE, TARGETS, same_start

__all__ = ["BATCH", "LORA", "RATE", "TARGETS", "arguments", "rows_of", "watch_of", "with_tiles", "write_result"]


def arguments() -> argparse.Namespace:
    """What `train_step.py --peer` fills in, in its order."""
    parser = argparse.ArgumentParser()
    for name, kind in (("hf", Path), ("rows", Path), ("steps", int), ("max_tiles", int), ("threads", int)):
        parser.add_argument(name, type=kind)
    parser.add_argument("recipe", choices=("lora", "full"))
    parser.add_argument("dropout", type=float)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def rows_of(args: argparse.Namespace, file: Path) -> Path:
    """Write the rows with whole paths of their pictures."""
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    for row in rows:
        row["images"] = [str(args.rows.parent.resolve() / name) for name in row["images"]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def with_tiles(args: argparse.Namespace, folder: Path) -> Path:
    """Make a folder of the same checkpoint whose image processor cuts up to `max_tiles` tiles."""
    folder.mkdir()
    for file in args.hf.iterdir():
        os.symlink(file.resolve(), folder / file.name)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (folder / name).is_file():
            continue
        values = json.loads((args.hf / name).read_text())
        for part in (values, values.get("image_processor") or {}):
            if "max_patches" in part:
                part["max_patches"] = args.max_tiles
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(values))
    return folder


def watch_of(base: type) -> Any:
    """Class of a callback, from transformers' TrainerCallback: times and losses of steps, and the same LoRA start."""

    class Watch(base):
        times: list[float] = []  # noqa: RUF012  (read when the training is over, whoever made the callback)
        losses: list[float] = []  # noqa: RUF012

        def __init__(self, *_: Any) -> None:
            super().__init__()

        def on_train_begin(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
            same_start(model)
            self.times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
            if "loss" in (logs or {}):
                self.losses.append(float(logs["loss"]))

    return Watch


def write_result(watch: Any) -> None:
    """Print the last line that train_step.py reads."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"times": watch.times, "losses": watch.losses, "peak_gb": peak}), flush=True)
