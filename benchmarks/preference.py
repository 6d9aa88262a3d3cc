"""Seconds, memory and losses of preference steps: ours, and TRL's DPOTrainer with peft on transformers' InternVL.

    python benchmarks/preference.py [--shape 6_tiles|1_tile|text] [--objective mpo|dpo] [--trl_python PYTHON]

The same random weights (through `ivl export --layout hf`), pairs, order, batches of 2 pairs, tokens, optimizer and LoRA
start; no dropout, which TRL turns off. Every measurement is a process of its own; sides alternate. PYTHON is an
interpreter with trl 1.16 and datasets beside what ivl needs. Pictures are opened and tiled by our processor on both
sides, so that the step is compared. The losses of every step must agree. So the chosen answers of a batch have equally
many tokens (TRL averages `sft` over the tokens of a batch, we over the pairs), and the mean of rewards is left out
(`shift: none`), as TRL does.

TRL's sides: its reference computed in each step; computed before training (refused with pictures: its data set is given
no column of pictures here, so that it does), which the steps' time leaves out; with activation checkpointing, TRL's
default. The shapes are one picture of 6 tiles and a thumbnail, or of 1 tile, with answers of about 100 tokens, and text
alone with answers of about 300. `--profile FILE`: a torch profiler summary of one of our steps as well.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from train_step import LORA, TARGETS, optimizer, same_start, steps_of, timed_fit

PAIRS, BETA, TOLERANCE = 2, 0.1, 1e-4
SHAPES = {"6_tiles": ((900, 600), 6, 40, 100), "1_tile": ((600, 600), 1, 40, 100), "text": (None, 1, 150, 300)}
"""Name → size of the picture, most tiles, words of the question, words of an answer"""
SIDES = {
    "trl": ("theirs",),
    "trl, reference before": ("theirs", "--precompute"),
    "trl, checkpointing": ("theirs", "--checkpointing"),
    "ours": ("ours",),
    "ours, checkpointing": ("ours", "--checkpointing"),
}
WORDS = "0 1 2 3 4 5 6 7 8 9 How Read What a are in is it many picture the there what words written"
"""Words that are one token each behind a blank"""


def write_pairs(folder: Path, shape: str, count: int) -> Path:
    """`count` pairs of a shape, the same each time; answers of 0.6 to 1.4 times its words."""
    import numpy as np
    from PIL import Image

    size, _, asked, answered = SHAPES[shape]
    path = folder / "pairs.jsonl"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    draw, lines = np.random.default_rng(4), []
    for n in range(count):
        if n % PAIRS == 0:
            chosen = int(draw.uniform(0.6, 1.4) * answered)
        lengths = int(draw.uniform(0.5, 1.5) * asked), chosen, int(draw.uniform(0.6, 1.4) * answered)
        query, *answers = (" ".join(["the", *draw.choice(WORDS.split(), length)]) for length in lengths)
        row = {"query": query, "response": answers[0], "rejected_response": answers[1]}
        if size is not None:
            small = draw.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
            Image.fromarray(small).resize(size).save(folder / f"{n}.jpg")
            row |= {"query": "<image>" + query, "images": [f"{n}.jpg"]}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


def ours(args: argparse.Namespace) -> dict[str, Any]:
    from ivl.finetune.objectives import DPO, MPO, Preference
    from ivl.lit.datamodule import IvlData
    from ivl.lit.module import LitInternVL
    from ivl.lit.schedule import Warmup
    from ivl.options import Checkpointing, LoRA, Tune

    objective = Preference(mpo=MPO(BETA, shift="none")) if args.objective == "mpo" else Preference(dpo=DPO(BETA))
    module = LitInternVL(
        str(args.model),
        Tune("frozen", "frozen", LoRA(LORA["rank"], LORA["alpha"], 0.0)),
        objective=objective,
        optimizer=optimizer,
        schedule=lambda o, total_steps: Warmup(o, total_steps, 0, "constant"),
        checkpointing=Checkpointing(language_model=args.checkpointing),
    )
    data = IvlData(
        str(args.model), train=str(args.rows), batch_size=PAIRS, max_tiles=SHAPES[args.shape][1], shuffle=False,
        num_workers=0,
    )  # fmt: skip
    return timed_fit(module, data, args)


def theirs(args: argparse.Namespace) -> dict[str, Any]:
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, InternVLForConditionalGeneration, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from ivl.data.processor import Processor
    from ivl.data.sets.dataset import RowDataset
    from ivl.types import IGNORE

    processor = Processor.from_pretrained(args.model, max_tiles=SHAPES[args.shape][1])
    processor.pairs = True
    rows = RowDataset(args.rows, processor)
    model = InternVLForConditionalGeneration.from_pretrained(f"{args.model}-hf", dtype=torch.float32)
    times, losses = [], []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

        def on_log(self, arguments, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                losses.append(float(logs["loss"]))

    def collate(numbers: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = processor.collate([rows[row["number"]] for row in numbers])
        order = [*range(0, len(batch), 2), *range(1, len(batch), 2)]  # TRL has all chosen answers first
        inputs = {
            "input_ids": batch.input_ids[order],
            "attention_mask": batch.attention_mask[order].long(),
            "completion_mask": (batch.labels != IGNORE).long()[order],
        }
        if batch.tile_index is not None:
            tiles = processor.pixel_values(batch.tiles)[batch.tile_index].split(batch.tiles_per_row.tolist())
            inputs["pixel_values"] = torch.cat([tiles[n] for n in order])
        kept = [key for key in ("ref_chosen_logps", "ref_rejected_logps") if key in numbers[0]]
        return inputs | {key: torch.tensor([row[key] for row in numbers]) for key in kept}

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    kinds = {"mpo": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]), "dpo": (["sigmoid"], [1.0])}
    loss_type, loss_weights = kinds[args.objective]
    settings = DPOConfig(
        output_dir=str(args.rows.parent / "trainer"), per_device_train_batch_size=PAIRS, max_steps=args.steps,
        logging_steps=1, save_strategy="no", report_to=[], lr_scheduler_type="constant", max_grad_norm=0.0,
        use_cpu=True, bf16=False, remove_unused_columns=False, dataloader_num_workers=0, disable_tqdm=True,
        gradient_checkpointing=args.checkpointing, precompute_ref_log_probs=args.precompute, max_length=None,
        beta=BETA, loss_type=loss_type, loss_weights=loss_weights,
    )  # fmt: skip
    names = {"number": list(range(len(rows)))} | {name: [name] * len(rows) for name in ("prompt", "chosen", "rejected")}
    trainer = InOrder(
        model, args=settings, data_collator=collate, train_dataset=Dataset.from_dict(names), callbacks=[Watch()],
        processing_class=AutoTokenizer.from_pretrained(f"{args.model}-hf"),
        peft_config=LoraConfig(
            r=LORA["rank"], lora_alpha=LORA["alpha"], lora_dropout=0.0,
            target_modules=rf".*language_model.*\.({'|'.join(TARGETS)})",
        ),
    )  # fmt: skip
    same_start(trainer.model)
    trainer.optimizer = optimizer([p for p in trainer.model.parameters() if p.requires_grad])
    trainer.train()
    return {"times": times, "losses": losses, "trl": trl.__version__}


def measure(args: argparse.Namespace, side: str, *more: str) -> dict[str, Any]:
    """One side in a process of its own."""
    python = args.trl_python if side == "theirs" else sys.executable
    command = [python, __file__, "--side", side, "--model", str(args.model), "--rows", str(args.rows)]
    for name in ("shape", "objective", "steps", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run([*command, *more], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(args: argparse.Namespace) -> None:
    import peft
    import transformers

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.sides}
    for _ in range(args.repeats):
        for name in args.sides:
            found[name].append(measure(args, *SIDES[name]))
    base = found["trl"]
    gap = max(
        abs(a - b) / abs(a) for runs in found.values() for run in runs for a, b in zip(base[0]["losses"], run["losses"])
    )
    if not gap < TOLERANCE:
        sys.exit(f"losses differ by {gap:.1e}: {[runs[0]['losses'] for runs in found.values()]}")
    print(
        f"\n{args.size}, {args.shape}, {args.objective}, LoRA of rank {LORA['rank']}, batches of {PAIRS} pairs, fp32, "
        f"{args.threads} threads, {args.steps} steps x {args.repeats}, first left out; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}, trl {base[0]['trl']}, {platform.machine()}"
    )
    print("\n| side | pairs/s, median | least and most | times as fast, step by step | peak memory, GB | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    memory_of_base = statistics.median(run["peak_gb"] for run in base)
    for name, runs in found.items():
        rates = sorted(PAIRS / seconds for run in runs for seconds in steps_of(run))
        # the same step of the same repeat, so that a machine whose speed drifts does not count
        faster = [a / b for other, run in zip(base, runs) for a, b in zip(steps_of(other), steps_of(run))]
        memory = statistics.median(run["peak_gb"] for run in runs)
        print(f"| {name} | {statistics.median(rates):.3g} | {rates[0]:.3g} to {rates[-1]:.3g} | ", end="")
        print(f"{statistics.median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f}) | ", end="")
        print(f"{memory:.2f} | {memory / memory_of_base:.2f} |")
    print(f"\nLosses of all steps differ by at most {gap:.1e}, relative.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="60m")
    parser.add_argument("--shape", choices=SHAPES, default="6_tiles")
    parser.add_argument("--objective", choices=("mpo", "dpo"), default="mpo")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=list(SIDES))
    parser.add_argument("--trl_python", metavar="PYTHON", default=sys.executable, help="interpreter that has trl")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ivl-preference"))
    parser.add_argument("--profile", metavar="FILE")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    for name in ("--model", "--rows"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    for name in ("--precompute", "--checkpointing"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        torch.set_num_threads(args.threads)
        found = {"ours": ours, "theirs": theirs}[args.side](args)
        print(json.dumps(found | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
        return
    if "trl" not in args.sides:
        parser.error("--sides: trl is what the others are compared with; name it too")
    from models import write, write_twin

    args.model = write(args.folder / args.size, args.size)
    write_twin(args.folder / f"{args.size}-hf", args.model)
    args.rows = write_pairs(args.folder / f"{args.shape}-{args.steps}", args.shape, args.steps * PAIRS)
    if args.profile:
        measure(args, "ours", "--profile", args.profile)
    table(args)


if __name__ == "__main__":
    main()
