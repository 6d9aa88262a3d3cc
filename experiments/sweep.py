"""Fits the demo's tiny model once per setting and seed, and draws what held-out rows score as it learns.

The rows are the demo's, but of one kind at a time and with one thing in a picture, so that a model reads after some
hundred steps, a minute on one core; as many run at once as there are cores. A run that is finished is not repeated: a
sweep goes on where it was stopped, and experiments share equal runs. Used by each folder's `run.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import plot

from ivl.demo import prepare
from ivl.demo.rows import Boards, Maker, write_rows

REPO = Path(__file__).resolve().parents[1]
RUNS = REPO / "experiments/runs"
DATA = RUNS / "data"
SEEDS = (0, 1, 2)
ROWS = {"train": {"single": 12000, "grounding": 6000}, "val": {"single": 300, "grounding": 150}}
STEPS, CHECKS = 375, 5  # all `single` rows once, in batches of 32
ONE = Boards(notes=(1.0,), wide=0.0)

Scores = plot.Scores


class Columns(Maker):
    """Pictures of a certain number of columns, whatever is asked; the row's source says how many."""

    columns = 2

    def single(self, name: str) -> dict:
        return super().single(name) | {"source": f"{self.columns}_columns"}

    def board(self, name: str, columns: int = 2):
        return super().board(name, self.columns)


def make_data() -> None:
    """The checkpoint, and train.jsonl and val.jsonl in folders single, grounding and columns."""
    prepare(DATA, {"train": {"single": 2000}, "val": {"single": 1}})  # for the checkpoint and its tokenizer
    for split in ("train", "val"):
        for seed, kind in enumerate(("single", "grounding")):
            folder = DATA / kind
            if not (folder / f"{split}.jsonl").is_file():
                list(write_rows(folder, split, {kind: ROWS[split][kind]}, 10 + seed, ONE))
        path = DATA / f"columns/{split}.jsonl"
        if not path.is_file():
            (path.parent / "images").mkdir(parents=True, exist_ok=True)
            rows = []
            for columns in (2, 4, 6):
                maker = Columns(path.parent, split, [columns, split == "val"], ONE)
                maker.columns = columns
                rows += [maker.row("single", 10**4 * columns + n) for n in range(ROWS[split]["single"] // 3)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def part_of(kind: str, share: float) -> str:
    """The first `share` of the rows for training, as a file."""
    lines = (DATA / kind / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path = DATA / kind / f"train-{share:g}.jsonl"
    path.write_text("".join(lines[: round(share * len(lines))]), encoding="utf-8")
    return str(path)


def base(seed: int) -> str:
    """A folder with the model that the plain run of this seed ended with: it reads, and was never asked for a box."""
    folder = RUNS / f"base-{seed}"
    if not folder.is_dir():
        run = fit({}, seed)[1]
        _ivl("export", "--run", str(run), "--out", str(folder))
    return str(folder)


def fit(options: dict[str, str], seed: int, kind: str = "single") -> tuple[Scores, Path]:
    """(step, value) of every score of one run, and the run's folder."""
    key = hashlib.sha256(json.dumps([kind, sorted(options.items())]).encode()).hexdigest()[:12]
    run = RUNS / f"{key}-seed{seed}"
    done = run / "scores.json"
    if not done.is_file():
        plain = {
            "model.pretrained": str(DATA / "model"),
            "data.train": str(DATA / kind / "train.jsonl"),
            "data.val": str(DATA / kind / "val.jsonl"),
            "trainer.max_epochs": "-1",
            "trainer.max_steps": str(STEPS),
            "trainer.check_val_every_n_epoch": "null",
            "trainer.val_check_interval": str(STEPS // CHECKS),
            "trainer.logger.init_args.save_dir": str(RUNS),
            "trainer.logger.init_args.version": run.name,
        }
        argv = ["fit", "--config", str(REPO / "configs/demo.yaml"), "--demo", "null"]
        argv += ["--seed_everything", str(seed), "--data.seed", str(seed)]
        _ivl(*argv, *(part for key, value in (plain | options).items() for part in (f"--{key}", value)))
        done.write_text(json.dumps(_scores(run)))
    return json.loads(done.read_text()), run


def _ivl(*argv: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "ivl", *argv], cwd=REPO, env=environment, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}\n{done.stderr.decode()[-2000:]}")


def _scores(run: Path) -> Scores:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    names = [tag for tag in events.Tags()["scalars"] if tag.startswith(("val/", "train/loss", "speed/"))]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def sweep(folder: Path, settings: dict[str, dict[str, str]], scores: tuple[str, ...], kind: str = "single") -> None:
    """Fit every setting with every seed; `result.md` has the last of each score, `result.json` and `result.png` all.

    An option's value may hold `{base}`: the checkpoint of `base` for the seed.
    """

    def one(asked: tuple[str, int]) -> Scores:
        name, seed = asked
        options = {k: base(seed) if v == "{base}" else v for k, v in settings[name].items()}
        found = fit(options, seed, kind)[0]
        print(f"{name}, seed {seed}: " + ", ".join(f"{s} {found[s][-1][1]:.3f}" for s in scores), flush=True)
        return found

    make_data()
    if any("{base}" in options.values() for options in settings.values()):
        for seed in SEEDS:
            base(seed)
    asked = [(name, seed) for name in settings for seed in SEEDS]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1))) as pool:
        runs = dict(zip(asked, pool.map(one, asked)))
    found = {name: [runs[name, seed] for seed in SEEDS] for name in settings}
    lines = [f"| setting | {' | '.join(scores)} |", "| --- |" + " --- |" * len(scores)]
    for name, of_seeds in found.items():
        last = [[run[score][-1][1] for run in of_seeds] for score in scores]
        cells = [f"{statistics.mean(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in last]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    (folder / "result.md").write_text(f"{len(SEEDS)} seeds; mean (least to most)\n\n" + "\n".join(lines) + "\n")
    plot.write(folder, found, scores)
    print("\n".join(lines))
