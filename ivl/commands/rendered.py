"""Tokens of a row as text for a terminal, with the trained ones marked."""

from __future__ import annotations

import os
import sys

from ivl.data.processor import Processor
from ivl.types import IGNORE, Example, printable

TRAINED, NOT_TRAINED, RESET = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def rendered(example: Example, processor: Processor, colour: bool | None = None) -> str:
    """Tokens of a row as text: trained ones in green, the rest in grey; `[+…+]` where there is no colour.

    `colour` None: where the output is a terminal and NO_COLOR is not set.
    """
    if colour is None:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    ids, trained = example.input_ids.tolist(), (example.labels != IGNORE).tolist()
    context, out, start = processor.tokenizer.context_id, "", 0
    while start < len(ids):
        end = start
        while end < len(ids) and (trained[end], ids[end] == context) == (trained[start], ids[start] == context):
            end += 1
        image = ids[start] == context
        text = f"<IMG_CONTEXT>×{end - start}" if image else printable(processor.tokenizer.decode(ids[start:end]))
        if colour:
            out += f"{TRAINED if trained[start] else NOT_TRAINED}{text}{RESET}"
        else:
            out += f"[+{text}+]" if trained[start] else text
        start = end
    return out
