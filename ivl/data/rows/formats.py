"""Row formats: a row of any format → Conversation.

Each format is one function; the keys of a row tell its format.
- `query` (ms-swift): query, response, history, system, images, videos, objects
- `conversations` (OpenGVLab, LLaVA): from human / gpt / system, image, video
- `messages` (OpenAI): role user / assistant / system, content a text or a list of parts, images, videos

Media replace the marks `<image>` and `<video>` in users' texts, in order over the whole conversation. Without any mark
they come first in the last user's turn (`conversations`: in the first, as OpenGVLab has it). `<img>path</img>` in a
user's text is an image at that place. `prefix: true` beside the last answer makes the row a prompt, and that text the
beginning of the answer (`Conversation.prefix`). The keys that are read are in `ivl.data.rows.keys`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ivl.data.rows import grounding
from ivl.data.rows.keys import REFUSED, check_row_weight, is_prefix, is_trained, thought_of
from ivl.data.rows.preferences import answers, has_answers
from ivl.data.rows.row_reader import Kind, Row, RowReader, nothing, optional_name, optional_text, text_of
from ivl.system_text import NONE, system_text
from ivl.types import TRUTH, Conversation, Media, Message, UserError, plural
from ivl.types import shortened as short

Role = Literal["user", "assistant"]
Size = Callable[[Any], tuple[int, int]]
Reorient = Callable[[Any, grounding.Box, bool], grounding.Box]

_MARK = re.compile(r"(<image>|<video>)")


@dataclass
class _Turn:
    role: Role
    content: list[str | Media]
    trained: bool = True
    is_prefix: bool = False
    """True for the beginning of the answer that is asked for"""
    thought: list[str | Media] = field(default_factory=list)
    """Text of the thought before an answer, if any"""

    @property
    def reasoning(self) -> str | None:
        return "".join(part for part in self.thought if isinstance(part, str)) if self.thought else None


@dataclass
class _Draft:
    """Conversation as a format reads it, before media and boxes are put in place."""

    turns: list[_Turn]
    system: str | None = None
    media_first: bool = False
    """Put media without marks into the first user's turn, not the last"""
    media: dict[str, list[Media]] = field(default_factory=dict)

    @property
    def is_prompt(self) -> bool:
        """True if an answer, or the rest of one, is asked for."""
        return self.turns[-1].role == "user" or self.turns[-1].is_prefix


def parse(
    row: Any,
    where: str = "",
    root: str | Path | None = None,
    size: Size | None = None,
    compact_boxes: bool = False,
    reorient: Reorient | None = None,
) -> Conversation:
    """Parse a row. Raises UserError that begins with `where` and names the field.

    `root`: folder that relative paths of media start from. `size`: a medium's source → (width, height) of the image,
    called where `objects` has boxes in pixels; by default the image's header is read. `reorient`: a medium's source, a
    box in thousandths, True if it was written in pixels → the box in the image as it is shown. A row without response
    (or null) is a prompt; with no media at all, it keeps a literal `<image>` as text.
    """
    settings = where, root, size, compact_boxes, reorient
    try:
        row, other = answers(row)
        conversation = _parse(row, *settings)
        return conversation if other is None else replace(conversation, rejected=_rejected(other, settings))
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def _rejected(row: Row, settings: tuple[Any, ...]) -> Conversation:
    try:
        conversation = _parse(row, *settings)
        if conversation.messages[-1].role == "user":
            raise UserError("is missing; expected an assistant's turn at the end")
    except UserError as error:
        raise UserError(f"rejected answer: {error}") from None
    return conversation


