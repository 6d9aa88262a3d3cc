"""Peak memory of the loss as vocabulary and length grow: logits a chunk at a time, against all of them at once.

    python benchmarks/memory.py [--most 3.5]      prints a Markdown table

Each figure is a process of its own: hidden states of so many supervised tokens, a frozen output layer, the loss and its
backward, in float32. Measured is the largest resident set minus that before the loss, with all blocks of 16 KiB and
more mapped by themselves, so that freed memory goes back at once (MALLOC_MMAP_THRESHOLD_). What would take more than
`--most` GB is not run.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ivl.model.loss import token_losses

WIDTH, CHUNK = 128, 512
VOCABULARIES, LENGTHS = (16384, 32768, 65536, 151936), (512, 1024, 2048, 4096)
FORMS = 3
"""Logits, their log-softmax and its gradient exist at once"""


def status(field: str) -> int:
    """Bytes, from /proc."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def full(head: nn.Module, hidden_MD: Tensor, labels_M: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_MD).float(), labels_M, reduction="none")


def chunked(head: nn.Module, hidden_MD: Tensor, labels_M: Tensor) -> Tensor:
    return token_losses(head, hidden_MD, labels_M, CHUNK)


WAYS = {"full": full, "chunked": chunked}


def step(way: str, vocabulary: int, length: int) -> int:
    """Bytes at the peak above what there was before."""
    head = nn.Linear(WIDTH, vocabulary, bias=False).requires_grad_(False)
    hidden_MD = torch.randn(length, WIDTH, requires_grad=True)
    labels_M = torch.zeros(length, dtype=torch.long)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    WAYS[way](head, hidden_MD, labels_M).sum().backward()
    return status("VmHWM") - before


def measured(way: str, vocabulary: int, length: int) -> float:
    """Megabytes, in a process of its own."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", way, str(vocabulary), str(length)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(run.stdout.splitlines()[-1]) / 1e6


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=float, default=3.5, help="GB: what takes more is not run (%(default)s)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        way, *sizes = args.measure
        torch.set_num_threads(1)
        step(way, 64, 8)  # what the first step of all loads
        print(step(way, *map(int, sizes)))
        return
    print(f"{processor()}, torch {torch.__version__}, Python {platform.python_version()}; {CHUNK} tokens a chunk.\n")
    print(
        "| vocabulary | supervised tokens | all logits, MB | full, MB | chunked, MB |\n| --- | --- | --- | --- | --- |"
    )
    for vocabulary in VOCABULARIES:
        for length in LENGTHS:
            logits = vocabulary * length * 4
            fits = FORMS * logits <= args.most * 1e9
            whole = f"{measured('full', vocabulary, length):.0f}" if fits else "not run"
            chunk = measured("chunked", vocabulary, length)
            print(f"| {vocabulary} | {length} | {logits / 1e6:.0f} | {whole} | {chunk:.0f} |", flush=True)


if __name__ == "__main__":
    main()
