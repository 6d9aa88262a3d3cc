"""Check of typed options and configs before torch and Lightning are imported: names, required ones, values.

The full parser checks all of it again. What is refused here takes under a second instead of ten.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivl.cli.help import readable
from ivl.cli.option_index import Option, closest, option_index
from ivl.cli.other_trainers import equivalent
from ivl.errors import UserError

CONFIG = ("--config", "-c")


def check(command: str, argv: Sequence[str], further: Sequence[str] = ()) -> None:
    """Raise UserError for options of `fit` and its like that are unknown, missing or of another type, also in configs.

    `further`: names of options that this command has besides.
    """
    typed = list(typed_options(argv))
    names = {name for name, _ in typed}
    check_names(command, argv, {*option_index(), *further})
    check_groups(typed)
    check_present(argv)
    keys: dict[str, Any] = {}
    for config in [value for option, value in pairs(argv) if option in CONFIG]:
        for key, value in config_options(config):
            if not is_known(key):
                raise UserError(f"--config {config}: {key}: no such option{closest(key)}")
            keys[key] = value
    check_values(typed)
    if any(name.split("=")[0] in ("print_config", "ckpt_path") for name in names) or "help" in keys:
        return
    if not names & {"model", "model.pretrained"} and not keys.get("model.pretrained"):
        where = "" if command in ("fit", "plan") else ", or --ckpt_path with a run"
        raise UserError(f"{command} needs --model.pretrained: a folder or a name such as internvl2-2b{where}")
    present = names | {key for key, value in keys.items() if value}
    if command == "fit" and not present & {"data", "data.train", "data.mixture", "data.mixture+"}:
        raise UserError("fit needs --data.train: a file of rows (jsonl or json), or the name of a data set")


def check_names(command: str, argv: Sequence[str], names: Collection[str]) -> None:
    """Raise UserError for a typed option that is not among the names of a command's options."""
    for name, _ in typed_options(argv):
        if not is_known(name, names):
            raise UserError(unknown(command, name, names))


def check_data(command: str, argv: Sequence[str], further: Sequence[str]) -> None:
    """Raise UserError for typed options that are neither of data nor `further` ones of the command, and for values."""
    check_names(command, argv, {*further, *(name for name in option_index() if name.split(".")[0] == "data")})
    check_groups(list(typed_options(argv)))
    check_present(argv)
    check_values(list(typed_options(argv)))


def check_groups(typed: Sequence[tuple[str, str]]) -> None:
    """Raise UserError where a group of options is given one of its options' value: `--data rows.jsonl`."""
    for name, value in typed:
        if not value or "{" in value or name not in ("model", "data"):
            continue
        if name == "model" and not Path(value).is_file():
            raise UserError(f"--model {value}: --model.pretrained takes a model's folder or name")
        if name == "data" and Path(value).suffix not in (".yaml", ".yml"):
            raise UserError(f"--data {value}: --data.train takes files of rows")


def check_present(argv: Sequence[str]) -> None:
    """Raise UserError for an option at the end or before another that has no value."""
    index = option_index()
    for word, following in zip(argv, [*argv[1:], "--"]):
        option = index.get(word[2:].rstrip("+")) if word.startswith("--") else None
        if option and option.type and following.startswith("--"):
            kind = "file" if option.type == "config" else readable(option.type).replace("|", " or ")
            raise UserError(f"{word}: expected a value ({kind}), found none")


def check_values(typed: Sequence[tuple[str, str]]) -> None:
    """Raise UserError where a typed value is not of its option's type. Settings of classes are left to the parser."""
    from jsonargparse import ArgumentError, ArgumentParser

    from ivl import options

    parser = ArgumentParser(exit_on_error=False)
    for name, kind in (
        *(("data", options.DataOptions), ("model.tune", options.Tune), ("model.rates", options.Rates)),
        *(("model.generation", options.GenerationOptions), ("model.batching", options.Batching)),
        ("model.checkpointing", options.Checkpointing),
    ):
        parser.add_class_arguments(kind, name)
    index = option_index()
    for name, value in typed:
        if f"--{name}" not in parser._option_string_actions or index[name].type == "config" or value == "null":
            continue
        try:
            parser.parse_args([f"--{name}={value}"])
        except ArgumentError as error:
            expected = readable(index[name].type).replace("|", " or ")
            nested = index[name].type in vars(options) or "LoRA" in index[name].type
            value_text = f"{value!r}" + (f" ({str(error).strip().splitlines()[-1].strip()})" if nested else "")
            raise UserError(f"--{name}: expected {expected}, found {value_text}") from None


def pairs(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each typed option with its value, `--option value` or `--option=value`; "" where there is none."""
    for n, word in enumerate(argv):
        if word.startswith("-"):
            option, equals, value = word.partition("=")
            follows = argv[n + 1] if n + 1 < len(argv) and not argv[n + 1].startswith("--") else ""
            yield option, value if equals else follows


def typed_options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the names of the typed options, without dashes and the `+` of lists, and their values."""
    for option, value in pairs(argv):
        if option.startswith("--") and option != "--":
            yield option[2:].rstrip("+"), value


def is_known(name: str, names: Collection[str] = ()) -> bool:
    """True for the name of an option, or of a part of one. `names`: those of a command, by default of fit."""
    index, names = option_index(), names or option_index()
    if name in names or name.removesuffix(".help") in names:
        return True
    parents = [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)]
    return any(parent in names and parent in index and index[parent].has_parts for parent in parents)


def unknown(command: str, name: str, names: Collection[str]) -> str:
    """Message about an option that there is not: its name here, or the closest ones of the command's."""
    answer = equivalent(name)
    if answer and (not answer.startswith("--") or is_known(re.split(r"[ ,]", answer)[0][2:], names)):
        return f"--{name} is {answer}"
    return f"--{name}: no such option of {command}{closest(name, names)} (python -m ivl {command} --help)"


def config_options(config: str) -> Iterator[tuple[str, Any]]:
    """Yield the options of a config, a file or YAML itself, as names with dots. Raises UserError for another file."""
    import yaml

    text = config
    if "\n" not in config and "{" not in config:
        try:
            text = Path(config).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--config {config}: cannot be read ({getattr(error, 'strerror', None) or error})"
            ) from None
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"--config {config}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, Mapping):
        raise UserError(f"--config {config}: expected options by section, found {type(values).__name__}")
    yield from _flat(values, "")


def _flat(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    index = option_index()
    for key, value in values.items():
        name = f"{prefix}{str(key).rstrip('+')}"
        option: Option | None = index.get(name)
        if isinstance(value, Mapping) and not (option and option.has_parts):
            yield from _flat(value, name + ".")
        else:
            yield name, value
