"""Rewrites of typed arguments: repeated options, and the config of a checkpoint's run."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from ivl.checkpoint.newest import newest_checkpoint
from ivl.errors import UserError, note
from ivl.run import CONFIG, Run, run_and_checkpoint, todays_classes


def run_config(argv: list[str]) -> list[str]:
    """Name a checkpoint where `--ckpt_path` is a run's folder, and prepend the run's config where no other is typed."""
    command, *rest = argv = with_nulls(argv)
    path = value_of(rest, "--ckpt_path")
    has_config = command == "fit" or value_of(rest, "--config") or value_of(rest, "-c")
    if path is None or (has_config and (path == "last" or Run.of(path) != Run(Path(path)))):
        return argv
    if path == "last":
        checkpoint = newest_checkpoint(sorted(Path("runs").glob("*/checkpoints")))
        if checkpoint is None:
            raise UserError("--ckpt_path last: no whole checkpoint in runs/; give the file of one, or a --config")
        path = str(checkpoint)
    run, checkpoint = run_and_checkpoint(path, "--ckpt_path", "--model.adapter, and its model's --config")
    config = [] if has_config else ["--config", str(run.folder / CONFIG)]
    return [command, *config, *rest, "--ckpt_path", str(checkpoint)]


def with_todays_classes(argv: list[str]) -> list[str]:
    """Replace class paths of earlier versions, typed or in configs, with a notice; such a config is given as text."""
    out: list[str] = []
    notices: dict[str, None] = {}
    for before, word in zip(["", *argv], argv):
        option, equals, value = word.rpartition("=") if word.startswith(("--config=", "-c=")) else ("", "", word)
        is_file = (equals or before in ("--config", "-c")) and Path(value).is_file()
        text = Path(value).read_text(encoding="utf-8", errors="replace") if is_file else value
        todays, lines = todays_classes(text)
        notices |= dict.fromkeys(f"{value}: {line}" if is_file else line for line in lines)
        out.append(option + equals + todays if lines else word)
    for notice in notices:
        note(notice)
    return out


def value_of(argv: list[str], option: str) -> str | None:
    """Return the typed value of an option, `--option value` or `--option=value`."""
    for i, arg in enumerate(argv):
        if arg == option:
            return argv[i + 1] if i + 1 < len(argv) else None
        if arg.startswith(option + "="):
            return arg.partition("=")[2]
    return None


LISTS = ("--data.train", "--data.val", "--data.test", "--data.predict", "--model.metrics")


def with_nulls(argv: list[str]) -> list[str]:
    """Write `--model.tune null` as a config, since the parser takes the word for a config file's name."""
    for number, word in enumerate(argv):
        if word == "--model.tune=null":
            return [*argv[:number], "--config", "{model: {tune: null}}", *argv[number + 1 :]]
        if word == "--model.tune" and argv[number + 1 : number + 2] == ["null"]:
            return [*argv[:number], "--config", "{model: {tune: null}}", *argv[number + 2 :]]
    return argv


def with_lists(argv: list[str]) -> list[str]:
    """Join the values of a repeated option of `LISTS` into one list."""
    values: dict[str, list[str]] = {}
    places: dict[str, list[int]] = {}
    words = [part for word in argv for part in (word.split("=", 1) if word.partition("=")[0] in LISTS else [word])]
    for i, word in enumerate(words[:-1]):
        if word in LISTS:
            value = words[i + 1]
            listed = yaml.safe_load(value) if value.startswith("[") else [value]
            values.setdefault(word, []).extend(map(str, listed))
            places.setdefault(word, []).append(i)
    repeated = {option for option, at in places.items() if len(at) > 1}
    drop = {i + n for option in repeated for i in places[option] for n in (0, 1)}
    rest = [word for i, word in enumerate(words) if i not in drop]
    return rest + [word for option in sorted(repeated) for word in (option, json.dumps(values[option]))]
