"""Rows with a chosen and a rejected answer, of any format → two rows of one format, one for each answer.

{"image": …, "question": …, "chosen": …, "rejected": …}                             OpenGVLab's MMPR
{"query": …, "response": …, "rejected_response": …}                                 ms-swift
{"messages": […], "rejected_response": … or "rejected_messages": […], "rejected_images": […]}
{"conversations": […], "chosen": {"from": "gpt", …}, "rejected": {…}}               LLaMA-Factory; `messages` alike
{"conversations": […, the chosen answer], "rejected": … or "rejected_response": …}
{"prompt": … or […], "chosen": … or […], "rejected": … or […]}                      TRL; or both conversations in full
"""

from __future__ import annotations

from typing import Any

from ivl.data.rows.keys import REJECTED, THOUGHT
from ivl.data.rows.row_reader import Row
from ivl.types import UserError, shortened

_SPEAKS = {"conversations": ("from", "gpt", "value"), "messages": ("role", "assistant", "content")}
"""Format of turns → keys of speaker and text, with the word for the assistant between them"""


def has_answers(row: Row) -> bool:
    """True for a row of MMPR; others may have a key `question` that is not read."""
    return row.get("chosen") is not None or row.get("rejected") is not None


def answers(row: Any) -> tuple[Any, Row | None]:
    """Return the row with its chosen answer, and with the rejected one in its place; None where it has none.

    Raises UserError where an answer is given twice, or in a form that is not of the row's format.
    """
    if not isinstance(row, dict):
        return row, None
    row = _from_prompt(row)
    if row.get("question") is not None and has_answers(row):
        if row.get("rejected") is None:
            raise UserError("rejected: not given; expected the worse answer, beside question and chosen")
        return row, row | {"chosen": row["rejected"]}
    row = _from_objects(row)
    return row, _rejected(row)


def _from_prompt(row: Row) -> Row:
    """Row of TRL as one of messages; any other as it is."""
    chosen, rejected, prompt = (row.get(key) for key in ("chosen", "rejected", "prompt"))
    formats = [key for key in ("query", "question", *_SPEAKS) if row.get(key) is not None]
    if formats or not any(isinstance(one, (str, list)) for one in (chosen, rejected)):
        return row
    if prompt is None and not isinstance(chosen, list):
        return row
    start = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    turns = []
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer is None:
            raise UserError(f"{key}: not given; expected an answer, beside prompt")
        if isinstance(answer, list) and answer and isinstance(answer[0], dict) and answer[0].get("role") != "assistant":
            turns.append(answer)  # the whole conversation
        elif prompt is None:
            raise UserError(f"{key}: begins with the answer, and the row has no prompt; expected one of the two")
        else:
            turns.append([*start, *(answer if isinstance(answer, list) else [_turn(answer, "messages", key)])])
    rest = {key: value for key, value in row.items() if key not in ("prompt", "chosen", "rejected")}
    return rest | {"messages": turns[0], "rejected_messages": turns[1]}


def _from_objects(row: Row) -> Row:
    """Row of turns with `chosen` and `rejected` beside them, as one with `rejected_response`; any other as it is."""
    key = next((key for key in _SPEAKS if row.get(key) is not None), None)
    chosen, rejected = (
        one if isinstance(one := row.get(k), (str, dict, list)) else None for k in ("chosen", "rejected")
    )
    if key is None or (chosen is None and rejected is None):
        return row
    ends = _ends_with_answer(row[key], key)
    if rejected is None:
        if ends:
            return row  # of another meaning
        raise UserError(f"rejected: not given; expected the worse answer, beside {key} and chosen")
    if row.get("rejected_response") is not None or row.get("rejected_messages") is not None:
        raise UserError("rejected and rejected_response: expected one of them, found both; remove one")
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    rest["rejected_response"] = _turn(rejected, key, "rejected")
    if chosen is None:
        if not ends:
            raise UserError(f"chosen: not given, and {key} ends with a question; expected the better answer")
        return rest
    if ends:
        raise UserError(f"chosen: {key} ends with an answer already; remove one of the two")
    return rest | {key: [*row[key], _turn(chosen, key, "chosen")]}


def _rejected(row: Row) -> Row | None:
    """Row with its rejected answer in place of the chosen one; None where it has none."""
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
            raise UserError("rejected_messages: belongs to messages; write rejected_response beside the others")
        return other | {"messages": messages}
    if row.get("query") is not None:
        return {key: value for key, value in other.items() if key not in THOUGHT} | {"response": response}
    key = "conversations" if row.get("conversations") is not None else "messages"
    return other | {key: _with_last(row.get(key), key, response)}


def _turn(answer: Any, key: str, name: str) -> Row:
    """An answer as the last turn of `key`. Raises UserError where another speaker's, or in the form of another key."""
    speaker, assistant, text = _SPEAKS[key]
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, str):
        return {speaker: assistant, text: answer}
    if not isinstance(answer, dict) or text not in answer:
        raise UserError(f"{name}: expected a text or {{{speaker}: {assistant}, {text}: …}}, found {shortened(answer)}")
    if answer.get(speaker) not in (assistant, "assistant"):
        raise UserError(f"{name}.{speaker}: expected {assistant}, found {shortened(answer.get(speaker))}")
    return answer


def _ends_with_answer(turns: Any, key: str) -> bool:
    speaker, assistant, _ = _SPEAKS[key]
    last = turns[-1] if isinstance(turns, list) and turns else None
    return isinstance(last, dict) and last.get(speaker) in (assistant, "assistant")


def _with_last(turns: Any, key: str, answer: Any) -> list[Any]:
    """Turns with another last answer."""
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        raise UserError(f"rejected_response: belongs to query, conversations or messages, found {shortened(turns)}")
    last = _turn(answer, key, "rejected_response")
    return [*turns[:-1], last] if _ends_with_answer(turns, key) else [*turns, last]
