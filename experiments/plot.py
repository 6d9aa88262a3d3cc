"""Plots of experiments: the mean of the seeds over the steps, and the spread between the least and the most.

python experiments/plot.py [FOLDER ...]     # draws result.png again from result.json, without any run
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORDS = {"loss": "loss of held-out rows", "exact": "exact answers", "iou": "mean IoU of boxes"}

Scores = dict[str, list[tuple[int, float]]]


def title_of(score: str) -> str:
    """Words for a logged number: `val/2_columns/exact` is `exact answers, 2 columns`."""
    kind, *source = reversed(re.sub(r"^(val|train)/", "", score).split("/"))
    return ", ".join([WORDS.get(kind, kind.replace("_", " ")), *(part.replace("_", " ") for part in source)])


def draw(path: Path, found: dict[str, list[Scores]], scores: tuple[str, ...]) -> None:
    """Draw the scores of each setting, a list of runs by seed, as a line and a band."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(scores), figsize=(5 * len(scores), 4.4), squeeze=False)
    for axis, score in zip(axes[0], scores):
        for n, (name, runs) in enumerate(found.items()):
            steps = [step for step, _ in runs[0][score]]
            values = list(zip(*([value for _, value in run[score]] for run in runs)))
            axis.plot(steps, [statistics.mean(of_step) for of_step in values], color=f"C{n}", marker="o", label=name)
            axis.fill_between(steps, [*map(min, values)], [*map(max, values)], color=f"C{n}", alpha=0.2, linewidth=0)
        axis.set(title=title_of(score), xlabel="optimizer step")
        axis.set_ylim(bottom=0)
        if not score.endswith("loss"):
            axis.set_ylim(top=1)
        axis.grid(alpha=0.3)
    names, seeds = axes[0][0].get_legend_handles_labels()[1], {len(runs) for runs in found.values()}
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=min(3, len(names)), frameon=False)
    figure.suptitle(f"mean of {max(seeds)} seeds, and from the least to the most of them", fontsize="medium")
    figure.tight_layout(rect=(0, 0.06 * -(-len(names) // 3), 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(folder: Path, found: dict[str, list[Scores]], scores: tuple[str, ...]) -> None:
    """Write a sweep's curves as result.json, and draw them as result.png."""
    curves = {name: [{score: run[score] for score in scores} for run in runs] for name, runs in found.items()}
    (folder / "result.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    draw(folder / "result.png", curves, scores)


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]] or sorted(path.parent for path in HERE.glob("*/result.json"))
    for folder in folders:
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        draw(folder / "result.png", found, tuple(next(iter(found.values()))[0]))


if __name__ == "__main__":
    main()
