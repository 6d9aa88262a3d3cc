"""Options of the commands beside fit, validate, test and predict: a dataclass each, read by `ivl.cli.command_line`.

The docstring of a class is the head of its help page: purpose, an example (indented), and notes that go below the
options. The text under a field is its help.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ivl.errors import UserError


def argument(default: Any = MISSING, **form: Any) -> Any:
    """Field with a form of its own on the command line.

    `metavar`: word for its value. `positional`: given without a name. `repeated`: a list with one value each time it is
    given. `names`: its names, where they are not the field's. `rest`: options of `fit`, which no other field takes;
    `alone`: none of them is needed beside it.
    """
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=form)
    return field(default=default, metadata=form)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Score answers by a benchmark's published rules.

    python -m ivl score answers.jsonl --task docvqa --html report.html
    """

    files: list[Path] = argument(positional=True, metavar="FILE")
    """Answers, one JSON object a line; several: a comparison."""
    task: str = argument(metavar="NAME")
    """Benchmark; the list is below."""
    mode: Literal["compat", "strict"] = "compat"
    """compat: as the published script, its defects included; strict: those mended."""
    rows: Path | None = argument(None, metavar="FILE")
    """Data rows that hold the ground truth, or the folder of the official files; joined by id."""
    partial: bool = False
    """Answers to some of the questions of --rows are enough."""
    field: list[str] = argument([], repeated=True, metavar="OURS=THEIRS")
    """Another tool's name of a field, e.g. response=prediction; may be given several times."""
    out: Path | None = argument(None, metavar="FILE")
    """Record of the scores. Default: the first file's name with .scores.json."""
    html: Path | None = argument(None, metavar="FILE")
    """Write a page with every answer as well, failures first."""
    resamples: int = 1000
    """Resamples of the bootstrap."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        if self.html and len(self.files) > 1:
            raise UserError(f"--html: expected one file of answers, found {len(self.files)}; make a report for each")
        for pair in self.field:
            if not re.fullmatch(r"\w+=.+", pair):
                raise UserError(f"--field: expected OURS=THEIRS, found {pair!r}")


@dataclass(frozen=True, kw_only=True)
class PairRule:
    """Choice of pairs among the answers of a row."""

    metric: str = "exact"
    """Score of an answer against the row's reference: exact, anls, relaxed, vqa, iou or iou50."""
    right: float = 1.0
    """Least score of a right answer."""
    wrong: float = 0.0
    """Highest score of a wrong answer."""
    per_row: int = 1
    """Most pairs of a row; each has another right or another wrong answer."""
    reference: bool = False
    """Take the row's reference as the right answer where no answer is right."""
    seed: int = 0
    """Seed of the choice."""

    def __post_init__(self) -> None:
        if not self.wrong < self.right:
            raise UserError(f"--wrong {self.wrong:g} and --right {self.right:g}: expected --wrong below --right")
        if self.per_row < 1:
            raise UserError(f"--per_row: expected at least 1, found {self.per_row}")


@dataclass(frozen=True, kw_only=True)
class PairsOptions(PairRule):
    """Make pairs of a right and a wrong answer from a model's own answers, for preference tuning.

    python -m ivl pairs answers.jsonl --rows rows.jsonl
    """

    answers: Path = argument(positional=True, metavar="ANSWERS")
    """File that predict wrote, with several answers a row."""
    rows: list[Path] = argument(metavar="FILE")
    """Rows that were answered, as --data.predict had them."""
    out: Path = argument(Path("pairs.jsonl"), metavar="FILE")
    """File of rows with rejected_response."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Memory, operations and time of a run, before a weight is read.

        python -m ivl plan --config internvl2-8b --config tune/lora --device H100-80GB

    Options of `fit` are taken as well, so a change can be tried: --model.tune.language_model.rank 64.
    Nothing is downloaded; the checkpoint is a folder, or a released model known by name, whose dimensions are built in.
    Where training rows are named and at hand their lengths are read; else rows of data.max_length are assumed.
    Memory and time are estimates. Against the peak of real training steps on a CPU see benchmarks/plan.md; on GPUs
    nothing has been measured. Exit status 2: the run does not fit --memory (or the memory of --device).
    """

    device: str | None = argument(None, metavar="NAME")
    """Device, for its memory and speed; the list is below."""
    devices: int | None = None
    """Number of devices. Default: trainer.devices."""
    memory: str | None = argument(None, metavar="SIZE")
    """Memory of one device, such as 24GB or 80GiB."""
    efficiency: float = 0.4
    """Share of the device's rate that is reached, assumed."""
    headers: Path | None = argument(None, metavar="FOLDER", alone=True)
    """Write the memory into the configs in this folder instead."""
    json: bool = False
    """Print the plan as JSON."""
    fit: list[str] = argument([], rest=True)
    """Options of `fit`, as typed."""


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """List the released models.

    python -m ivl models 8b
    """

    text: str = argument("", positional=True, metavar="TEXT")
    """Only models whose name, hub id or language model has this."""
