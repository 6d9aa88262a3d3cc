"""Options of the commands beside fit, validate, test and predict: a dataclass each, read by `ivl.cli.command_line`.

The docstring of a class is the head of its help page: purpose, an example (indented), and notes that go below the
options. The text under a field is its help.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ivl.errors import UserError
from ivl.options.generation import ChatOptions
from ivl.options.model import AttentionKernel, DType, Quantize


def argument(default: Any = MISSING, **form: Any) -> Any:
    """Field with a form of its own on the command line.

    `metavar`: word for its value. `positional`: given without a name. `repeated`: a list with one value each time it is
    given. `names`: its names, where they are not the field's. `rest`: options of `fit`, which no other field takes, or
    its group of this name; `alone`: none of them is needed beside it.
    """
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=form)
    return field(default=default, metadata=form)


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Look for mistakes in data: problems with file:line, lengths, duplicates, how a row is trained on.

        python -m ivl check --config internvl2-2b --data.train rows.jsonl

    more: check --help data for all options of data, or a group in it, such as data.video.
    """

    config: list[str] = argument([], repeated=True, names=("config", "-c"), metavar="FILE")
    """Config of `fit`, in YAML; may be given several times: the later ones count."""
    run: str | None = argument(None, metavar="RUN")
    """Run whose own data is checked: its folder, such as runs/version_0."""
    pretrained: str = argument("", names=("model.pretrained",), metavar="NAME")
    """Checkpoint whose tokenizer, template and tiling are used, a folder or a name."""
    pairs: bool = False
    """Rows are pairs of answers; a config with objective dpo or mpo says so."""
    media: bool = False
    """Decode all media, not only read their headers."""
    probe_urls: bool = False
    """Fetch media behind URLs."""
    out: Path = argument(Path("check"), metavar="FOLDER")
    """Folder of the report and the contact sheet."""
    show: int = 20
    """Most problems printed of each option."""
    workers: int | None = None
    """Number of processes. Default: one for each core."""
    cache_dir: str | None = argument(None, metavar="FOLDER")
    """Folder of remembered lengths. Default: ~/.cache/ivl."""
    data: list[str] = argument([], rest="data")
    """Options of data, as typed."""


