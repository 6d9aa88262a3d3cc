"""Dispatch of `python -m ivl COMMAND`, and errors a person can act on."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path

from ivl.shipped import FOLDER, with_configs

COMMANDS = {
    "fit": ("ivl.lit.cli", "fine-tune a model                     --config configs/demo.yaml"),
    "validate": ("ivl.lit.cli", "loss and scores on held-out rows      --ckpt_path RUN/checkpoints/last.ckpt"),
    "test": ("ivl.lit.cli", "the same on the test rows"),
    "predict": ("ivl.lit.cli", "answer rows, one JSON line each       --ckpt_path … --data.predict FILE.jsonl"),
    "chat": ("ivl.commands.chat", "talk to a model                       --model internvl2-2b"),
    "check": ("ivl.commands.check", "look for mistakes in data             --config FILE.yaml, or --data.train FILE"),
    "plan": ("ivl.commands.plan", "memory and time of a run              --config FILE.yaml --device H100-80GB"),
    "export": ("ivl.commands.export", "merge and write a checkpoint          --run RUN --out DIR"),
    "reproduce": ("ivl.commands.reproduce", "a run's command, and what changed    RUN"),
    "score": ("ivl.eval.score", "score answers with references         FILE... --html report.html, or --task docvqa"),
    "pairs": ("ivl.commands.pairs", "right and wrong answers as pairs      ANSWERS.jsonl --rows ROWS.jsonl"),
    "models": ("ivl.commands.models", "the models this program knows         [TEXT]"),
}

USAGE = """usage: python -m ivl COMMAND [OPTIONS]

InternVL in PyTorch Lightning: fine-tune, evaluate and run InternVL chat models from one config file.

commands:
{commands}

options of every command:
  --hub HUB  where models are looked up by name: huggingface (default) or modelscope
  --token T  login of that hub; default: HF_TOKEN or MODELSCOPE_API_TOKEN. It is written nowhere
  --revision R  branch, tag or commit of a model that is looked up by name; NAME@R is the same
  --debug    show where an error came from

FILE of --config: a path, or the name of a config that comes with the program, such as demo, internvl2-2b, tune/lora or
  strategy/ddp ({folder}). Several are merged from left to right.

`python -m ivl COMMAND --help` lists the options of a command; `python -m ivl --version` says which version this is.
Installed, `ivl COMMAND` is the same.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, or 2 for a mistake the message explains."""
    _replace_unencodable_characters()
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    argv, hub_options = _split_options(argv, ("--hub", "--token", "--revision"))
    if not argv or argv[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
        print(USAGE.format(commands=commands, folder=FOLDER), end="")
        return 0
    command, argv = argv[0], with_configs(argv)
    if command == "--version":
        from ivl import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        return _fail(f"{command}: no such command; expected one of {', '.join(COMMANDS)}")
    try:
        if hub_options:
            from ivl.hub import choose

            choose(hub_options.get("--hub"), hub_options.get("--token"), hub_options.get("--revision"))
        if COMMANDS[command][0] == "ivl.lit.cli":
            return _lightning(argv)
        return run_command(command, argv[1:])
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `ivl models | head`: whoever reads has enough; Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001  (printed as a line, or with its traceback)
        message = _explain(error)
        if debug or message is None:
            traceback.print_exc()
        return _fail(message) if message is not None else 1


def _replace_unencodable_characters() -> None:
    """Let a terminal or pipe that is not UTF-8 show `?` for a character that it lacks, and not end the program."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            reconfigure(errors="replace")


def _split_options(argv: list[str], options: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Split off options (`--option value` or `--option=value`). Returns the other arguments, and the values."""
    rest, values = [], {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in options:
            values[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    return rest, values


def run_command(command: str, argv: list[str]) -> int:
    """Run a command that is not Lightning's. Help and mistakes in options are answered before torch is imported."""
    from ivl.cli import command_line

    options = command_line.read(command, argv)
    return 0 if options is None else importlib.import_module(COMMANDS[command][0]).main(options)


def _lightning(argv: list[str]) -> int:
    """Run one of Lightning's commands. Help and most mistakes are answered before it is imported."""
    from ivl.cli import help as pages
    from ivl.cli import preflight

    command, *words = argv
    topic = pages.topic_of(words)
    if topic not in (None, "full"):
        print(pages.page(command, str(topic)), end="")
        return 0
    if topic is None:
        preflight.check(command, words)
    from ivl.lit import cli

    return cli.main([command, "--help"] if topic else argv, prepare_demo=_prepare_demo)


def _prepare_demo(folder: Path) -> None:
    from ivl.demo import prepare  # slow to import, and rarely needed

    prepare(folder)


def _explain(error: Exception) -> str | None:
    """Return the one line of a user's mistake; None for a fault of this program."""
    from ivl.errors import UserError
    from ivl.storage.files import disk_fault

    text = str(error).strip()
    if isinstance(error, UserError):
        return text
    kind = type(error).__name__
    if kind == "ArgumentError":  # jsonargparse
        return " ".join(text.removeprefix("error:").split())
    if kind == "MisconfigurationException":  # Lightning
        return text
    if kind == "ValueError" and _raised_by(error).startswith("lightning."):  # of its settings
        return " ".join(text.split())
    return disk_fault(error)


def _raised_by(error: Exception) -> str:
    """The module that raised an error."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""


def _fail(message: str) -> int:
    from ivl.errors import printable

    print(f"error: {printable(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
