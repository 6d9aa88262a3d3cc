"""What a card does, and how near to it training and decoding come: the shapes of released models, random weights.

    python benchmarks/gpu.py                                   # InternVL2-2B and 8B; some minutes on one GPU
    python benchmarks/gpu.py --device cpu --size tiny --tokens 256 --side 256 --buffer 0.01     # tries the script

Nothing is read or downloaded: weights are drawn on the device. First the card itself: bfloat16 matrix products (normal
random numbers; the best shape's median is the ceiling), and memory copied and read (the faster one's median is the
bandwidth). Then of each size:

- Decoding one row: seconds a token after the first, against the time to read the blocks' and the head's weights once
  at that bandwidth. The keys and values read besides are not in the bound.
- A training step as `LitInternVL` makes it in bf16-mixed: LoRA of rank 16 on the language model, tower and projector
  frozen, rows of text and pictures packed to `--tokens`, copied from pinned memory; forward, backward, the loss's
  denominator, the norm of the gradients, AdamW. A window is all `--packs` once, which differ in rows and tiles, and the
  device is waited for at its two ends alone. With the tower, and with its features kept; as it is, and compiled.

Model FLOP utilisation (MFU): the operations that the model asks for (`ivl.estimate.flops.model_costs`: nothing twice,
and attention over all pairs of a row), over the median window, over the ceiling. What does not fit says so, and the
rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from models import raw_config

from ivl.architecture.config import Config
from ivl.data.collate import collate
from ivl.estimate import flops
from ivl.finetune import tune as tuning
from ivl.lit.training.loss_normalizer import LOSS_UNIT, scale, total_norm
from ivl.model.efficient.compile import compile_layers
from ivl.model.internvl import InternVL
from ivl.options import LoRA, Tune
from ivl.types import IGNORE, Batch, Conversation, Example

TUNE = Tune("frozen", "frozen", LoRA(rank=16))
TILES, TEXT = (0, 1, 3, 7), (64, 384)
"""Of a row: one of these numbers of tiles; at least and less than so many tokens of text, a third of them supervised"""
WARM = 2
"""Windows before those that are measured"""


@dataclass(frozen=True)
class Card:
    """What was measured of the device alone."""

    flops: float
    """bfloat16 matrix products, operations per second"""
    bandwidth: float
    """Bytes per second"""


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each repeat; the device is waited for before and after it."""
    found = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - start)
    return found


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def settled(work: Callable[[], object], device: torch.device, repeats: int, times: int = 30) -> float:
    """Median seconds of `work`, each repeat a window of `times` of it, after one that is not counted."""
    windows = timed(lambda: [work() for _ in range(times)] and None, device, repeats + 1)
    return statistics.median(windows[1:]) / times


# The card