def _parse(
    row: Any, where: str, root: str | Path | None, size: Size | None, compact: bool, reorient: Reorient | None
) -> Conversation:
    if not isinstance(row, dict):
        raise UserError(f"expected an object such as {{'query': ..., 'response': ...}}, found {type(row).__name__}")
    kinds = [key for key in _FORMATS if row.get(key) is not None and (key != "question" or has_answers(row))]
    if len(kinds) != 1:
        keys = sorted(kinds or (str(key) for key in row if row[key] is not None))[:12]
        rename = "" if kinds else "; a source's columns: {query: NAME, response: NAME, …} give other names"
        raise UserError(
            f"expected one of query, conversations or messages, found {', '.join(keys) or 'nothing'}{rename}"
        )
    reader = RowReader(root)
    reader.keys.look(kinds[0], row)
    check_row_weight(row)
    draft = _FORMATS[kinds[0]](row, reader)
    draft.media = {"image": reader.media(row, "image"), "video": reader.media(row, "video")}
    if not draft.media["video"]:
        reader.keys.look("row without video", {key: row.get(key) for key in ("start", "end")})
    if any(medium.kind == "video" for medium in _all_media(draft)):
        reader.keys.look("row with video", {key: row[key] for key in REFUSED["row with video"] if key in row})
    _place(draft, reader)
    _ground(draft, row.get("objects"), size, compact, reader, reorient)
    _check_turns(draft)
    messages = tuple(Message(turn.role, _joined(turn.content), turn.trained, turn.reasoning) for turn in draft.turns)
    messages, prefix = (messages[:-1], messages[-1].text) if draft.turns[-1].is_prefix else (messages, "")
    truth = {key: row[key] for key in TRUTH if row.get(key) is not None}
    name, source = optional_name(row, "id"), optional_name(row, "source") or ""
    unread = tuple(sorted(reader.keys.unread))
    named: dict[str, Any] = {"id": name, "where": where, "source": source, "truth": truth, "unread": unread}
    return Conversation(messages, system_text(draft.system), prefix=prefix, **named)


def _all_media(draft: _Draft) -> Iterator[Media]:
    for media in draft.media.values():
        yield from media
    for turn in draft.turns:
        yield from (part for part in turn.content if isinstance(part, Media))


def _joined(content: list[str | Media]) -> tuple[str | Media, ...]:
    """Join texts that follow one another, and drop empty ones."""
    out: list[str | Media] = []
    for part in content:
        if isinstance(part, str) and out and isinstance(out[-1], str):
            out[-1] += part
        elif part != "":
            out.append(part)
    return tuple(out)


# Formats


