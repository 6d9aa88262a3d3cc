"""Index of the options of fit, validate, test and predict, read from source code, without an import of torch.

Options of ours are fields of `ivl.options` and arguments of a few classes; the trainer's are Lightning's. Signatures
and docstrings are parsed where the files lie, so the index has what the installed versions have.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import re
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import docstring_parser

import ivl.options
from ivl.options import DataOptions, data, media, model

_PACKAGE = Path(__file__).resolve().parents[1]
_PLAIN = {
    "bool",
    "dict",
    "float",
    "int",
    "list",
    "str",
    "tuple",
    "Any",
    "Iterable",
    "Literal",
    "None",
    "Optional",
    "Union",
}
_PLAIN |= {"_PRECISION_INPUT", "_PATH", "_LITERAL_WARN", "timedelta", "Metric"}


@dataclasses.dataclass(frozen=True)
class Option:
    """Option of the command line."""

    name: str
    type: str
    default: str
    help: str
    has_parts: bool = False
    """True for settings of classes, whose own options follow its name (`--trainer.logger.init_args.save_dir`), and for
    mappings (`--data.columns.query`)"""


@cache
def option_index() -> dict[str, Option]:
    """Return all options by name, as typed: `data.train`."""
    lightning = Path(*(importlib.util.find_spec("lightning").submodule_search_locations)) / "pytorch"  # type: ignore[union-attr,misc]
    sources = {
        "model": [(_PACKAGE / "lit/module.py", "LitInternVL")],
        "data": [(_PACKAGE / "lit/datamodule.py", "IvlData")],
        "trainer": [(lightning / "trainer/trainer.py", "Trainer")],
        "checkpoint": [
            (_PACKAGE / "lit/callbacks/checkpoint.py", "Checkpoints"),
            (lightning / "callbacks/model_checkpoint.py", "ModelCheckpoint"),
        ],
        "predictions": [(_PACKAGE / "lit/callbacks/prediction_writer.py", "PredictionWriter")],
        "report": [(_PACKAGE / "lit/callbacks/held_out_report.py", "HeldOutReport")],
    }
    options = [Option(*row) for row in _COMMON]
    for group, places in sources.items():
        options.append(Option(group, "config", "", f"Options of {group} from a file."))
        for place in places:
            options += _signature(*place, group)
        if group == "data":
            options += field_options(DataOptions, group + ".")
    index: dict[str, Option] = {}
    for option in options:
        index.setdefault(option.name, option)
    return index


_COMMON = (
    ("config", "file", "", "Config in YAML, a file or the name of one that comes with the program.", True),
    ("help", "", "", "Show help: of a group (model, data, trainer, …), or full.", True),
    ("print_config", "", "", "Print the merged config, and end.", True),
    ("seed_everything", "bool | int", "42", "Seed of all random generators."),
    ("demo", "str | None", "None", "Make the embedded demo in this folder first, where it is missing."),
    ("threads", "int | None", "None", "Threads of torch on a CPU; null: one a core; few for a tiny model."),
    (
        "ckpt_path",
        "str | None",
        "None",
        "Run or checkpoint to go on with or to take the weights from; `last`: the newest.",
    ),
    ("weights_only", "bool | None", "None", "Always true: a checkpoint is never unpickled."),
    ("return_predictions", "bool | None", "None", "Not used: answers are written as they come."),
)


def _signature(file: Path, name: str, group: str) -> Iterator[Option]:
    """Yield the arguments of a class's `__init__`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kind = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    init = next(node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    texts = [ast.get_docstring(node) or "" for node in (kind, init)]
    helps = {p.arg_name: p.description or "" for text in texts for p in docstring_parser.parse(text).params}
    arguments = [*init.args.args[1:], *init.args.kwonlyargs]
    defaults = [*init.args.defaults, *init.args.kw_defaults]
    required = len(arguments) - len(defaults)
    for argument, default in zip(arguments, [*[None] * required, *defaults]):
        annotation = ast.unparse(argument.annotation) if argument.annotation else "Any"
        shown = "" if default is None else ast.unparse(default)
        yield from _options(f"{group}.{argument.arg}", annotation, shown, helps.get(argument.arg, ""))


def _options(name: str, annotation: str, default: str, text: str) -> Iterator[Option]:
    """Yield an option, and those of the dataclasses in its type."""
    for alias, choices in _CHOICES.items():
        annotation = re.sub(rf"\b{alias}\b", choices, annotation)
    words = set(re.findall(r"(?<![\w\"'])[A-Za-z_]\w*(?![\w\"'])", annotation))
    kinds = {word: getattr(ivl.options, word, None) for word in sorted(words)}
    nested = {word: kind for word, kind in kinds.items() if dataclasses.is_dataclass(kind)}
    others = words - _PLAIN - nested.keys()
    shown = "" if default.endswith("()") and default[:-2] in nested else default
    yield Option(name, annotation, shown, " ".join(text.split()), has_parts=bool(others) or "dict" in words)
    if not annotation.startswith("list"):
        for kind in nested.values():
            yield from field_options(kind, name + ".")


_CHOICES = {
    alias: f"Literal{list(get_args(value))}"
    for module in (data, media, model)
    for alias, value in vars(module).items()
    if get_origin(value) is Literal
}
"""Name of a type of a few values → the values"""


def field_options(kind: Any, prefix: str = "") -> Iterator[Option]:
    """Yield the fields of a dataclass of options."""
    helps: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        helps |= {p.arg_name: p.description for p in docstring_parser.parse_from_object(base).params if p.description}
    for field in dataclasses.fields(kind):
        value, make = field.default, field.default_factory
        if value is dataclasses.MISSING and make is not dataclasses.MISSING:
            value = make()
        value = str(value) if isinstance(value, Path) else value
        shown = "" if value is dataclasses.MISSING or dataclasses.is_dataclass(value) else repr(value)
        yield from _options(f"{prefix}{field.name}", str(field.type), shown, helps.get(field.name, ""))


def closest(name: str, among: Collection[str] = ()) -> str:
    """Return `; did you mean …?` with the closest options, or nothing. `among`: names of another command's."""
    names = list(among or option_index())
    plain = name.replace("-", "_")
    group, _, end = plain.rpartition(".")
    ends = {option: option.rpartition(".")[2] for option in names}
    matches = [option for option in names if ends[option] == end]
    for nearby in ([option for option in names if option.startswith(group + ".")], names):
        near = difflib.get_close_matches(end, [ends[option] for option in nearby], n=3, cutoff=0.75)
        matches = matches or [option for word in dict.fromkeys(near) for option in nearby if ends[option] == word]
    matches = matches or difflib.get_close_matches(plain, names, n=1, cutoff=0.7)
    return f"; did you mean {' or '.join('--' + option for option in matches[:3])}?" if matches else ""
