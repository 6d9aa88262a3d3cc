"""Help pages of fit, validate, test and predict: a first page, a page for each group, and all that the parser has."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence

from ivl.cli.option_index import Option, closest, option_index
from ivl.errors import UserError

PURPOSES = {
    "fit": "Fine-tune a model.",
    "validate": "Loss and scores on held-out rows (data.val).",
    "test": "Loss and scores on test rows (data.test).",
    "predict": "Answer rows (data.predict), one JSON line each.",
}

EXAMPLES = {
    "fit": "python -m ivl fit --config internvl2-2b --data.train rows.jsonl --data.val_fraction 0.05",
    "validate": "python -m ivl validate --ckpt_path runs/version_0 --data.val rows.jsonl",
    "test": "python -m ivl test --ckpt_path runs/version_0 --data.test rows.jsonl",
    "predict": "python -m ivl predict --ckpt_path runs/version_0 --data.predict rows.jsonl",
}

_MODEL = ("model.pretrained", "model.quantize", "model.attention")
_ROWS = ("data.max_length", "data.max_tiles", "data.media_root")
_LENGTH = ("model.generation.max_new_tokens", "model.generation.temperature")
_RUN = ("config", "ckpt_path", "trainer.devices", "trainer.precision")
_SCORED = {
    "model": _MODEL,
    "data": (*_ROWS, "data.eval_batch_size"),
    "answers": (*_LENGTH, "model.answer_rows", "model.metrics"),
    "run": _RUN,
}
FIRST_PAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "fit": {
        "model": (
            *("model.pretrained", "model.tune.language_model", "model.tune.vision_model", "model.optimizer.lr"),
            *("model.quantize", "model.checkpointing.language_model"),
        ),
        "data": ("data.train", "data.val", "data.val_fraction", *_ROWS, "data.batch_size"),
        "trainer": ("trainer.max_epochs", "trainer.accumulate_grad_batches"),
        "run": (*_RUN, "trainer.logger.init_args.save_dir", "checkpoint.monitor", "seed_everything", "demo"),
    },
    "validate": _SCORED | {"data": ("data.val", *_SCORED["data"])},
    "test": _SCORED | {"data": ("data.test", *_SCORED["data"])},
    "predict": {
        "model": (*_MODEL, "model.adapter", "model.compile"),
        "data": (
            *("data.predict", "data.split", "data.task", "data.max_tiles", "data.max_prompt_length"),
            "data.on_error",
        ),
        "answers": (*_LENGTH, "model.generation.num_answers", "model.batching.rows", "predictions.file"),
        "run": _RUN,
    },
}
"""Options of the first page of each command, by heading"""

_WORDS = {
    "config": ("file", "", "Config in YAML, or the name of one of the program's; several: the later ones count."),
    "data.train": ("str|list", "", "Training rows: files, folders, OpenGVLab meta files, or names of data sets."),
    "data.predict": ("str|list", "", "Files of rows; they need no response."),
    "data.split": ("str", "", "Rows instead of files: run-validation, those that the run of --ckpt_path held out."),
    "model.checkpointing.language_model": ("bool", "False", "Less memory in the language model for a third more time."),
    "model.compile": ("bool", "False", "Compile the decoding step: the first steps take minutes, the others less."),
    "model.optimizer.lr": ("float", "0.0001", "Peak learning rate (of AdamW)."),
    "model.quantize": (
        "int8|nf4|fp8",
        "",
        "Language model in 8 or 4 bits: for answers, and as a LoRA's base (QLoRA).",
    ),
    "model.tune.language_model": ("frozen|full|LoRA", "'{rank: 16}'", "What trains of the language model."),
    "model.tune.vision_model": (
        "frozen|full|LoRA",
        "'frozen'",
        "The same of the vision encoder; of the projector: mlp1.",
    ),
    "trainer.accumulate_grad_batches": ("int", "1", "Batches of an optimizer step, on each device."),
    "trainer.devices": ("int|list", "'auto'", "How many GPUs, or which, as [0, 2]."),
    "trainer.logger.init_args.save_dir": ("str", "'runs'", "Folder of all runs; each is a folder in it."),
    "trainer.max_epochs": ("int", "", "How often all rows are seen."),
    "trainer.precision": ("str", "'32-true'", "bf16-mixed on GPUs; also 16-mixed, bf16-true, 16-true."),
}
"""Type, default and text on a first page, where those of the index are too long or not ours"""


def topic_of(argv: Sequence[str]) -> str | None:
    """Return the topic of `--help TOPIC`; "" where it has none, None where no help is asked for."""
    for n, word in enumerate(argv):
        if word in ("-h", "--help"):
            return argv[n + 1] if n + 1 < len(argv) and not argv[n + 1].startswith("-") else ""
        if word.startswith("--help="):
            return word.partition("=")[2]
    return None


def page(command: str, topic: str) -> str:
    """Return the help page about a topic, by default the first page."""
    return group_page(command, topic) if topic else first_page(command)


def first_page(command: str) -> str:
    """Return the options that people use, with defaults and an example."""
    lines = [f"usage: python -m ivl {command} --config FILE [--config FILE ...] [--OPTION VALUE ...]", ""]
    lines += [PURPOSES[command], "", f"  {EXAMPLES[command]}"]
    for heading, names in FIRST_PAGES[command].items():
        lines += ["", f"{heading}:", *(line for name in names for line in entry(first_option(name), short=True))]
    lines += [
        "",
        f"more: {command} --help GROUP, with {', '.join(groups_of())} or a part such as data.video;",
        f"      {command} --help full for all. Options that are typed go before those of configs.",
    ]
    return "\n".join(lines) + "\n"


def first_option(name: str) -> Option:
    """Return an option as a first page has it."""
    return Option(name, *_WORDS[name]) if name in _WORDS else option_index()[name]


def groups_of() -> list[str]:
    return [name for name, option in option_index().items() if option.type == "config"]


def group_page(command: str, topic: str) -> str:
    """Return all options of a group, such as data or model.generation. Raises UserError where there is none."""
    topic = topic.removeprefix("--")
    options = [option for name, option in option_index().items() if name == topic or name.startswith(topic + ".")]
    if not options:
        expected = f"one of {', '.join(groups_of())}, full"
        raise UserError(f"--help {topic}: no such group; expected {expected}{closest(topic)}")
    shown = [option for option in options if option.type != "config"]
    lines = [line for option in shown for line in entry(option)]
    return "\n".join([f"options of {command}: {topic}", "", *lines]) + "\n"


def entry(option: Option, short: bool = False, title: str = "") -> list[str]:
    """Return the lines of an option: its title, and below it the help with the default. `short`: no more than the first
    sentence and what is said of the default. `title`: instead of name and type."""
    width = min(110, max(60, shutil.get_terminal_size().columns))
    first, *others = re.split(r"(?<=\.) ", option.help)
    shown = [text for text in others if not short or text.startswith(("Default", "Unset"))]
    text = " ".join([first, *shown])
    default = "" if option.default in ("", "None", "()", "[]", "''") else f" (default: {option.default.strip(chr(39))})"
    body = textwrap.wrap(text + default, width - 6, break_on_hyphens=False)
    return [f"  {title or f'--{option.name} {readable(option.type)}'}", *(f"      {line}" for line in body)]


def readable(annotation: str) -> str:
    """Write a type for people: `Optional[int]` → `INT`, `Literal['a', 'b']` → `a|b`."""
    choices = re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace(" ", "").replace("'", ""), annotation)
    words = [word for word in re.split(r"[\[\]|,\s]+", choices) if word not in ("", "None", "Optional", "Union")]
    return "|".join(dict.fromkeys(words))