@dataclass(frozen=True, kw_only=True)
class ChatSessionOptions(ChatOptions):
    """Talk to a model in the terminal.

    python -m ivl chat --model internvl2-2b
    """

    model: str | None = argument(None, names=("model", "model.pretrained"), metavar="NAME")
    """Model's name, or a checkpoint folder. Default: the one that the run or the adapter names."""
    adapter: str | None = argument(None, metavar="FOLDER")
    """PEFT adapter to put on it: a folder, or a hub's OWNER/NAME."""
    ckpt_path: str | None = argument(None, metavar="RUN")
    """Run's folder, of which the last checkpoint is taken, or one of its .ckpt files."""
    system: str | None = argument(None, metavar="TEXT")
    """System message; `none`: no system turn, `r1`: the thinking prompt of InternVL3.5. Default: the checkpoint's."""
    thinking: bool | None = None
    """true begins each answer with a thought, false with an empty one. Default: the run's, or the checkpoint's."""
    max_tiles: int | None = None
    """Most tiles of one image, the thumbnail not counted. Default: the checkpoint's."""
    max_length: int | None = None
    """Most tokens of a conversation with its last question. Default: the model's context."""
    dtype: DType = "auto"
    """Dtype of the computation; auto is bfloat16 on a GPU and float32 elsewhere."""
    attention: AttentionKernel = "auto"
    """Attention kernel; auto takes the fastest that is installed and runs here."""
    quantize: Quantize | None = None
    """Linear layers of the language model in 8 or 4 bits. Default: as in the run."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1 and so on; auto is the GPU where there is one."""
    devices: int | None = None
    """Number of GPUs that share the model, layer by layer."""
    device_max_memory: list[str] | None = argument(None, metavar="SIZE")
    """Memory to use of each, such as `15GB 15GB`; layers that do not fit stay with the host."""
    device_map: str | None = argument(None, metavar="FILE")
    """JSON or YAML from names of modules to devices, instead of a plan."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ckpt_path is not None and self.adapter is not None:
            raise UserError("--ckpt_path and --adapter: expected one of them, found both")
        if self.ckpt_path is None and self.adapter is None and self.model is None:
            raise UserError("chat: expected --model NAME or a folder, --adapter DIR, or --ckpt_path RUN")

    @property
    def settings(self) -> ChatOptions:
        """Length and sampling of the answers alone."""
        return ChatOptions(**{one.name: getattr(self, one.name) for one in fields(ChatOptions)})


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a trained model as a checkpoint folder, and verify it.

    python -m ivl export --run runs/version_0 --out merged
    """

    out: str = argument(metavar="FOLDER")
    """Folder to write."""
    run: str | None = argument(None, metavar="RUN")
    """Run to export: its folder (the last checkpoint is taken), or one of its .ckpt files."""
    adapter: str | None = argument(None, metavar="FOLDER")
    """PEFT adapter to merge, instead of a run: a folder, or a hub's OWNER/NAME."""
    base: str | None = argument(None, metavar="NAME")
    """Checkpoint it belongs to, a folder or a name. Default: the one the run or the adapter names. Alone: that
    checkpoint is written again, in another layout, dtype or shard size."""
    layout: Literal["released", "hf"] | None = None
    """Layout of the OpenGVLab releases, or of transformers' InternVLForConditionalGeneration (hf). Default: released,
    and of an adapter the layout of its base, so that it loads onto it."""
    max_shard_size: str = argument("5GB", metavar="SIZE")
    """Largest weight file, such as 5GB or 800MB."""
    dtype: DType = "auto"
    """Dtype of the stored weights; auto is the base's."""
    device: str = "cpu"
    """Device the model is merged and tried out on, such as cpu or cuda."""
    adapter_only: bool = argument(False, names=("adapter_only", "adapter-only"))
    """Write the LoRA of a run as a PEFT adapter folder, not merged."""
    overwrite: bool = False
    """Replace an existing checkpoint folder, once the new one is complete."""
    push: str | None = argument(None, metavar="OWNER/NAME")
    """Repository on the Hugging Face hub that the folder is uploaded to. Without --run, --adapter and --base: the
    folder of an earlier export is."""
    private: bool = False
    """Make that repository private, where it is new."""
    push_replace: bool = False
    """Replace the files of a repository that holds others, in a new commit."""

    @property
    def sources(self) -> list[str]:
        """Run, adapter and base, as far as they are named."""
        return [one for one in (self.run, self.adapter, self.base) if one is not None]

    def __post_init__(self) -> None:
        if self.run is not None and self.adapter is not None:
            raise UserError("--run and --adapter: expected one of them, found both")
        if self.push is None and (self.private or self.push_replace):
            option = "private" if self.private else "push_replace"
            raise UserError(f"--{option}: expected --push OWNER/NAME with it")
        if not self.sources and self.push is None:
            raise UserError("nothing to export: expected --run RUN, --adapter DIR, or --base NAME")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Score answers with references, your own or those to a benchmark by its published rules.

    python -m ivl score answers.jsonl --html report.html
    python -m ivl score answers.jsonl --task docvqa --html report.html
    """

    files: list[Path] = argument(positional=True, metavar="FILE")
    """Answers, one JSON object a line, or the folder of a run that predict answered in; several: a comparison."""
    task: str = argument("own", metavar="NAME")
    """own: exact, ANLS, F1 of words, IoU of boxes, CIDEr where it is installed; or a benchmark of the list below."""
    mode: Literal["compat", "strict"] = "compat"
    """compat: as the published script, its defects included; strict: those mended."""
    rows: Path | None = argument(None, metavar="FILE")
    """Data rows that hold the ground truth, or the folder of the official files; joined by id."""
    partial: bool = False
    """Answers to some of the questions of --rows are enough."""
    field: list[str] = argument([], repeated=True, metavar="OURS=THEIRS")
    """Another tool's name of a field, e.g. response=prediction, or 2:response=text of the second file alone; may be
    given several times."""
    out: Path | None = argument(None, metavar="FILE")
    """Record of the scores. Default: the first file's name with .scores.json."""
    html: Path | None = argument(None, metavar="FILE")
    """Write a page with every answer as well, failures first."""
    resamples: int = 1000
    """Resamples of the bootstrap."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        most = 2 if self.task == "own" else 1
        if self.html and len(self.files) > most:
            expected = "one file of answers" if most == 1 else "at most two files of answers"
            raise UserError(f"--html: expected {expected}, found {len(self.files)}; make a report for each")
        for pair in self.field:
            if not re.fullmatch(r"(\d+:)?\w+=.+", pair):
                raise UserError(f"--field: expected OURS=THEIRS, found {pair!r}")

    def fields_of(self, number: int) -> dict[str, str]:
        """Field of this program → field of the file of this number, counted from 1."""
        pairs = (re.fullmatch(r"(?:(\d+):)?(\w+)=(.+)", pair, re.DOTALL) for pair in self.field)
        return {match[2]: match[3] for match in pairs if match and match[1] in (None, str(number))}


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
    fit: list[str] = argument([], rest="fit")
    """Options of `fit`, as typed."""


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """Print a run's command, and what has changed since: rows, base, versions.

        python -m ivl reproduce runs/version_0

    Exit status 1: one of them differs or is missing.
    """

    run: str = argument(positional=True, metavar="RUN")
    """Folder of the run, such as runs/version_0."""


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """List the released models.

    python -m ivl models 8b
    """

    text: str = argument("", positional=True, metavar="TEXT")
    """Only models whose name, hub id or language model has this."""
