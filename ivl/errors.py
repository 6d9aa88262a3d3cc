"""User errors, and texts for messages: counts, lists, tables."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any


def printable(text: str, newline: str = "\n") -> str:
    """Escape a text so that it cannot steer a terminal: rows, paths and answers may hold anything.

    Control characters, marks that turn the direction of writing, and broken characters are written as escapes such as
    `\\x1b`. `newline`: replacement of the end of a line.
    """
    return _STEERING.sub(lambda match: newline if match[0] in _LINE_ENDS else _escaped(match[0]), text)


_LINE_ENDS = ("\n", "\r\n", "\u2028", "\u2029")
_STEERING = re.compile(r"\r\n|[\x00-\x08\n-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]


class UserError(ValueError):
    """Mistake of the user. The message gives the place, the expected and the actual value, and the remedy.

    The command line prints it as one line, `lines` below it, and exits with 2. Quotes of rows and paths cannot steer a
    terminal: they are printable, without line ends.
    """

    def __init__(self, message: str, *lines: str) -> None:
        # A loader worker's error arrives with the worker's traceback as its text; its last line is the message.
        if "Original Traceback" in message:
            message = message.rpartition("Error: ")[2].strip()
        super().__init__(*(printable(line, " ") for line in (message, *lines)))

    def __str__(self) -> str:
        return "\n".join(self.args)


def note(text: str) -> None:
    """Print a remark for people, in one line, beside what a command prints."""
    print(f"note: {printable(text, ' ')}", file=sys.stderr, flush=True)


def first_few(names: Sequence[str], most: int = 8) -> str:
    """List the first of many names, for messages: `a, b and 3 more`."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def shortened(value: Any, most: int = 80) -> str:
    """Write a value as Python does, for messages; a long one is cut."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def text_table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Write rows of cells as columns of text; columns numbered in `left` are aligned left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(f"{c:{'<' if i in left else '>'}{w}}" for i, (c, w) in enumerate(zip(r, widths))) for r in rows)
    return "\n".join(line.rstrip() for line in lines)


def amount(value: float) -> str:
    """Write a number of a unit for people: two decimals, and of less than a tenth two digits."""
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.2g}"


def plural(count: int, noun: str) -> str:
    """Write a count with its noun: `1 row`, `2 rows`."""
    return f"{count} {noun}{'s' * (count != 1)}"
