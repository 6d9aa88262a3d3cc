"""Seconds until something happens: help, the version, and the first optimizer step of `fit` on the demo.

python benchmarks/startup.py [--repeats 5]

Each in a process of its own, taking turns; the demo's data and model are made before.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        demo = ["fit", "--config", str(REPO / "configs/demo.yaml"), "--trainer.max_steps", "1"]
        demo += [
            "--trainer.limit_val_batches",
            "0",
            "--trainer.num_sanity_val_steps",
            "0",
            "--checkpoint.monitor",
            "null",
        ]
        demo += ["--trainer.enable_progress_bar", "false"]
        commands = {
            "`--help`": ["--help"],
            "`fit --help`": ["fit", "--help"],
            "`fit` on the demo: one step, with start and end": demo,
        }
        subprocess.run([sys.executable, "-m", "ivl", *demo], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(repeats):
            for name, argv in commands.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, "-m", "ivl", *argv], cwd=folder, check=True, stdout=subprocess.DEVNULL)
                found[name].append(time.perf_counter() - start)
    print("| command | seconds, median | least and most |\n| --- | --- | --- |")
    for name, seconds in found.items():
        print(f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} |")


if __name__ == "__main__":
    main()
