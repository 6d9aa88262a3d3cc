"""Row formats: a row of any format → Conversation.

Each format is one function; the keys of a row tell its format.
- `query` (ms-swift): query, response, history, system, images, videos, objects
- `conversations` (OpenGVLab, LLaVA): from human / gpt / system, image, video (`ivl.data.rows.dialogues`)
- `messages` (OpenAI): role user / assistant / system, content a text or a list of parts, images, videos
- `question` (OpenGVLab's MMPR): question, chosen, rejected

Calls of tools and their results become texts (`ivl.data.rows.tools`).

Media replace the marks `<image>` and `<video>` in users' texts, in order over the whole conversation. Without any mark
they come first in the last user's turn (`conversations`: in the first, as OpenGVLab has it). `<img>path</img>` in a
user's text is an image at that place. `prefix: true` beside the last answer makes the row a prompt, and that text the
beginning of the answer (`Conversation.prefix`). The keys that are read are in `ivl.data.rows.keys`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ivl.data.rows import grounding
from ivl.data.rows.dialogues import from_conversations, from_messages
from ivl.data.rows.draft import Draft, Turn, system_of, thought_parts
from ivl.data.rows.keys import REFUSED, SAMPLING, is_prefix, weight_of
from ivl.data.rows.preferences import answers, has_answers
from ivl.data.rows.row_reader import Row, RowReader, nothing, optional_name, text_of
from ivl.data.rows.tools import tools_text
from ivl.system_text import system_text
from ivl.types import TRUTH, Conversation, Media, Message, UserError, plural
from ivl.types import shortened as short

Size = Callable[[Any], tuple[int, int]]
Reorient = Callable[[Any, grounding.Box, bool], grounding.Box]

_MARK = re.compile(r"(<image>|<video>)")


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
    draft = _FORMATS[kinds[0]](row, reader)
    draft.media = {"image": reader.media(row, "image"), "video": reader.media(row, "video")}
    if not draft.media["video"]:
        reader.keys.look("row without video", {key: row.get(key) for keys in SAMPLING.values() for key in keys})
    if any(medium.kind == "video" for medium in _all_media(draft)):
        reader.keys.look("row with video", {key: row[key] for key in REFUSED["row with video"] if key in row})
    _place(draft, reader)
    _ground(draft, row.get("objects"), size, compact, reader, reorient)
    _check_turns(draft)
    messages = tuple(_message(turn) for turn in draft.turns)
    messages, prefix = (messages[:-1], messages[-1].text) if draft.turns[-1].is_prefix else (messages, "")
    truth = {key: row[key] for key in TRUTH if row.get(key) is not None}
    name, source = optional_name(row, "id"), optional_name(row, "source") or ""
    unread = tuple(sorted(reader.keys.unread))
    named: dict[str, Any] = {"id": name, "where": where, "source": source, "truth": truth, "unread": unread}
    named |= {"weight": weight_of(row), "tools": tools_text(row.get("tools"))}
    named["uses_tools"] = bool(named["tools"]) or any(turn.is_tool for turn in draft.turns)
    return Conversation(messages, system_text(draft.system), prefix=prefix, **named)


def _message(turn: Turn) -> Message:
    marked = turn.learnt is not None
    return Message(turn.role, _joined(turn.content), turn.learnt is not False, turn.reasoning, marked)


def _all_media(draft: Draft) -> Iterator[Media]:
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


def _from_query(row: Row, reader: RowReader) -> Draft:
    turns = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise UserError(f"history: expected a list of [query, response] pairs, found {short(history)}")
    for n, pair in enumerate(history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(f"history[{n}]: expected [query, response], found {short(pair)}")
        turns.append(Turn("user", reader.user_text(pair[0], f"history[{n}][0]")))
        turns.append(Turn("assistant", [text_of(pair[1], f"history[{n}][1]")]))
    turns.append(Turn("user", reader.user_text(row["query"], "query")))
    begins = is_prefix(row, "", row.get("response"))
    if row.get("response") is not None:
        turns.append(Turn("assistant", [text_of(row["response"], "response")], is_prefix=begins))
    turns[-1].thought = thought_parts(row, "", turns[-1])
    return Draft(turns, system_of(row))


def _from_question(row: Row, reader: RowReader) -> Draft:
    if row.get("chosen") is None:
        raise UserError("chosen: not given; expected the better answer, beside question and rejected")
    turns = [Turn("user", reader.user_text(row["question"], "question"))]
    return Draft([*turns, Turn("assistant", [text_of(row["chosen"], "chosen")])], system_of(row))


_FORMATS: dict[str, Callable[[Row, RowReader], Draft]] = {
    "query": _from_query,
    "conversations": from_conversations,
    "messages": from_messages,
    "question": _from_question,
}


def _place(draft: Draft, reader: RowReader) -> None:
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
    draft: Draft, objects: Any, size: Size | None, compact: bool, reader: RowReader, reorient: Reorient | None
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


def _check_turns(draft: Draft) -> None:
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
