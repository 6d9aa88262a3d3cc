"""Seconds, memory and losses of training steps: ours, and transformers' InternVL with Trainer and peft.

python benchmarks/train_step.py [--size 60m|moe] [--recipe lora] [--steps 12] [--repeats 3] [--profile FILE]

The same random weights (through `ivl export --layout hf`), rows, order, batches of 4, optimizer and LoRA start. Every
measurement is a process of its own; sides alternate. Rows have 1 to 3 pictures of up to `--max_tiles` tiles each and
texts of mixed lengths. Pictures are opened and tiled by our processor on both sides, so that the step is compared; a
warm feature cache is filled by a run before. `--profile`: also a torch profiler summary of one of our steps.

`--peer ms-swift` and `--peer llamafactory` let these take turns with the two sides, each in the environment that
`python tests/judges/make_env.py NAME` makes (benchmarks/peers); `--peer NAME=COMMAND` any other, such as

    --peer "mine=python peer.py {model} {rows} {steps} {max_tiles} {threads}"

COMMAND is split as a shell does, without a shell. {model} and {hf} are checkpoints in the released layout and in
transformers', {rows} the JSON lines, {recipe} lora or full, {dropout} the LoRA's, 0 where losses are compared; a brace
of its own is doubled. It trains on the rows in order, in batches of 4, and prints as its last line {"times": [...],
"losses": [...]}: `time.perf_counter()` before the first step and after each, and each step's loss. Peak memory in GB is
`peak_gb` where it is given, else the largest resident set of the process and those it waited for, and of no less than
this one. benchmarks/README.md has a whole one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

BATCH, RATE = 4, 1e-3
LORA = {"rank": 16, "alpha": 32, "dropout": 0.05}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORDS = "the picture shows a small red thing and a large blue one what is it how many are there read what is written"


def write_rows(folder: Path, count: int) -> Path:
    """`count` rows of pictures and texts of mixed sizes, the same each time.

    Drawn so that in batches of 4 with up to 6 tiles a picture two thirds of the padded positions are tokens, and one in
    fifteen of these is supervised, as in common instruction data.
    """
    import numpy as np
    from PIL import Image

    path = folder / "rows.jsonl"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(2)
    lines, words = [], WORDS.split()
    for n in range(count):
        images = []
        for k in range(int(draw.choice([1, 2, 3], p=[0.55, 0.25, 0.2]))):
            width, height = (int(side) for side in np.exp(draw.uniform(np.log(100), np.log(1000), 2)))
            small = draw.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
            Image.fromarray(small).resize((width, height)).save(folder / f"{n}_{k}.jpg")
            images.append(f"{n}_{k}.jpg")
        asked = " ".join(draw.choice(words, int(np.clip(draw.lognormal(np.log(40), 1.0), 3, 300))))
        said = " ".join(draw.choice(words, int(np.clip(draw.lognormal(np.log(17), 0.8), 2, 120))))
        lines.append(json.dumps({"query": "<image>" * len(images) + asked, "response": said, "images": images}))
    path.write_text("\n".join(lines) + "\n")
    return path


def counted(args: argparse.Namespace) -> tuple[float, float, float, float | None]:
    """Of the positions of padded batches those that are tokens, and of these the supervised ones; how many times the
    operations of our step a padded step takes that makes all logits, and of ours with kept features (LoRA)."""
    from ivl.architecture.config import Config
    from ivl.data.processor import Processor
    from ivl.data.sets.dataset import RowDataset
    from ivl.estimate.flops import Work, costs
    from ivl.estimate.training_step import TrainSetup
    from ivl.options import LoRA, Tune

    read = RowDataset(args.rows, Processor.from_pretrained(args.model, max_tiles=args.max_tiles))
    examples = [read[n] for n in range(len(read))]
    config, lora = Config.load(args.model), args.recipe == "lora"
    setup = TrainSetup(Tune(language_model=LoRA(LORA["rank"])) if lora else Tune(*["full"] * 5))
    our_costs, their_costs = costs(config, setup), costs(config, replace(setup, efficient=False), chunk=2**30)
    theirs = ours = kept = 0.0
    tokens = padded = supervised = 0
    for n in range(0, len(examples), BATCH):
        batch = examples[n : n + BATCH]
        lengths, longest = [len(example) for example in batch], max(len(example) for example in batch)
        tiles, learnt = sum(len(x.tiles) for x in batch), sum(x.num_supervised for x in batch)
        tokens, supervised, padded = tokens + sum(lengths), supervised + learnt, padded + BATCH * longest
        # torch's attention with a mask computes all pairs, without one those that are not in the future
        all_of_it = Work(tiles, BATCH * longest, BATCH * longest**2, BATCH * longest)
        needed = Work(tiles, sum(lengths), sum(length**2 for length in lengths) // 2, learnt)
        theirs += their_costs.total(all_of_it)
        ours, kept = ours + our_costs.total(needed), kept + our_costs.total(replace(needed, tiles=0))
    return tokens / padded, supervised / tokens, theirs / ours, theirs / kept if lora else None


def same_start(model: torch.nn.Module) -> None:
    """LoRA weights that depend on the layer's name alone, whoever made the layers."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            layer = ".".join(re.search(r"layers\.(\d+)\.(\w+)\.(\w+)", name).groups())
            generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
            bound = parameter.shape[1] ** -0.5
            with torch.no_grad():
                parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)


