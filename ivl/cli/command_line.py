"""Command line of a command, from its dataclass of options: parser, help page, and errors in our words.

    argv → help page, or the options → `main(options)` of the command

Nothing here imports torch, so help and mistakes come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from ivl.cli.help import entry, first_option, group_page, readable, topic_of
from ivl.cli.option_index import Option, field_options
from ivl.cli.preflight import check, check_data, check_names
from ivl.errors import UserError
from ivl.options import commands

COMMAND_OPTIONS: dict[str, type] = {
    "chat": commands.ChatSessionOptions,
    "check": commands.CheckOptions,
    "export": commands.ExportOptions,
    "models": commands.ModelsOptions,
    "pairs": commands.PairsOptions,
    "plan": commands.PlanOptions,
    "reproduce": commands.ReproduceOptions,
    "score": commands.ScoreOptions,
}


def read(command: str, argv: Sequence[str]) -> Any:
    """Return the options of a command as typed; None where help was asked for, which is printed."""
    if (topic := topic_of(argv)) is not None:
        print(page(command, topic), end="")
        return None
    return parse(command, argv)


# -- fields as arguments -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Argument:
    """Field of a dataclass of options as an argument of the command line."""

    option: Option
    kind: Any
    """Type, without None"""
    optional: bool
    """True if `null` stands for None"""
    required: bool
    form: Mapping[str, Any]
    """As `ivl.options.commands.argument` has it"""

    @property
    def names(self) -> list[str]:
        """Names as typed; that of a positional argument is the field's."""
        if self.form.get("positional"):
            return [self.option.name]
        return [name if name[0] == "-" else f"--{name}" for name in self.form.get("names", [self.option.name])]

    @property
    def is_flag(self) -> bool:
        return self.kind is bool and not self.optional

    @property
    def is_list(self) -> bool:
        return get_origin(self.kind) is list

    @property
    def title(self) -> str:
        """Name and value as the help page shows them."""
        value = "" if self.is_flag else self.form.get("metavar") or readable(self.option.type)
        several = " ..." if self.is_list and not self.form.get("repeated") else ""
        name = "" if self.form.get("positional") else self.names[0]
        return f"{name} {value}{several}".strip()

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        settings: dict[str, Any] = {"default": argparse.SUPPRESS}
        if self.form.get("positional"):
            settings["nargs"] = "*" if self.is_list else "?"
        else:
            settings["dest"] = self.option.name
            if self.is_flag:
                settings["action"] = "store_true"
            elif self.form.get("repeated"):
                settings["action"] = "append"
            elif self.is_list:
                settings["nargs"] = "+"
        parser.add_argument(*self.names, **settings)

    def value(self, typed: Any) -> Any:
        """Return a typed text, or texts, as the field's type. Raises UserError where it is none."""
        if self.is_flag:
            return typed
        kind = get_args(self.kind)[0] if self.is_list else self.kind
        texts = typed if self.is_list else [typed]
        try:
            values = [None if self.optional and text == "null" else _converted(kind, text) for text in texts]
        except (ValueError, KeyError):
            expected = readable(self.option.type).replace("|", " or ")
            found = " ".join(texts)
            raise UserError(f"{self.names[0]}: expected {expected}, found {found!r}") from None
        return values if self.is_list else values[0]


def _converted(kind: Any, text: str) -> Any:
    """Return a text as a type: a choice, a truth value, a number, a path. Raises ValueError or KeyError."""
    if get_origin(kind) is Literal:
        return {choice: choice for choice in get_args(kind)}[text]
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    return kind(text)