def _from_query(row: Row, reader: RowReader) -> _Draft:
    turns = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise UserError(f"history: expected a list of [query, response] pairs, found {short(history)}")
    for n, pair in enumerate(history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(f"history[{n}]: expected [query, response], found {short(pair)}")
        turns.append(_Turn("user", reader.user_text(pair[0], f"history[{n}][0]")))
        turns.append(_Turn("assistant", [text_of(pair[1], f"history[{n}][1]")]))
    turns.append(_Turn("user", reader.user_text(row["query"], "query")))
    begins = is_prefix(row, "", row.get("response"))
    if row.get("response") is not None:
        turns.append(_Turn("assistant", [text_of(row["response"], "response")], is_prefix=begins))
    turns[-1].thought = _thought(row, "", turns[-1])
    return _Draft(turns, _system(row))


def _from_question(row: Row, reader: RowReader) -> _Draft:
    if row.get("chosen") is None:
        raise UserError("chosen: not given; expected the better answer, beside question and rejected")
    turns = [_Turn("user", reader.user_text(row["question"], "question"))]
    return _Draft([*turns, _Turn("assistant", [text_of(row["chosen"], "chosen")])], _system(row))


def _from_conversations(row: Row, reader: RowReader) -> _Draft:
    roles: dict[str, Role | Literal["system"]] = {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "system": "system",
    }
    entries = _entries(row, "conversations")
    system, turns = _system(row), list[_Turn]()
    for n, entry in enumerate(entries):
        name = f"conversations[{n}]"
        role = roles.get(str(entry.get("from")))
        text = text_of(entry.get("value"), f"{name}.value")
        if role is None:
            raise UserError(f"{name}.from: expected human, gpt or system, found {short(entry.get('from'))}")
        reader.keys.look("conversations turn", entry, name)
        trained = is_trained(entry, name, role)
        if role == "system":
            if n:
                raise UserError(f"{name}: a system message can only come first")
            thought_of(entry, name, None)
            system = _one_system(system, text, name)
            continue
        begins = is_prefix(entry, f"{name}.", text, _is_last_answer(role, n, entries))
        turns.append(_Turn(role, reader.content(text, role, f"{name}.value"), trained, begins))
        turns[-1].thought = _thought(entry, name, turns[-1])
    return _Draft(turns, system, media_first=True)


def _from_messages(row: Row, reader: RowReader) -> _Draft:
    system, turns = _system(row), list[_Turn]()
    entries = _entries(row, "messages")
    for n, entry in enumerate(entries):
        name, role, content = f"messages[{n}]", entry.get("role"), entry.get("content")
        if role not in ("system", "user", "assistant"):
            raise UserError(f"{name}.role: expected system, user or assistant, found {short(role)}")
        reader.keys.look("messages turn", entry, name)
        trained = is_trained(entry, name, role)
        begins = is_prefix(entry, f"{name}.", content, _is_last_answer(role, n, entries))
        if role == "assistant" and content is None and n == len(entries) - 1:
            thought_of(entry, name, None)
            break
        parts = list(_parts(content, f"{name}.content", row, role, reader))
        if role != "assistant":
            thought_of(entry, name, None)
        if role == "user":
            turns.append(_Turn(role, parts))
        elif len(texts := [part for part in parts if isinstance(part, str)]) < len(parts):
            raise UserError(f"{name}.content: only a user's message can hold images or videos")
        elif role == "assistant":
            turns.append(_Turn(role, ["".join(texts)], trained, begins))
            turns[-1].thought = _thought(entry, name, turns[-1])
        elif n:
            raise UserError(f"{name}: a system message can only come first")
        else:
            system = _one_system(system, "".join(texts), name)
    return _Draft(turns, system)


def _is_last_answer(role: str, n: int, entries: list[Row]) -> bool:
    return role == "assistant" and n == len(entries) - 1


def _thought(entry: Row, name: str, turn: _Turn) -> list[str | Media]:
    """Content of a turn's thought: none, or one text."""
    answer = "".join(part for part in turn.content if isinstance(part, str)) if turn.role == "assistant" else None
    thought = thought_of(entry, name, answer)
    if thought is not None and turn.is_prefix:
        raise UserError(f"{name or 'row'}: a thought apart, and the beginning of an answer; write both in its text")
    return [] if thought is None else [text_of(thought, f"{name}: thought")]


def _system(row: Row) -> str | None:
    """Text of the row's key `system`, None where it has none; false: no system turn."""
    return NONE if row.get("system") is False else optional_text(row, "system")


def _one_system(of_row: str | None, of_turn: str, name: str) -> str:
    """System message of a turn. Raises UserError where the row's key `system` differs from it."""
    if of_row and of_row != of_turn:
        raise UserError(f"system and {name}: two system messages, {short(of_row)} and {short(of_turn)}; keep one")
    return of_turn


_FORMATS: dict[str, Callable[[Row, RowReader], _Draft]] = {
    "query": _from_query,
    "conversations": _from_conversations,
    "messages": _from_messages,
    "question": _from_question,
}


def _parts(content: Any, name: str, row: Row, role: str, reader: RowReader) -> Iterator[str | Media]:
    """Parts of a message's content; a part that names no medium becomes a mark for the row's next medium."""
    if isinstance(content, str):
        yield from reader.content(content, role, name)
        return
    if not isinstance(content, list):
        raise UserError(f"{name}: expected a text or a list of parts, found {short(content)}")
    after_medium = False
    for n, part in enumerate(content):
        where = f"{name}[{n}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            reader.keys.look("text part", part, where)
            text = text_of(part.get("text"), f"{where}.text")
            # Parts have no line break between them, and the models were trained with one after a medium
            text = "\n" * (after_medium and not text.startswith("\n")) + text
            yield from reader.content(text, role, f"{where}.text")
        elif kind in ("image", "image_url", "video", "video_url"):
            word: Kind = "image" if kind.startswith("image") else "video"
            reader.keys.look(f"{word} part", part, where)
            source = next((part[key] for key in (kind, "url", "path", word) if not nothing(part.get(key))), None)
            if source is None and nothing(row.get(word)) and nothing(row.get(f"{word}s")):
                raise UserError(f"{where}: names no {word}, and the row has no {word}s; add its path or URL")
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


def _place(draft: _Draft, reader: RowReader) -> None:
    """Put the row's media in place of the marks, or at the default place."""
    users = [turn for turn in draft.turns if turn.role == "user"]
    if not users:
        raise UserError("no user's turn; expected a question before the first answer")
    named = any(isinstance(part, Media) for turn in users for part in turn.content)
    if draft.is_prompt and not named and not any(draft.media.values()):
        return
    for turn in users:
        turn.content = [p for part in turn.content for p in (_MARK.split(part) if isinstance(part, str) else [part])]
    unmarked: list[str | Media] = []
    for kind, media in draft.media.items():
        mark = f"<{kind}>"
        marks = sum(part == mark for turn in users for part in turn.content)
        if media and not marks:
            for turn in users:
                reader.note_marks("".join(part for part in turn.content if isinstance(part, str)))
            numbered = kind == "image" and len(media) > 1
            for n, medium in enumerate(media, start=1):
                unmarked += [f"Image-{n}: " if numbered else "", medium, "\n"]
            continue
        if marks != len(media):
            raise UserError(_mismatch(kind, marks, len(media)))
        source = iter(media)
        for turn in users:
            turn.content = [next(source) if part == mark else part for part in turn.content]
    users[0 if draft.media_first else -1].content[:0] = unmarked


def _mismatch(kind: str, marks: int, media: int) -> str:
    what = f"add the {kind} or drop a mark" if marks > media else f"add a mark or drop the {kind}"
    return f"{plural(marks, f'<{kind}> mark')} but {plural(media, kind)}; {what}"


def _ground(
    draft: _Draft, objects: Any, size: Size | None, compact: bool, reader: RowReader, reorient: Reorient | None
) -> None:
    """Replace grounding marks in all turns, in reading order."""
    objects = grounding.read(objects)
    for n, entry in enumerate(objects if isinstance(objects, list) else ()):
        reader.keys.look("object", entry, f"objects[{n}]")
    if isinstance(objects, dict):
        reader.keys.look("objects", objects, "objects")
    contents = [content for turn in draft.turns for content in (turn.thought, turn.content)]
    places = [(content, i, p) for content in contents for i, p in enumerate(content) if isinstance(p, str)]
    texts = [text for *_, text in places]
    if nothing(objects) and (draft.is_prompt or not any(grounding.MARK.search(text) for text in texts)):
        return
    images = [p for turn in draft.turns for p in turn.content if isinstance(p, Media) and p.kind == "image"]
    listed = draft.media["image"] or images

    @functools.cache  # a header is read once, however many boxes lie on the image
    def size_of(index: int) -> tuple[int, int]:
        if not 0 <= index < len(listed):
            raise UserError(f"objects: image index is {index}, the row has {len(listed)} (counted from 0)")
        return (size or _header_size)(listed[index].source)

    def reoriented(index: int, box: grounding.Box, pixels: bool) -> grounding.Box:
        known = reorient is not None and 0 <= index < len(listed)  # else a frame of a video, or another image
        return reorient(listed[index].source, box, pixels) if reorient and known else box

    for (content, i, _), text in zip(places, grounding.fill(texts, objects, size_of, compact, reoriented)):
        content[i] = text


def _header_size(source: Any) -> tuple[int, int]:
    from ivl.data.media.load import image_size

    return image_size(source)


def _check_turns(draft: _Draft) -> None:
    """Check that user and assistant alternate, and that no text is empty.

    The assistant may come first; not all templates write such a turn.
    """
    turns = draft.turns
    for n, turn in enumerate(turns):
        if n and turn.role == turns[n - 1].role:
            raise UserError(f"turn {n + 1} is by the {turn.role} again; expected user and assistant in turn")
        if turn.role == "user" and not any(part for part in turn.content if part != ""):
            raise UserError(f"turn {n + 1}: the user's text is empty; write a question or drop the turn")
    if turns[-1].role == "assistant" and not any(turns[-1].content) and turns[-1].is_prefix:
        raise UserError("the beginning of the answer (prefix) is empty; write it, or leave it out for a prompt")
    if turns[-1].role == "assistant" and not any(turns[-1].content):
        raise UserError("the last answer is empty: nothing to learn from; write it, or leave it out for a prompt")