def card(args: argparse.Namespace) -> Card:
    """Measure the device; prints a table."""
    device, side = args.device, args.side
    print("| the card alone | |\n| --- | --- |")
    rates = []
    for m, n, k in ((side, side, side), (side // 2, side, side // 2), (side // 2, 2 * side, side // 2)):
        x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
        weight = torch.randn(n, k, dtype=torch.bfloat16, device=device)
        rates.append(2 * m * n * k / settled(lambda x=x, w=weight: F.linear(x, w), device, args.repeats))
        print(f"| product of {m} x {k} and {k} x {n}, TFLOP/s | {rates[-1] / 1e12:.4g} |", flush=True)
    source = torch.ones(int(args.buffer * 1e9) // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / settled(lambda: target.copy_(source), device, args.repeats)
    read = source.nbytes / settled(source.sum, device, args.repeats)
    for name, rate in (("copied, read and write counted", copied), ("read (a sum)", read)):
        print(f"| {args.buffer:g} GB {name}, GB/s | {rate / 1e9:.4g} |")
    return Card(max(rates), max(copied, read))


# Rows


def example(config: Config, tiles: int, text: int, draw: torch.Generator) -> Example:
    """A row of that many tiles and tokens of text, the last third of which is the answer."""
    vocabulary, size = config.llm["vocab_size"], config.image_size
    ids = torch.randint(0, vocabulary - 1, (text,), generator=draw)
    image = torch.full((tiles * config.tokens_per_tile,), vocabulary - 1)
    ids = torch.cat([ids[:4], image, ids[4:]])
    labels = torch.full_like(ids, IGNORE)
    labels[-(text // 3) :] = ids[-(text // 3) :]
    pixels = torch.randint(0, 256, (tiles, 3, size, size), dtype=torch.uint8, generator=draw)
    return Example(ids, labels, pixels, [tiles] if tiles else [], Conversation(()))


def pack(config: Config, tokens: int, draw: torch.Generator) -> Batch:
    """Rows that fill so many tokens to the last."""
    rows, room = [], tokens
    while room:
        fitting = [n for n in TILES if n * config.tokens_per_tile + TEXT[0] <= room]
        tiles = fitting[int(torch.randint(len(fitting), (), generator=draw))] if fitting else 0
        left = room - tiles * config.tokens_per_tile
        text = int(torch.randint(*TEXT, (), generator=draw))
        text = left if left < text + TEXT[0] else text
        rows.append(example(config, tiles, text, draw))
        room -= len(rows[-1])
    return collate(rows, pad_id=0, packed=True, image_id=config.llm["vocab_size"] - 1)


def packs(config: Config, args: argparse.Namespace) -> list[Batch]:
    """The same ones each time, on the host."""
    draw = torch.Generator().manual_seed(0)
    made = [pack(config, args.tokens, draw) for _ in range(args.packs)]
    return [batch.pin_memory() for batch in made] if args.device.type == "cuda" else made


def with_features(batch: Batch, config: Config) -> Batch:
    """The pack as a warm feature cache brings it: no tiles, but what the projector made of them."""
    shape = int(batch.tiles_per_row.sum()), config.tokens_per_tile, config.llm["hidden_size"]
    features = torch.randn(shape, dtype=torch.bfloat16)
    features = features.pin_memory() if batch.input_ids.is_pinned() else features
    return replace(batch, tiles=batch.tiles[:0], features=features)


def asked(costs: flops.Costs, batch: Batch) -> float:
    """Operations that the model asks for in a training step."""
    lengths = batch.lengths.tolist()
    work = flops.Work(
        int(batch.tiles_per_row.sum()), sum(lengths), sum(n * n for n in lengths), len(batch.supervised_positions)
    )
    return costs.total(work if batch.features is None else replace(work, tiles=0))


# Training


def step(model: InternVL, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One optimizer step of one pack, as `LitInternVL` makes it."""
    batch = batch.to(model.device, non_blocking=True)
    with torch.autocast(model.device.type, torch.bfloat16):
        out = model(**batch)
    (out.loss_sum / LOSS_UNIT).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    scale(gradients, LOSS_UNIT / out.weight_sum.clamp(min=1))
    total_norm(gradients)
    optimizer.step()
    optimizer.zero_grad()


def train(model: InternVL, batches: list[Batch], args: argparse.Namespace) -> list[float]:
    """Seconds of each window."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=args.device.type == "cuda")

    def window() -> None:
        for batch in batches:
            step(model, optimizer, batch)

    try:
        timed(window, args.device, WARM)
        return timed(window, args.device, args.repeats)
    finally:
        optimizer.zero_grad()


def training(name: str, model: InternVL, batches: list[Batch], found: Card, args: argparse.Namespace) -> str:
    """A row of the table."""
    release(args.device)
    try:
        windows = sorted(seconds / len(batches) for seconds in train(model, batches, args))
    except torch.OutOfMemoryError:
        return f"| {name} | out of memory |" + " |" * 6
    seconds = statistics.median(windows)
    costs = flops.model_costs(model.config, TUNE)
    operations = sum(asked(costs, batch) for batch in batches) / len(batches)
    tokens, rows = (sum(counts) / len(batches) for counts in zip(*((b.num_tokens, len(b)) for b in batches)))
    cells = [f"{seconds:.4g}", f"{windows[0]:.4g} to {windows[-1]:.4g}", f"{tokens / seconds:.4g}"]
    cells += [f"{rows / seconds:.4g}", f"{operations / 1e12:.4g}", f"{100 * operations / seconds / found.flops:.4g} %"]
    return f"| {name} | {' | '.join(cells)} | {peak(args.device)} |"


def peak(device: torch.device) -> str:
    """GB that tensors took on the card at most."""
    return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f}" if device.type == "cuda" else "-"


# Decoding


def decoding(model: InternVL, found: Card, args: argparse.Namespace) -> str:
    """A row of the table."""
    release(args.device)
    language, draw = model.language_model, torch.Generator().manual_seed(0)
    read = (*language.model.layers.parameters(), *language.model.norm.parameters(), language.lm_head.weight)
    size = sum(p.nbytes for p in read)
    row = example(model.config, TILES[-1], TEXT[0], draw)
    prompt = collate([row], pad_id=0, image_id=model.image_token_id)
    each = []
    try:
        for _ in range(args.repeats + 1):
            answer = model.stream(prompt, max_new_tokens=args.answer, eos_ids=())
            next(answer)  # the prompt is read, the first token is on the host
            each.append(timed(lambda answer=answer: list(answer), args.device, 1)[0] / (args.answer - 1))
    except torch.OutOfMemoryError:
        return f"| {len(row)} | out of memory |" + " |" * 5
    seconds, bound = statistics.median(each[1:]), size / found.bandwidth
    cells = [f"{1 / seconds:.4g}", f"{1 / bound:.4g}", f"{seconds / bound:.4g}", f"{size / 1e9:.4g}"]
    spread = f"{1 / max(each[1:]):.4g} to {1 / min(each[1:]):.4g}"
    return f"| {len(row)} | {cells[0]} | {spread} | {' | '.join(cells[1:])} | {peak(args.device)} |"


# Kernels


def profile(model: InternVL, batches: list[Batch], file: Path, args: argparse.Namespace) -> None:
    """Write the kernels of 16 decoded tokens and of a window of training, after one without the profiler."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * (args.device.type == "cuda")
    by = "self_cuda_time_total" if args.device.type == "cuda" else "self_cpu_time_total"

    def table(name: str, work: Callable[[], object]) -> str:
        work()
        with torch.profiler.profile(activities=kinds) as found:
            seconds = timed(work, args.device, 1)[0]
        kernels = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.device_time for event in kernels) / 1e6
        head = f"{name}: {seconds:.4g} s under the profiler, {len(kernels)} kernels, the device busy for {busy:.4g} s"
        return head + "\n" + found.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=70) + "\n"

    model.eval()
    prompt = collate(
        [example(model.config, TILES[-1], TEXT[0], torch.Generator().manual_seed(0))], pad_id=0,
        image_id=model.image_token_id,
    )  # fmt: skip
    written = table("16 tokens", lambda: list(model.stream(prompt, max_new_tokens=16, eos_ids=())))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    written += table("training", lambda: [step(model, optimizer, batch) for batch in batches] and None)
    file.write_text(written)


# All of it


def size_of(name: str) -> Config:
    """Of a released model or of `models.py`. Raises ValueError for another name."""
    return Config.from_dict(raw_config(name))


def measure(name: str, found: Card, args: argparse.Namespace) -> None:
    """Decoding and training of one size; prints two tables."""
    config = size_of(name)
    torch.compiler.reset()  # what was compiled of the size before keeps it, and counts as versions of the same code
    release(args.device)
    try:
        image = config.llm["vocab_size"] - 1
        model = InternVL.from_config(config, "bfloat16", args.device, args.attention, image)
    except torch.OutOfMemoryError:
        print(f"\n{name}: its weights alone are out of memory")
        return
    count, kernel = sum(p.numel() for p in model.parameters()), model.language_model.config.attention
    print(f"\n{name}: {count / 1e9:.4g} G parameters, attention {kernel}\n")
    print(
        "| prompt, tokens | tokens/s, median | least and most | tokens/s at the bound | times the bound's time", end=""
    )
    print(" | GB of weights a token | peak memory, GB |\n| --- | --- | --- | --- | --- | --- | --- |")
    print(decoding(model, found, args), flush=True)
    tuning.apply(model, TUNE)
    model.set_checkpointing(False, args.checkpointing)
    model.features_projected = True  # as the cache of a frozen projector
    batches = packs(config, args)
    kept = [with_features(batch, config) for batch in batches]
    print("\n| training step | seconds, median | least and most | tokens/s | samples/s | TFLOP | MFU", end="")
    print(" | peak memory, GB |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
    for compiled in {"no": (False,), "yes": (True,), "both": (False, True)}[args.compile]:
        if compiled:
            compile_layers(model)
        for title, given in (("with the tower", batches), ("features kept", kept)):
            print(training(title + ", compiled" * compiled, model, given, found, args), flush=True)
    if args.profile:
        profile(model, batches, args.profile.with_stem(f"{args.profile.stem}-{Path(name).name}"), args)


def machine(device: torch.device) -> str:
    """Device, versions and commit."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    return (
        f"{name}; torch {torch.__version__}, CUDA {torch.version.cuda}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, commit {commit}"
    )


def about(args: argparse.Namespace) -> str:
    """What was run, on what."""
    again = "yes" if args.checkpointing else "no"
    return (
        f"{machine(args.device)}. Packs of {args.tokens} tokens, {args.packs} a window, "
        f"{args.repeats} windows after {WARM}; the language model's layers again in backward: {again}."
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--size", nargs="+", default=["internvl2-2b", "internvl2-8b"], metavar="NAME")
    parser.add_argument("--tokens", type=int, default=4096, help="of a pack")
    parser.add_argument("--packs", type=int, default=4, help="of a window")
    parser.add_argument("--repeats", type=int, default=5, help="windows")
    parser.add_argument("--answer", type=int, default=128, help="tokens that are decoded, at least 2")
    parser.add_argument("--compile", choices=("no", "yes", "both"), default="both", help="layers by torch.compile")
    parser.add_argument("--checkpointing", action="store_true", help="layers of the language model again in backward")
    parser.add_argument("--attention", default="auto", help="kernel, as model.attention")
    parser.add_argument("--side", type=int, default=8192, help="of the largest matrices of the card's own rate")
    parser.add_argument("--buffer", type=float, default=4.0, help="GB that are copied and read for the bandwidth")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write the kernels of each size to FILE-SIZE")
    args = parser.parse_args(argv)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is found here; --device cpu --size tiny tries the script")
    try:
        [size_of(name) for name in args.size]
    except ValueError as error:
        parser.error(str(error))
    print(about(args) + "\n")
    found = card(args)
    for name in args.size:
        measure(name, found, args)


if __name__ == "__main__":
    main()
