"""Training and answering as users run them on one GPU, from files: this program, and transformers beside it.

    python benchmarks/gpu_run.py                                          # LoRA of InternVL2-2B's shapes, and answers
    python benchmarks/gpu_run.py --size internvl2-8b --cap 24 --checkpointing --stages train
    python benchmarks/gpu_run.py --size internvl2-4b --recipe full --stages train
    python benchmarks/gpu_run.py --device cpu --size tiny --rows 24 --steps 6 --new 4 --workers 1 --batch 2   # tries it

A checkpoint of the size's shapes with random weights is written in the released layout and in transformers', with rows
of 0 to 3 JPEGs of 300 to 1600 pixels and texts of mixed lengths. Each side then runs in a process of its own, one after
the other, on the same rows in bfloat16 with the same number of loader processes:

- train: `ivl fit` on packed rows; transformers' Trainer with peft on padded batches, its own processor in the workers.
  Steps up to `--warm` do not count; the device is waited for after them and at the end.
- predict: `ivl predict`, and `generate` in batches sorted by length; each row gets `--new` tokens.

MFU is the mean of this program's own log after those steps. `ivl plan`'s prediction of the peak stands beside it. Peaks
are those of tensors. `--cap GB` limits what a training process may take of the card.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import machine, wait
from gpu_peer import LORA, generate_with_transformers, peak, train_with_transformers
from lightning.pytorch import Callback
from models import TEXT, raw_config, write, write_twin
from PIL import Image

from ivl.storage.files import write_json

CONFIG = Path(__file__).parents[1] / "configs/internvl2_2b.yaml"


# -- what is run on --------------------------------------------------------------------------------------------------


def write_rows(folder: Path, count: int) -> Path:
    """Write rows with JPEGs, the same each time."""
    path = folder / "rows.jsonl"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    draw, words, lines = np.random.default_rng(1), TEXT.split(), []
    for n in range(count):
        images = []
        for k in range(int(draw.choice(4, p=[0.15, 0.6, 0.15, 0.1]))):
            width, height = (int(side) for side in np.exp(draw.uniform(np.log(300), np.log(1600), 2)))
            small = draw.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
            images.append(str((folder / f"{n}_{k}.jpg").resolve()))
            Image.fromarray(small).resize((width, height)).save(images[-1], quality=90)
        query = " ".join(draw.choice(words, int(np.clip(draw.lognormal(3.0, 0.8), 3, 200))))
        response = " ".join(draw.choice(words, int(np.clip(draw.lognormal(3.0, 1.0), 2, 300))))
        lines.append({"query": "<image>\n" * len(images) + query, "response": response, "images": images})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    questions = [{key: value for key, value in line.items() if key != "response"} for line in lines]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    return path


# -- this program ----------------------------------------------------------------------------------------------------


class Stopwatch(Callback):
    """Callback that writes rows, tokens, seconds and peak memory of a run to a JSON file at its end."""

    def __init__(self, path: str, warm: int = 0) -> None:
        self.path, self.warm = Path(path), warm
        self.steps = self.rows = self.tokens = 0

    def _start(self, module: Any) -> None:
        wait(module.device)
        self.began, self.rows, self.tokens = time.perf_counter(), 0, 0

    def _stop(self, module: Any) -> None:
        wait(module.device)
        found = {"rows": self.rows, "tokens": self.tokens, "seconds": time.perf_counter() - self.began}
        write_json(self.path, found | {"peak": peak()})

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._start(module)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps, self.rows, self.tokens = self.steps + 1, self.rows + len(batch), self.tokens + batch.num_tokens
        if self.steps == self.warm:
            self._start(module)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._stop(module)

    def on_predict_start(self, trainer: Any, module: Any) -> None:
        self._start(module)

    def on_predict_end(self, trainer: Any, module: Any) -> None:
        self._stop(module)


def options(args: argparse.Namespace) -> list[str]:
    """Return the options of `ivl fit`, most of which `ivl plan` takes too."""
    tune = ["--model.tune.language_model", json.dumps(LORA)]
    if args.recipe == "full":
        tune = ["--config", str(CONFIG.parent / "tune/full.yaml")]
    return [
        "--config", str(CONFIG), *tune, "--model.pretrained", str(args.model),
        "--data.train", str(args.folder / "rows.jsonl"), "--data.max_tiles", str(args.max_tiles),
        "--data.pack_tokens", str(args.pack), "--data.max_length", str(min(4096, args.pack)),
        "--data.num_workers", str(args.workers), "--model.compile", str(args.compile).lower(),
        "--model.checkpointing.language_model", str(args.checkpointing).lower(),
        "--trainer.accumulate_grad_batches", "1",
        "--trainer.max_steps", str(args.steps), "--trainer.max_epochs", "1000", *args.more,
    ]  # fmt: skip


def fit(args: argparse.Namespace) -> dict[str, Any]:
    """Run `ivl fit` in this process."""
    from ivl.__main__ import main

    measured, runs = args.folder / "fit.json", args.folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    log = ["--trainer.logger", "csv", "--trainer.logger.save_dir", str(runs), "--trainer.log_every_n_steps", "1"]
    watch = ["--trainer.callbacks+=gpu_run.Stopwatch", "--trainer.callbacks.path", str(measured)]
    watch += ["--trainer.callbacks.warm", str(args.warm)]
    if main(["fit", *options(args), *log, *watch, *accelerator(args)]):
        sys.exit("ivl fit failed, see above")
    with open(next(runs.glob("**/metrics.csv"))) as file:
        logged = list(csv.DictReader(file))
    of = {name: [float(row[name]) for row in logged if row.get(name)] for name in ("speed/mfu", "train/loss")}
    mfu = of["speed/mfu"][args.warm :]
    extra = {"mfu": sum(mfu) / len(mfu) if mfu else None, "loss": of["train/loss"][-1]}
    return json.loads(measured.read_text()) | extra


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """Run `ivl predict` in this process."""
    from ivl.__main__ import main

    measured, answers = args.folder / "predict.json", args.folder / "answers.jsonl"
    for old in args.folder.glob("answers.jsonl*"):
        old.unlink()
    watch = ["--trainer.callbacks+=gpu_run.Stopwatch", "--trainer.callbacks.path", str(measured)]
    length = [f"--model.generation.{name}_new_tokens={args.new}" for name in ("min", "max")]
    command = [
        "predict", "--model.pretrained", str(args.model), "--data.predict", str(args.folder / "questions.jsonl"),
        "--data.max_tiles", str(args.max_tiles), "--data.num_workers", str(args.workers), *length,
        "--trainer.precision", "bf16-mixed", "--trainer.logger", "false", "--predictions.file", str(answers),
        "--model.compile", str(args.compile).lower(), *watch, *accelerator(args),
    ]  # fmt: skip
    if main(command):
        sys.exit("ivl predict failed, see above")
    return json.loads(measured.read_text()) | {"rows": len(answers.read_text().splitlines())}


def accelerator(args: argparse.Namespace) -> list[str]:
    """Return the option that keeps a trainer on the CPU, where that is asked for."""
    return ["--trainer.accelerator", "cpu"] if args.device == "cpu" else []


# -- the table -------------------------------------------------------------------------------------------------------

SIDES = {"fit": fit, "trainer": train_with_transformers, "predict": predict, "generate": generate_with_transformers}


def measure(side: str, argv: list[str], args: argparse.Namespace) -> dict[str, Any] | str:
    """Run a side in a process of its own. Returns its figures, or the last line of its error."""
    log, result = args.folder / f"{side}.log", args.folder / f"{side}.result.json"
    result.unlink(missing_ok=True)
    with log.open("w") as out:
        command = [sys.executable, __file__, *argv, "--side", side]
        status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if status or not result.is_file():
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        return f"status {status}: {' '.join(last)[:200]} (all of it: {log})"
    return json.loads(result.read_text())


def planned(args: argparse.Namespace) -> float | None:
    """Return the peak in GB that `ivl plan` predicts, or None where it predicts none."""
    command = [sys.executable, "-m", "ivl", "plan", *options(args), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout)["memory"]["total"] / 1e9 if done.returncode == 0 else None


def table(argv: list[str], args: argparse.Namespace) -> None:
    """Measure all sides of the stages, and print their tables."""
    for stage, (ours, theirs) in (("train", ("fit", "trainer")), ("predict", ("predict", "generate"))):
        if stage not in args.stages:
            continue
        found = {side: measure(side, argv, args) for side in (ours, theirs)}
        print(f"\n| {stage} | rows/s | tokens/s | times | MFU | peak memory, GB | loss |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for side, result in found.items():
            if isinstance(result, str):
                print(f"| {side} | {result} | | | | | |", flush=True)
                continue
            rate, base = result["rows"] / result["seconds"], found[theirs]
            times = "" if isinstance(base, str) else f"{rate / (base['rows'] / base['seconds']):.2f}"
            tokens = result["tokens"] or result["rows"] * args.new
            cells = [f"{rate:.4g}", f"{tokens / result['seconds']:.4g}", times]
            cells.append(f"{result['mfu']:.1%}" if result.get("mfu") else "")
            cells.append(f"{result['peak']:.2f}")
            cells.append(f"{result['loss']:.4g}" if "loss" in result else "")
            print(f"| {side} | {' | '.join(cells)} |", flush=True)
    if "train" in args.stages and (gigabytes := planned(args)) is not None:
        print(f"\n`ivl plan` predicts a peak of {gigabytes:.2f} GB for the training.")


def main() -> None:
    """Read the options, write what is missing, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="internvl2-2b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stages", nargs="+", choices=("train", "predict"), default=["train", "predict"])
    parser.add_argument("--recipe", choices=("lora", "full"), default="lora")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--max_tiles", type=int, default=6)
    parser.add_argument("--pack", type=int, default=8192, help="tokens of a pack")
    parser.add_argument("--batch", type=int, default=4, help="rows of a padded batch of the Trainer")
    parser.add_argument("--answer_batch", type=int, default=32, help="rows of a batch of `generate`")
    parser.add_argument("--steps", type=int, default=35)
    parser.add_argument("--warm", type=int, default=10, help="steps that do not count")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--checkpointing", action="store_true", help="of the language model, on both sides")
    parser.add_argument("--compile", action="store_true", help="model.compile of this program")
    parser.add_argument("--cap", type=float, metavar="GB", help="memory of the card that training may take")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ivl-gpu-run"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("more", nargs="*", help="after --: further options of `ivl fit`")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is found here; --device cpu --size tiny tries the script")
    try:
        raw_config(args.size)
    except ValueError as error:
        parser.error(str(error))
    args.folder = args.folder / f"{args.size}-{args.rows}"
    args.model, args.hf = args.folder / "model", args.folder / "model-hf"
    if args.side:
        if args.cap:
            share = args.cap * 1e9 / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        write_json(args.folder / f"{args.side}.result.json", SIDES[args.side](args))
        return
    write_rows(args.folder, args.rows)
    write_twin(args.hf, write(args.model, args.size, dtype="bfloat16", device=args.device))
    print(f"{machine(torch.device(args.device))}. {args.size}, {args.recipe}; {' '.join(sys.argv[1:])}", flush=True)
    table(sys.argv[1:], args)


if __name__ == "__main__":
    main()
