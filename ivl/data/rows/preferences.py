"""Rows with a chosen and a rejected answer: the rejected one as a row of its own, in the format of the first.

{"image": …, "question": …, "chosen": …, "rejected": …}                             OpenGVLab's MMPR
{"query": …, "response": …, "rejected_response": …}                                 ms-swift
{"messages": […], "rejected_response": … or "rejected_messages": […], "rejected_images": […]}
"""

from __future__ import annotations

from typing import Any

from ivl.data.rows.keys import REJECTED, THOUGHT
from ivl.data.rows.row_reader import Row
from ivl.types import UserError, shortened


def has_answers(row: Row) -> bool:
    """True for a row of MMPR; others may have a key `question` that is not read."""
    return row.get("chosen") is not None or row.get("rejected") is not None


def rejected_row(row: Any) -> Row | None:
    """Return the row with its rejected answer in place of the chosen one; None where it has none.

    Raises UserError where it names the rejected answer twice, or in a form that is not of its format.
    """
    if not isinstance(row, dict):
        return None
    if row.get("question") is not None and has_answers(row):
        if row.get("rejected") is None:
            raise UserError("rejected: not given; expected the worse answer, beside question and chosen")
        return row | {"chosen": row["rejected"]}
    response, messages = row.get("rejected_response"), row.get("rejected_messages")
    if response is None and messages is None:
        return None
    if response is not None and messages is not None:
        raise UserError("rejected_response and rejected_messages: expected one of them, found both; remove one")
    other = {key: value for key, value in row.items() if key not in REJECTED}
    if row.get("rejected_objects") is not None:
        other["objects"] = row["rejected_objects"]
    if row.get("rejected_images") is not None:
        other["images"] = row["rejected_images"]
        other.pop("image", None)
    if messages is not None:
        if row.get("messages") is None:
            raise UserError("rejected_messages: belongs to messages; write rejected_response beside query")
        return other | {"messages": messages}
    if row.get("query") is not None:
        return {key: value for key, value in other.items() if key not in THOUGHT} | {"response": response}
    return other | {"messages": _with_last(row.get("messages"), response)}


def _with_last(messages: Any, response: Any) -> list[Any]:
    """Messages with another last answer."""
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        raise UserError(f"rejected_response: belongs to query or messages, found {shortened(messages)}")
    last = {"role": "assistant", "content": response}
    return [*messages[:-1], last] if messages[-1].get("role") == "assistant" else [*messages, last]
