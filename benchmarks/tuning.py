"""Training by tuning mode: tokens/s, peak memory, and the share of time outside the model.

    python benchmarks/tuning.py                          # on the CPU: random weights, 60 M parameters
    python benchmarks/tuning.py --model FOLDER --precision bf16-mixed --steps 50      # on a GPU, where there is one

Each mode runs in a process of its own: `--steps` optimizer steps of `--batch` rows with a picture and an answer, after
a tenth of them to warm up. Inside the model: its forward, the loss and backward; outside: loading, collating, the
optimizer, logging. Peak memory: of the device, or growth of the resident set since before the model was built (Linux).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

MODES: dict[str, dict[str, Any]] = {
    "projector": {"tune": {"mlp1": "full", "language_model": "frozen"}},
    "LoRA": {"tune": {"language_model": {"rank": 16}}},
    "LoRA, all parts": {"tune": {p: {"rank": 16} for p in ("vision_model", "mlp1", "language_model")}},
    "LoRA, layers again": {"tune": {"language_model": {"rank": 16}}, "again": True},
    "DoRA": {"tune": {"language_model": {"rank": 16, "dora": True}}},
    "QLoRA (nf4)": {"tune": {"language_model": {"rank": 16}}, "quantize": "nf4"},
    "last 4 blocks, LoRA": {"tune": {"vision_model": {"last": 4}, "mlp1": "full", "language_model": {"rank": 16}}},
    "full": {"tune": {"vision_model": "full", "mlp1": "full", "language_model": "full"}},
    "full, layers again": {"tune": {"vision_model": "full", "mlp1": "full", "language_model": "full"}, "again": True},
}


def resident(field: str) -> int:
    """Bytes; VmRSS: now, VmHWM: at most so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def write_rows(folder: Path, count: int) -> Path:
    """Rows of a picture, a question and an answer of unequal length."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    lines = []
    for n in range(count):
        Image.fromarray(rng.integers(0, 256, (448, 448, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        answer = "What is written on it? 0 1 2 3. " * (1 + n % 8)
        lines.append(json.dumps({"query": "<image>Describe it.", "response": answer, "images": [f"{n}.png"]}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def train(args: argparse.Namespace) -> None:
    """One mode, in this process; prints JSON."""
    from lightning.pytorch import Callback, Trainer

    from ivl.lit.datamodule import IvlData
    from ivl.lit.module import LitInternVL
    from ivl.options import Checkpointing, Tune

    class Timed(LitInternVL):
        inside = 0.0

        def _timed(self, work, *given):
            self._wait()
            start = time.perf_counter()
            out = work(*given)
            self._wait()
            self.inside += time.perf_counter() - start
            return out

        def _wait(self) -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        def training_step(self, batch, batch_idx):
            return self._timed(super().training_step, batch, batch_idx)

        def backward(self, loss):
            self._timed(super().backward, loss)

    class Clock(Callback):
        tokens = 0

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == warm:
                module.inside, self.tokens, self.start = 0.0, 0, time.perf_counter()
            elif trainer.global_step > warm:
                self.tokens += batch.num_tokens
            self.end = time.perf_counter()

    mode, clock = MODES[args.mode], Clock()
    warm = max(1, args.steps // 10)
    before = resident("VmRSS")
    again = mode.get("again", False)
    model = Timed(
        args.model,
        tune=Tune.from_dict(mode["tune"]),
        quantize=mode.get("quantize"),
        checkpointing=Checkpointing(again, again),
        metrics=["exact"],
    )
    data = IvlData(args.model, train=args.rows, batch_size=args.batch, max_tiles=args.tiles, num_workers=args.workers)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "callbacks": [clock]}
    steps = {"max_steps": args.steps + warm, "max_epochs": -1, "log_every_n_steps": 10, "limit_val_batches": 0}
    trainer = Trainer(precision=args.precision, use_distributed_sampler=False, devices=1, **options, **steps)
    trainer.fit(model, data)
    cuda = model.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before
    seconds = clock.end - clock.start
    print(json.dumps({"tokens": clock.tokens / seconds, "peak": peak, "outside": 1 - model.inside / seconds}))


def in_process(*given: str) -> dict[str, float] | None:
    done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True)
    if done.returncode:
        print(f"  {given}: {done.stderr.strip().splitlines()[-1]}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder; default: 60 M random parameters")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tiles", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        train(args)
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """The table."""
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            from models import write  # beside this file

            args.model = str(write(Path(folder) / "60m", "60m"))
        rows = write_rows(Path(folder), args.batch * (args.steps + 2))
        names = ("model", "precision", "steps", "batch", "tiles", "workers")
        common = [str(v) for name in names for v in (f"--{name}", getattr(args, name))]
        print("| mode | tokens/s | peak memory, GB | outside the model |\n| --- | --- | --- | --- |")
        for mode in MODES:
            if found := in_process(*common, "--mode", mode, "--rows", str(rows)):
                cells = f"{found['tokens']:,.0f} | {found['peak'] / 1e9:.2f} | {100 * found['outside']:.0f} %"
                print(f"| {mode} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
