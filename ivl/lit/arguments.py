"""Rewrites of typed arguments: repeated options, and the config of a checkpoint's run."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from ivl.hub.hints import is_run
from ivl.lit.run.resume import newest_checkpoint
from ivl.types import UserError


def run_config(argv: list[str]) -> list[str]:
    """Prepend the config of the run where `--ckpt_path` is typed without `--config`."""
    command, *rest = argv = with_nulls(argv)
    path = value_of(rest, "--ckpt_path")
    if command == "fit" or path is None or value_of(rest, "--config") or value_of(rest, "-c"):
        return argv
    if path == "last":
        checkpoint = newest_checkpoint(sorted(Path("runs").glob("*/checkpoints")))
        if checkpoint is None:
            raise UserError("--ckpt_path last: no whole checkpoint in runs/; give the file of one, or a --config")
        rest += ["--ckpt_path", str(checkpoint)]
    else:
        checkpoint = Path(path)
    if is_run(checkpoint):
        raise UserError(
            f"--ckpt_path {checkpoint}: is a run's folder; give a checkpoint in it, such as "
            f"{checkpoint / 'checkpoints' / 'last.ckpt'}"
        )
    if (checkpoint / "adapter_config.json").is_file():
        raise UserError(
            f"--ckpt_path {checkpoint}: is an adapter; give it with --model.adapter, and its model's --config"
        )
    if not checkpoint.exists():
        raise UserError(
            f"--ckpt_path {checkpoint}: no such file; expected a checkpoint of a run, such as RUN/checkpoints/last.ckpt"
        )
    for folder in checkpoint.parents[:3]:
        if (folder / "config.yaml").is_file():
            return [command, "--config", str(folder / "config.yaml"), *rest]
    raise UserError(f"{checkpoint}: no config.yaml of its run beside it; give the run's config with --config")


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
