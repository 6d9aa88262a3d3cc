"""Seconds until something happens: help, the first optimizer step of `fit`, an answer of `predict` and of `chat`.

    python benchmarks/startup.py [--repeats 5] [--against CHECKOUT]

All on the demo's model, whose data and weights are made before. Each command is a process of its own; they take turns.
`--against`: the same commands by another checkout of this repository, turn by turn, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
QUIET = ["--trainer.enable_progress_bar", "false"]


def commands(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments and standard input of each command, by the name it has in the table. Writes the row predict answers."""
    model = str(folder / "demo/model")
    rows = folder / "rows.jsonl"
    rows.write_text('{"id": "one", "query": "Which digit is this?", "images": []}\n')
    config = str(REPO / "configs/demo.yaml")
    fit = ["fit", "--config", config, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    fit += ["--trainer.num_sanity_val_steps", "0", "--checkpoint.monitor", "null", *QUIET]
    predict = ["predict", "--model.pretrained", model, "--data.predict", str(rows), *QUIET]
    predict += ["--model.generation.max_new_tokens", "2", "--trainer.accelerator", "cpu"]
    chat = ["chat", "--model", model, "--max_new_tokens", "2", "--device", "cpu"]
    return {
        "`--help`": (["--help"], ""),
        "`fit --help`": (["fit", "--help"], ""),
        "`fit`: one step, with start and end": (fit, ""),
        "`predict`: one row": (predict, ""),
        "`chat`: one answer": (chat, "Which digit is this?\n"),
    }


def seconds(checkout: Path, folder: Path, argv: list[str], text: str) -> float:
    """Wall time of one command of a checkout, run in a folder."""
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "ivl", *argv], cwd=folder, env=env, input=text, text=True, capture_output=True
    )
    if run.returncode:
        sys.exit(f"{' '.join(argv)} ended with {run.returncode}:\n{run.stderr[-2000:]}")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout, such as a git worktree of an earlier commit")
    args = parser.parse_args()
    checkouts = {"here": REPO} | ({str(args.against): args.against.resolve()} if args.against else {})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        listed = commands(folder)
        seconds(REPO, folder, *listed["`fit`: one step, with start and end"])
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(args.repeats):
            for name, (argv, text) in listed.items():
                for label, checkout in checkouts.items():
                    times.setdefault((name, label), []).append(seconds(checkout, folder, argv, text))
    print(f"| command | {' | '.join(f'{label}, s (least to most)' for label in checkouts)} | ratio |")
    print(f"| --- |{' --- |' * (len(checkouts) + 1)}")
    for name in listed:
        medians = [statistics.median(times[name, label]) for label in checkouts]
        cells = [
            f"{m:.2f} ({min(times[name, label]):.2f} to {max(times[name, label]):.2f})"
            for m, label in zip(medians, checkouts, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} | {medians[0] / medians[-1]:.2f} |")


if __name__ == "__main__":
    main()
