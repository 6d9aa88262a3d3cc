"""Rows that list their turns: `conversations` (OpenGVLab, LLaVA) and `messages` (OpenAI)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from ivl.data.rows import tools
from ivl.data.rows.draft import Draft, Role, Turn, one_system, system_of, thought_parts
from ivl.data.rows.keys import is_prefix, is_trained, thought_of
from ivl.data.rows.row_reader import Kind, Row, RowReader, nothing, text_of
from ivl.types import Media, UserError
from ivl.types import shortened as short

_SPEAKERS: dict[str, Role | Literal["system"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def from_conversations(row: Row, reader: RowReader) -> Draft:
    """Read a row of OpenGVLab or LLaVA, or of ShareGPT with calls of tools."""
    entries = _entries(row, "conversations")
    system, turns = system_of(row), list[Turn]()
    for n, entry in enumerate(entries):
        name = f"conversations[{n}]"
        speaker = str(entry.get("from"))
        if speaker in tools.ROLES:
            _add_tool_turn(turns, entry, speaker, entry.get("value"), name, row, reader)
            continue
        role = _SPEAKERS.get(speaker)
        text = text_of(entry.get("value"), f"{name}.value")
        if role is None:
            expected = "human, gpt, system, function_call or observation"
            raise UserError(f"{name}.from: expected {expected}, found {short(entry.get('from'))}")
        reader.keys.look("conversations turn", entry, name)
        learnt = is_trained(entry, name, role)
        if role == "system":
            if n:
                raise UserError(f"{name}: a system message can only come first")
            thought_of(entry, name, None)
            system = one_system(system, text, name)
            continue
        begins = is_prefix(entry, f"{name}.", text, _is_last_answer(role, n, entries))
        turn = Turn(role, reader.content(text, role, f"{name}.value"), learnt, begins)
        turn.thought = thought_parts(entry, name, turn)
        tools.add_turn(turns, turn, name)
    return Draft(turns, system, media_first=True)


def from_messages(row: Row, reader: RowReader) -> Draft:
    """Read a row of OpenAI-style messages, with tools or without."""
    system, turns = system_of(row), list[Turn]()
    entries = _entries(row, "messages")
    for n, entry in enumerate(entries):
        name, role, content = f"messages[{n}]", entry.get("role"), entry.get("content")
        if isinstance(role, str) and role in tools.ROLES:
            _add_tool_turn(turns, entry, role, content, name, row, reader)
            continue
        if role not in ("system", "user", "assistant"):
            expected = "system, user, assistant, tool_call or tool"
            raise UserError(f"{name}.role: expected {expected}, found {short(role)}")
        reader.keys.look("assistant's message" if role == "assistant" else "messages turn", entry, name)
        learnt = is_trained(entry, name, role)
        begins = is_prefix(entry, f"{name}.", content, _is_last_answer(role, n, entries))
        calls = tools.calls_of(entry, name) if role == "assistant" else []
        if role == "assistant" and content is None and not calls and n == len(entries) - 1:
            thought_of(entry, name, None)
            break
        parts = [] if content is None and calls else list(_parts(content, f"{name}.content", row, role, reader))
        if role != "assistant":
            thought_of(entry, name, None)
        if role == "user":
            turns.append(Turn(role, parts))
        elif len(texts := [part for part in parts if isinstance(part, str)]) < len(parts):
            raise UserError(f"{name}.content: only a user's message can hold images or videos")
        elif role == "assistant":
            turn = Turn(role, [_answer_text("".join(texts), calls)], learnt, begins, is_tool=bool(calls))
            turn.thought = thought_parts(entry, name, turn)
            turns.append(turn)
        elif n:
            raise UserError(f"{name}: a system message can only come first")
        else:
            system = one_system(system, "".join(texts), name)
    return Draft(turns, system)


def _add_tool_turn(
    turns: list[Turn], entry: Row, speaker: str, content: Any, name: str, row: Row, reader: RowReader
) -> None:
    """Add the turn of a call, or of a tool's result."""
    reader.keys.look("tool turn", entry, name)
    if tools.ROLES[speaker] == tools.CALL:
        learnt = is_trained(entry, name, "assistant")
        turn = Turn("assistant", [tools.call_text(content, name)], learnt, is_tool=True)
    else:
        is_trained(entry, name, "user")
        is_text = isinstance(content, str) or _has_types(content)
        text = content if is_text else json.dumps(content, ensure_ascii=False)
        parts = tools.result_parts(list(_parts(text, f"{name}.content", row, "user", reader)))
        turn = Turn("user", parts, is_tool=True)
    tools.add_turn(turns, turn, name)


def _answer_text(answer: str, calls: list[str]) -> str:
    """Text of an answer, and each call on a line of its own."""
    if not calls:
        return answer
    return "\n".join([answer.removesuffix("\n"), *calls] if answer else calls)


def _has_types(content: Any) -> bool:
    """True for a list of typed parts; other objects are a tool's result as JSON."""
    return isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)


def _is_last_answer(role: str, n: int, entries: list[Row]) -> bool:
    return role == "assistant" and n == len(entries) - 1


def _parts(content: Any, name: str, row: Row, role: str, reader: RowReader) -> Iterator[str | Media]:
    """Parts of a message's content; a part that names no medium becomes a mark for the row's next medium."""
    if isinstance(content, str):
        yield from reader.content(content, role, name)
        return
    if not isinstance(content, list):
        raise UserError(f"{name}: expected a text or a list of parts, found {short(content)}")
    after_medium = False  # parts have no line break between them, and the models were trained with one after a medium
    for n, part in enumerate(content):
        where = f"{name}[{n}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            reader.keys.look("text part", part, where)
            text = text_of(part.get("text"), f"{where}.text")
            text = "\n" * (after_medium and not text.startswith("\n")) + text
            yield from reader.content(text, role, f"{where}.text")
        elif kind in ("image", "image_url", "video", "video_url"):
            word: Kind = "image" if kind.startswith("image") else "video"
            reader.keys.look(f"{word} part", part, where)
            source = next((part[key] for key in (kind, "url", "path", word) if not nothing(part.get(key))), None)
            if source is None and nothing(row.get(word)) and nothing(row.get(f"{word}s")):
                raise UserError(f"{where}: names no {word}, and the row has no {word}s; add its path or URL")
            if after_medium:
                yield "\n"
            yield f"<{word}>" if source is None else reader.part_medium(word, part, source, where)
        else:
            raise UserError(f"{where}: expected a part of type text, image, image_url or video, found {short(part)}")
        after_medium = kind != "text"


def _entries(row: Row, key: str) -> list[Row]:
    entries = row[key]
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{key}: expected a list of turns, found {short(entries)}")
    for n, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{key}[{n}]: expected an object, found {short(entry)}")
    return entries