def timed_fit(module: Any, data: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Fit a LitInternVL on IvlData for `args.steps` steps. Returns the time of each, from the first on, and the losses.

    `args.profile`: file for a profile of the third step.
    """
    from lightning.pytorch import Callback, Trainer

    times, losses = [], []

    class Watch(Callback):
        def on_train_start(self, trainer, module):
            same_start(module.model)
            self.profiler = None
            times.append(time.perf_counter())

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(float(trainer.callback_metrics["train/loss"]))
            times.append(time.perf_counter())
            if args.profile and len(times) == 3:
                self.profiler = torch.profiler.profile(profile_memory=True)
                self.profiler.start()
            elif self.profiler is not None:
                self.profiler.stop()
                table = self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
                Path(args.profile).write_text(table + "\n")
                self.profiler = None

    trainer = Trainer(
        accelerator="cpu", max_steps=args.steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Watch()], use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return {"times": times, "losses": losses}


def ours(args: argparse.Namespace) -> dict[str, Any]:
    from ivl.lit.datamodule import IvlData
    from ivl.lit.module import LitInternVL
    from ivl.lit.schedule import Warmup
    from ivl.options import LoRA, Tune

    lora = LoRA(LORA["rank"], LORA["alpha"], 0.0 if args.no_dropout else LORA["dropout"])
    tune = Tune("frozen", "frozen", lora) if args.recipe == "lora" else Tune("full", "full", "full")

    module = LitInternVL(
        str(args.model),
        tune,
        optimizer=optimizer,
        schedule=lambda o, total_steps: Warmup(o, total_steps, 0, "constant"),
    )
    data = IvlData(
        str(args.model), train=str(args.rows), batch_size=BATCH, max_tiles=args.max_tiles, shuffle=False, num_workers=0,
        feature_cache=args.cache,
    )  # fmt: skip
    return timed_fit(module, data, args)


def theirs(args: argparse.Namespace) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import InternVLForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

    from ivl.data.processor import Processor
    from ivl.data.sets.dataset import RowDataset

    processor = Processor.from_pretrained(args.model, max_tiles=args.max_tiles)
    model = InternVLForConditionalGeneration.from_pretrained(f"{args.model}-hf", dtype=torch.float32)
    if args.recipe == "lora":
        dropout = 0.0 if args.no_dropout else LORA["dropout"]
        where = rf".*language_model.*\.({'|'.join(TARGETS)})"
        model = get_peft_model(
            model, LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], lora_dropout=dropout, target_modules=where)
        )
    same_start(model)
    times, losses = [], []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

        def on_log(self, arguments, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                losses.append(float(logs["loss"]))

    def collate(examples: list) -> dict[str, torch.Tensor]:
        batch = processor.collate(examples)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask.long(),
            "labels": batch.labels,
            "pixel_values": processor.pixel_values(batch.tiles),
        }

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    settings = TrainingArguments(
        output_dir=str(args.rows.parent / "trainer"), per_device_train_batch_size=BATCH, max_steps=args.steps,
        logging_steps=1, save_strategy="no", report_to=[], lr_scheduler_type="constant", learning_rate=RATE,
        max_grad_norm=0.0, use_cpu=True, remove_unused_columns=False, dataloader_num_workers=0, disable_tqdm=True,
    )  # fmt: skip
    rows = RowDataset(args.rows, processor)
    trained = optimizer([p for p in model.parameters() if p.requires_grad])
    trainer = InOrder(
        model, settings, data_collator=collate, train_dataset=rows, callbacks=[Watch()], optimizers=(trained, None)
    )
    trainer.train()
    return {"times": times, "losses": losses}


def measure(args: argparse.Namespace, side: str, *more: str) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--model", str(args.model), "--rows", str(args.rows)]
    for name in ("recipe", "steps", "max_tiles", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run([*command, *more], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


PLACES = ("model", "hf", "rows", "steps", "max_tiles", "threads", "recipe", "dropout")
"""What a peer's command may name"""

HERE = Path(__file__).resolve().parent
PEERS = {"ms-swift": "ms_swift.py", "llamafactory": "llama_factory.py"}
"""Frameworks with a side in benchmarks/peers, by the name of their environment (tests/judges/make_env.py)"""


def peer_of(text: str) -> tuple[str, list[str]]:
    """NAME=COMMAND, or a name of PEERS, as a name and the words of a template. Raises ArgumentTypeError for what cannot
    be filled in, and for an environment that is not made."""
    if text in PEERS:
        python = Path(os.environ.get("IVL_JUDGES", HERE.parent / ".judges")) / text / "bin" / "python"
        if not python.is_file():
            raise argparse.ArgumentTypeError(f"{text}: no {python}; python tests/judges/make_env.py {text} makes it")
        places = ("hf", "rows", "steps", "max_tiles", "threads", "recipe", "dropout")
        return text, [str(python), str(HERE / "peers" / PEERS[text]), *(f"{{{place}}}" for place in places)]
    name, equals, command = text.partition("=")
    try:
        words = shlex.split(command)
        for word in words:
            word.format_map(dict.fromkeys(PLACES, ""))
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        known = ", ".join(f"{{{place}}}" for place in PLACES)
        raise argparse.ArgumentTypeError(f"{text!r}: expected {known} and no other braces, found {error}") from None
    if not (name and equals and words):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=COMMAND")
    return name, words


def peer(args: argparse.Namespace, name: str, words: list[str], dropout: float = LORA["dropout"]) -> dict[str, Any]:
    """One run of a peer, in a process of its own. Exits with what it said where it does not keep to the contract."""
    values = {place: getattr(args, place, None) for place in PLACES} | {"hf": f"{args.model}-hf", "dropout": dropout}
    command = [word.format_map(values) for word in words]
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process:
            printed = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if process.returncode:
            sys.exit(f"--peer {name}: exit status {process.returncode}\n{said.read()[-3000:]}")
    last = (printed.strip().splitlines() or [""])[-1]
    try:
        found = json.loads(last)
        counts = len(found["times"]), len(found["losses"])
    except (ValueError, KeyError, TypeError):
        sys.exit(f'--peer {name}: expected {{"times": [...], "losses": [...]}} as its last line, found {last[:200]!r}')
    if counts != (args.steps + 1, args.steps):
        sys.exit(f"--peer {name}: expected {args.steps + 1} times and {args.steps} losses, found {counts}")
    return {"peak_gb": used.ru_maxrss / 1e6} | found


def steps_of(run: dict[str, Any]) -> list[float]:
    """Seconds of each step but the first."""
    return [b - a for a, b in zip(run["times"][1:], run["times"][2:])]


def table(args: argparse.Namespace) -> None:
    cache = str(args.rows.parent / f"cache-{args.size}-{args.max_tiles}")
    sides: dict[str, tuple[str, ...]] = {"theirs": ("theirs",), "ours": ("ours",)}
    if args.recipe == "lora":
        measure(args, "ours", "--cache", cache)  # fills it
        sides["ours, features kept"] = ("ours", "--cache", cache)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, (side, *more) in sides.items():
            found[name].append(measure(args, side, *more))
        for name, words in args.peer:
            found.setdefault(name, []).append(peer(args, name, words))
    curves: dict[str, list[float]] = {}
    if not args.no_curves:
        curves = {side: measure(args, side, "--no_dropout")["losses"] for side in ("theirs", "ours")}
        curves |= {name: peer(args, name, words, 0.0)["losses"] for name, words in args.peer}
    import peft
    import transformers

    print(
        f"\n{args.size}, {args.recipe}, batch {BATCH}, up to {args.max_tiles} tiles, fp32, {args.threads} threads, ",
        end="",
    )
    tokens, supervised, *operations = counted(args)
    print(f"{tokens:.0%} of padded positions are tokens, {supervised:.1%} of these supervised, ", end="")
    print(f"{args.steps} steps x {args.repeats}, first left out; torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, peft {peft.__version__}, {platform.machine()}")
    print("\n| side | samples/s, median | least and most | times as fast, step by step | peak memory, GB | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    base = found["theirs"]
    memory_of_base = statistics.median(run["peak_gb"] for run in base)
    for name, runs in found.items():
        rates = sorted(BATCH / seconds for run in runs for seconds in steps_of(run))
        # the same step of the same repeat, so that a machine whose speed drifts does not count
        faster = [a / b for other, run in zip(base, runs) for a, b in zip(steps_of(other), steps_of(run))]
        memory = statistics.median(run["peak_gb"] for run in runs)
        print(f"| {name} | {statistics.median(rates):.3g} | {rates[0]:.3g} to {rates[-1]:.3g} | ", end="")
        print(f"{statistics.median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f}) | ", end="")
        print(f"{memory:.2f} | {memory / memory_of_base:.2f} |")
    ratios = ", with kept features ".join(f"{ratio:.2f}" for ratio in operations if ratio)
    print(f"\nOperations of a padded step with all logits, over those of ours: {ratios}.")
    for name in list(curves)[1:]:
        gaps = [abs(a - b) / abs(a) for a, b in zip(curves["theirs"], curves[name])]
        print(f"\nLosses without dropout of {name} differ from theirs by at most {max(gaps):.1e}, relative, ", end="")
        print(f"over {len(gaps)} steps; of the first step by {gaps[0]:.1e}.")
    if args.peer:
        means = (f"{name} {statistics.mean(run['losses'][-1] for run in runs):.4g}" for name, runs in found.items())
        print(f"\nLosses of the last step, with the recipe's dropout, mean of the repeats: {', '.join(means)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="60m")
    parser.add_argument("--recipe", choices=("lora", "full"), default="lora")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max_tiles", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ivl-train-step"))
    parser.add_argument("--profile", metavar="FILE")
    parser.add_argument("--no_curves", action="store_true", help="do not compare losses")
    parser.add_argument(
        "--peer", type=peer_of, action="append", default=[], metavar="NAME[=COMMAND]", help="see the head of this file"
    )
    for name in ("--side", "--cache"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--model", "--rows"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--no_dropout", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    taken = ["theirs", "ours", "ours, features kept", *(name for name, _ in args.peer)]
    if len(set(taken)) < len(taken):
        parser.error(f"--peer: names must differ, and from {', '.join(taken[:3])}")
    if args.side:
        torch.set_num_threads(args.threads)
        found = {"ours": ours, "theirs": theirs}[args.side](args)
        print(json.dumps(found | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from models import write, write_twin

    args.model = write(args.folder / args.size, args.size)
    write_twin(args.folder / f"{args.size}-hf", args.model)
    args.rows = write_rows(args.folder / f"mixed-{args.steps}", args.steps * BATCH)
    if args.profile:
        measure(args, "ours", "--profile", args.profile)
    table(args)


if __name__ == "__main__":
    main()
