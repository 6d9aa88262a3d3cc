"""Runs `python -m ivl fit` on the demo once per setting and seed, and draws what held-out rows scored.

A run that is finished is not repeated, so that a sweep goes on where it was stopped. Used by each folder's `run.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)


def fit(folder: Path, name: str, options: dict[str, str], seed: int) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every score of one run below `folder`/runs."""
    runs, name = folder / "runs", f"{name}-seed{seed}"
    done = runs / f"{name}.json"
    if not done.is_file():
        argv = [sys.executable, "-m", "ivl", "fit", "--config", str(REPO / "configs/demo.yaml")]
        argv += ["--demo", str(REPO / "demo"), "--seed_everything", str(seed), "--data.seed", str(seed)]
        for key, path in {"model.pretrained": "model", "data.train": "train.jsonl", "data.val": "val.jsonl"}.items():
            argv += [f"--{key}", options.get(key, str(REPO / "demo" / path))]
        argv += ["--trainer.logger.init_args.save_dir", str(runs), "--trainer.logger.init_args.version", name]
        argv += [part for key, value in options.items() for part in (f"--{key}", value)]
        subprocess.run(argv, check=True, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)})
        done.write_text(json.dumps(_scores(runs / name)))
    return json.loads(done.read_text())


def _scores(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    names = [tag for tag in events.Tags()["scalars"] if tag.startswith(("val/", "train/loss", "speed/"))]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def sweep(folder: Path, settings: dict[str, dict[str, str]], scores: tuple[str, ...], seeds=SEEDS) -> None:
    """Fit every setting with every seed; `result.md` and `result.png` beside `run.py` show the last of each score."""
    found = {name: [fit(folder, name, options, seed) for seed in seeds] for name, options in settings.items()}
    lines = [f"| setting | {' | '.join(scores)} |", "| --- |" + " --- |" * len(scores)]
    for name, runs in found.items():
        cells = []
        for score in scores:
            last = [run[score][-1][1] for run in runs if run.get(score)]
            cells.append(f"{sum(last) / len(last):.3f} ({min(last):.3f} to {max(last):.3f})" if last else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    (folder / "result.md").write_text(f"{len(seeds)} seeds; mean (least to most)\n\n" + "\n".join(lines) + "\n")
    _draw(folder / "result.png", found, scores)
    print("\n".join(lines))


def _draw(path: Path, found: dict[str, list[dict]], scores: tuple[str, ...]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(scores), figsize=(5 * len(scores), 4), squeeze=False)
    for axis, score in zip(axes[0], scores):
        for n, (name, runs) in enumerate(found.items()):
            for k, run in enumerate(run for run in runs if run.get(score)):
                axis.plot(*zip(*run[score]), color=f"C{n}", alpha=0.7, label=None if k else name)
        axis.set(title=score, xlabel="optimizer step")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