def arguments(kind: type) -> Iterator[Argument]:
    """Yield the fields of a dataclass of options as arguments: positional, required, its own, inherited ones."""
    hints, options = get_type_hints(kind), {option.name: option for option in field_options(kind)}
    found = []
    for field in dataclasses.fields(kind):
        if field.metadata.get("rest"):
            continue
        types = get_args(hints[field.name])
        optional = NoneType in types
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        one = next(part for part in types if part is not NoneType) if optional else hints[field.name]
        found.append(Argument(options[field.name], one, optional, required, field.metadata))
    bases = [base for base in kind.__bases__ if dataclasses.is_dataclass(base)]
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    yield from sorted(
        found,
        key=lambda one: (not one.form.get("positional"), not one.required, one.option.name in inherited),
    )


# -- parser ------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def parse(command: str, argv: Sequence[str]) -> Any:
    """Return a command's options. Raises UserError for names, values and missing options."""
    kind = COMMAND_OPTIONS[command]
    known = {one.option.name: one for one in arguments(kind)}
    parser = _Parser(add_help=False, allow_abbrev=False)
    for one in known.values():
        one.add_to(parser)
    names = [name.lstrip("-") for name in parser._option_string_actions]
    rest = _rest(kind)
    if rest is None:
        check_names(command, argv, names)
    typed, others = parser.parse_known_args(list(argv))
    values = {name: known[name].value(value) for name, value in vars(typed).items()}
    if rest is None and others:
        raise UserError(f"{others[0]}: not expected (python -m ivl {command} --help)")
    if rest == "data":
        check_data(command, others, names)
    elif rest == "fit" and not any(known[name].form.get("alone") for name in values):
        check(command, others, names)
    for name, one in known.items():
        if one.required and name not in values:
            raise UserError(f"{command} needs {one.title}: {one.option.help}")
    return kind(**values, **({rest: others} if rest else {}))


def _rest(kind: type) -> str | None:
    """Return the name of the field that takes further options, those of fit or of a group; None: there is none."""
    names = [field.name for field in dataclasses.fields(kind) if field.metadata.get("rest") == field.name]
    return names[0] if names else None


# -- help page ---------------------------------------------------------------------------------------------------------


def page(command: str, topic: str = "") -> str:
    """Return the help page of a command. `topic`: a group of fit's options, where the command takes them."""
    kind = COMMAND_OPTIONS[command]
    if topic not in ("", "full") and _rest(kind):
        return group_page(command, topic)
    purpose, example, *notes = (inspect.getdoc(kind) or "").split("\n\n")
    shown = list(arguments(kind))
    required = [one.title for one in shown if one.required]
    optional = [f"[{one.title}]" for one in shown if one.form.get("positional") and not one.required]
    words = " ".join([*optional, *required, *["[--OPTION VALUE ...]"] * (len(shown) > len(optional + required))])
    examples = textwrap.indent(textwrap.dedent(example), "  ")
    lines = [f"usage: python -m ivl {command} {words}", "", purpose, "", examples, ""]
    for one in shown:
        plain = dataclasses.replace(one.option, default="") if one.is_flag else one.option
        lines += entry(plain, title=one.title)
    lines += [line for name in _FROM_FIT.get(command, ()) for line in entry(first_option(name), short=True)]
    notes += [note() for name, note in _LISTS.items() if name == command]
    return "\n".join([*lines, *(line for note in notes for line in ("", note))]) + "\n"


_FROM_FIT = {
    "check": ("data.train", "data.val", "data.media_root", "data.columns", "data.max_length", "data.max_tiles"),
}
"""Command → options of fit that its page shows as well"""


def _benchmarks() -> str:
    from ivl.eval.benchmarks.tasks import TASKS

    return _list("benchmarks", TASKS)


def _devices() -> str:
    from ivl.estimate.hardware import DEVICES

    return _list("devices", DEVICES)


def _list(title: str, names: Iterator[str] | Mapping[str, Any]) -> str:
    return textwrap.fill(f"{title}: {', '.join(names)}", 110, subsequent_indent="  ", break_on_hyphens=False)


_LISTS: dict[str, Callable[[], str]] = {"score": _benchmarks, "plan": _devices}
"""Command → names that one of its options takes"""
