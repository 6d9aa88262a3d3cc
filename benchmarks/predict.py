"""Rows answered per second on a CPU: this package's engine, and transformers' `generate` on its own InternVL class.

    python benchmarks/predict.py                        # the 60 M model; --size tiny for the small one

Same weights (exported with `--layout hf`), same rows in the same order, pixels ready beforehand for both. Answers have
mixed lengths: random weights hardly ever stop, so every row is given a limit drawn once (log-normal, as short answers
and descriptions mix in practice), which both obey row by row. All contenders run in turn in one process, several times
over, after a round that is not counted (a step is compiled in it); each one's time is its median. That all give the
same answers is checked. Peak memory is that of a process in which one contender runs alone, less what it had when the
model was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from models import write, write_twin
from transformers import AutoModelForImageTextToText, StoppingCriteriaList
from transformers import StoppingCriteria as TransformersCriteria

from ivl.inference.engine import Engine
from ivl.inference.graphs import StepRunner
from ivl.inference.request import Request
from ivl.inference.sampling import StoppingCriteria
from ivl.model.internvl import InternVL
from ivl.model.vision import normalize
from ivl.options import Batching

Answers = list[list[int]]


@dataclass
class Row:
    input_ids: torch.Tensor
    """(T,)"""
    tiles: torch.Tensor
    """(N, 3, S, S) uint8"""
    limit: int
    """Length of its answer"""


def make_rows(model: InternVL, count: int, longest: int, seed: int = 0) -> list[Row]:
    """A third text only, a third one tile, a third three tiles; questions of 20 to 120 tokens."""
    draw = torch.Generator().manual_seed(seed)
    size, rows = model.config.image_size, []
    for n in range(count):
        tiles = (0, 1, 3)[n % 3]
        ids = torch.randint(0, 256, (int(torch.randint(20, 121, (), generator=draw)),), generator=draw)
        image = torch.full((tiles * model.config.tokens_per_tile,), model.image_token_id)
        length = torch.empty(()).log_normal_(3.4, 1.0, generator=draw)
        pixels = torch.randint(0, 256, (tiles, 3, size, size), dtype=torch.uint8, generator=draw)
        rows.append(Row(torch.cat([ids[:5], image, ids[5:]]), pixels, int(length.clamp(1, longest))))
    return rows


def ours(model: InternVL, rows: list[Row], batch: int, runner: StepRunner | None = None) -> Answers:
    engine = Engine(model, StoppingCriteria(), batching=Batching(rows=batch), runner=runner)
    # As `predict` has it: longest prompts first.
    for n in sorted(range(len(rows)), key=lambda n: -len(rows[n].input_ids)):
        engine.submit(Request(n, rows[n].input_ids, rows[n].tiles, rows[n].limit))
    found = {request.key: request.answer for request in engine.run()}
    return [found[n] for n in range(len(rows))]


class Limits(TransformersCriteria):
    """Ends each row at its own length."""

    def __init__(self, prompt: int, limits: list[int]) -> None:
        self.ends = torch.tensor([prompt + limit for limit in limits])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


@torch.no_grad()
def theirs(model: torch.nn.Module, rows: list[Row], batch: int, by_length: bool) -> Answers:
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n].input_ids)) if by_length else range(len(rows))
    order, answers = list(order), [[] for _ in rows]
    for first in range(0, len(order), batch):
        part = [rows[n] for n in order[first : first + batch]]
        longest = max(len(row.input_ids) for row in part)
        ids = torch.stack([torch.nn.functional.pad(row.input_ids, (longest - len(row.input_ids), 0)) for row in part])
        mask = torch.stack([torch.arange(longest) >= longest - len(row.input_ids) for row in part]).long()
        pixels = normalize(torch.cat([row.tiles for row in part]))
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **({"pixel_values": pixels} if len(pixels) else {}),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            max_new_tokens=max(row.limit for row in part),
            stopping_criteria=StoppingCriteriaList([Limits(longest, [row.limit for row in part])]),
        )
        for n, new in zip(order[first : first + batch], made[:, longest:].tolist()):
            answers[n] = new[: rows[n].limit]
    return answers


def contenders(
    folder: Path, size: str, batches: list[int]
) -> tuple[InternVL, dict[str, Callable[[list[Row]], Answers]]]:
    """Our model, and each contender by name."""
    base = write(folder / size, size)
    twin = write_twin(folder / f"{size}-hf", base)
    model = InternVL.from_pretrained(base)
    theirs_model = AutoModelForImageTextToText.from_pretrained(twin, dtype=torch.float32).eval()
    theirs_model.generation_config.eos_token_id = None
    made: dict[str, Callable[[list[Row]], Answers]] = {}
    for batch in batches:
        made[f"ivl, {batch} rows"] = lambda rows, batch=batch: ours(model, rows, batch)
        if batch > 1:  # the step compiled in the round that is not counted
            runner = StepRunner(model.language_model, model.device, compiled=True)
            made[f"ivl, {batch} rows, compiled step"] = lambda rows, batch=batch, runner=runner: ours(
                model, rows, batch, runner
            )
        made[f"transformers, batch {batch}"] = lambda rows, batch=batch: theirs(theirs_model, rows, batch, False)
        if batch > 1:
            made[f"transformers, batch {batch}, rows sorted by length"] = lambda rows, batch=batch: theirs(
                theirs_model, rows, batch, True
            )
    return model, made


def peak() -> int:
    """Bytes that this process ever had resident (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def measure_memory(options: argparse.Namespace, folder: Path, name: str) -> float:
    """Peak of a process that runs this contender alone, in MB above what it had before."""
    command = [sys.executable, __file__, "--folder", str(folder), "--size", options.size, "--rows", str(options.rows)]
    command += ["--longest", str(options.longest), "--alone", name, "--batches", *map(str, options.batches)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["bytes"] / 1e6


def table(options: argparse.Namespace, folder: Path) -> str:
    model, made = contenders(folder, options.size, options.batches)
    rows = make_rows(model, options.rows, options.longest)
    limits = sorted(row.limit for row in rows)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    cpu: dict[str, list[float]] = {name: [] for name in made}
    first: Answers | None = None
    differing: dict[str, int] = {}
    for turn in range(-1, options.rounds):  # the first is not counted: caches are filled and a step compiled in it
        for name, answer in made.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            answers = answer(rows)
            taken = time.perf_counter() - start, time.process_time() - start_cpu
            if turn >= 0:
                seconds[name].append(taken[0])
                cpu[name].append(taken[1])
            first = first or answers
            differing[name] = sum(a != b for a, b in zip(first, answers))
            print(f"{name}: {taken[0]:.1f} s, {taken[1]:.1f} s of CPU", file=sys.stderr, flush=True)
    prompts = [len(row.input_ids) for row in rows]
    about = (
        f"{options.size}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(rows)} rows, "
        f"prompts of {min(prompts)} to {max(prompts)} tokens, answers of {limits[0]} to {limits[-1]} (median "
        f"{statistics.median(limits):.0f}, mean {statistics.mean(limits):.0f}); {options.rounds} rounds, "
        f"{torch.get_num_threads()} thread(s)."
    )
    lines = [
        about,
        "",
        "| | s | s of CPU | rows/s | new tokens/s | peak MB above the model | rows answered otherwise |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in made:
        median, own = statistics.median(seconds[name]), statistics.median(cpu[name])
        memory = f"{measure_memory(options, folder, name):.0f}" if options.memory else "-"
        numbers = [f"{median:.2f}", f"{own:.2f}", f"{len(rows) / median:.2f}", f"{sum(limits) / median:.0f}", memory]
        lines.append("| " + " | ".join([name, *numbers, str(differing[name])]) + " |")
    for title, taken in (("wall clock", seconds), ("CPU time", cpu)):
        median = {name: statistics.median(values) for name, values in taken.items()}
        best = {who: min((n for n in median if n.startswith(who)), key=median.get) for who in ("ivl", "transformers")}
        ratio = median[best["transformers"]] / median[best["ivl"]]
        text = f"By {title}: {best['ivl']} is {ratio:.2f} times as fast as {best['transformers']}, its best"
        if 1 in options.batches:
            text += f"; one row at a time {median['transformers, batch 1'] / median['ivl, 1 rows']:.2f} times"
        lines += ["", text + "."]
    return "\n".join(lines)


def machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].partition(": ")[2] if names else platform.processor()
    return f"{os.cpu_count()} cores of {cpu}; torch {torch.__version__}, transformers {transformers.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="60m", choices=["60m", "tiny"])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--longest", type=int, default=256, help="longest answer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure memory too: each contender once more")
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept; default: a temporary folder")
    parser.add_argument("--alone", help="run this contender only and print what memory it took")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.alone:
        model, made = contenders(options.folder, options.size, options.batches)
        rows = make_rows(model, options.rows, options.longest)
        before = peak()
        made[options.alone](rows)
        print(json.dumps({"bytes": peak() - before}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{machine()}\n\n{table(options, options.folder or Path(scratch))}")


if __name__ == "__main__":
    main()
