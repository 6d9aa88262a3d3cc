"""System texts by name: `none` or `false` for no system turn, `r1` for the thinking prompt of InternVL3.5.

A name stands for its text wherever a system text is written: in a row, in an option, in the chat.
"""

from __future__ import annotations

from typing import Literal

NONE = "none"
"""No system turn at all; an empty text is a turn without words."""

R1 = """\
You are an AI assistant that rigorously follows this response protocol:

1. First, conduct a detailed analysis of the question. Consider different angles, potential solutions, and reason \
through the problem step-by-step. Enclose this entire thinking process within <think> and </think> tags.

2. After the thinking section, provide a clear, concise, and direct answer to the user's question. Separate the answer \
from the think section with a newline.

Ensure that the thinking process is thorough but remains focused on the query. The final answer should be standalone \
and not reference the thinking section."""
"""R1_SYSTEM_PROMPT of OpenGVLab/InternVL, internvl_chat_gpt_oss, without blanks at its ends."""

NAMED: dict[str, str] = {"none": NONE, "false": NONE, "r1": R1}
"""Name → text."""


def system_text(value: str | Literal[False] | None) -> str | None:
    """Return the text that a name stands for; any other text, and None, as it is. False: no system turn."""
    if value is False:
        return NONE
    return value if value is None else NAMED.get(value, value)
