"""Keys of rows, turns, parts, objects and media: those that are read, those refused.

Each level of each format names the keys it reads. A key that is not read and would change the meaning of the row makes
it a row with a problem. All others are gathered in `Keys.unread`; `check` and `fit` list them with counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ivl.reasoning import CLOSING
from ivl.types import TRUTH, UserError, shortened

LOSS = (
    *("loss", "train", "weight", "loss_scale", "loss_weight"),
    *("training", "trainable", "train_on_turn", "loss_mask"),
)
"""Keys of several programs that say if a turn is trained on"""

WEIGHT = ("weight", "loss_weight", "loss_scale")
"""Keys of a row for its weight in the loss"""

_MOST_WEIGHT = 1e6

THOUGHT = ("reasoning_content", "reasoning", "thinking", "thinking_content")
"""Keys of several programs for the thought before an answer"""

PREFIX = "prefix"
"""Key that marks an answer as a beginning, from which the model goes on, as in chat APIs"""

REJECTED = ("rejected_response", "rejected_messages", "rejected_images", "rejected_objects")
"""Keys of the rejected answer in ms-swift's rows; `rejected_objects` are boxes for it that are not those of the row"""

SAMPLING = {
    "start": ("start", "video_start"),
    "end": ("end", "video_end"),
    "fps": ("fps",),
    "num_frames": ("num_frames", "nframes"),
    "max_frames": ("max_frames",),
}
"""Setting of one video → its keys, in our spelling and in Qwen's"""

_CUT = tuple(key for keys in SAMPLING.values() for key in keys)
_ROW = ("id", "source", "system", "tools", "image", "images", "video", "videos", "objects", *TRUTH)
READ: dict[str, frozenset[str]] = {
    level: frozenset(keys)
    for level, keys in {
        "query": (*_ROW, *_CUT, "query", "response", "history", PREFIX, *THOUGHT, *REJECTED, *LOSS),
        "conversations": (*_ROW, *_CUT, "conversations", *REJECTED, *LOSS),
        "messages": (*_ROW, *_CUT, "messages", *REJECTED, *LOSS),
        "question": (*_ROW, *_CUT, "question", "chosen", "rejected", *LOSS),
        "conversations turn": ("from", "value", PREFIX, *THOUGHT, *LOSS),
        "messages turn": ("role", "content", PREFIX, *THOUGHT, *LOSS),
        "assistant's message": ("role", "content", "tool_calls", PREFIX, *THOUGHT, *LOSS),
        "tool turn": ("role", "content", "from", "value", "name", "tool_call_id", *LOSS),
        "text part": ("type", "text"),
        "image part": ("type", "image", "image_url", "url", "path"),
        "video part": ("type", "video", "video_url", "url", "path", *_CUT),
        "image": ("bytes", "path", "url", "image"),
        "video": ("bytes", "path", "url", "video", *_CUT),
        "object": ("caption", "bbox", "bbox_type", "image", "image_id"),
        "objects": ("ref", "bbox", "bbox_type", "image_id"),
        "row without video": (),
        "row with video": _CUT,
    }.items()
}

_THOUGHT = "a row has several answers; write the thought beside its answer, in the turn, or remove the key"
_TOOLS = "this spelling is not read; write tools as `tools` of the row, calls as `tool_calls` of the assistant's turn"
_SOUND = "sound is not read; remove the key"
_FRAMES = "of a video are read: start, end, fps, num_frames and max_frames; write it so, or remove the key"
_NAMED_TWICE = "media of a turn are not read; name them in the row, or as parts of the content"
_MASK = "write loss: 0 (not learnt) or 1 (learnt) beside the turn, and remove the key"
_PART = "a part is not weighed by itself; write it beside the turn's role, or remove the key"

_THINKING = dict.fromkeys(THOUGHT, _THOUGHT)
_CALLS = dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), _TOOLS)
_AUDIO = dict.fromkeys(("audio", "audios"), _SOUND)
_SAMPLING = dict.fromkeys(
    (*("min_frames", "video_fps", "sample_fps", "start_time", "end_time", "start_frame", "end_frame"),),
    _FRAMES,
)
_MEDIA = dict.fromkeys(("image", "images", "video", "videos", "objects"), _NAMED_TWICE)
_MASKED = dict.fromkeys(("mask", "masked", "train_detail", "training_detail"), _MASK)
_WEIGHED = dict.fromkeys(LOSS, _PART)
REFUSED: dict[str, dict[str, str]] = {
    "query": _CALLS | _AUDIO,
    **dict.fromkeys(("conversations", "messages", "question"), _THINKING | _CALLS | _AUDIO),
    **dict.fromkeys(("conversations turn", "messages turn", "tool turn"), _CALLS | _AUDIO | _MEDIA | _MASKED),
    "assistant's message": _CALLS | _AUDIO | _MEDIA | _MASKED,
    "text part": _WEIGHED,
    "image part": _WEIGHED,
    "video part": _WEIGHED | _SAMPLING,
    "video": _SAMPLING,
    "row with video": _SAMPLING,
}
"""Level → key that changes the meaning → what to do"""

_PLACE = re.compile(r"\[\d+\]")


@dataclass
class Keys:
    """Keys of a row as its format reads it."""

    unread: dict[str, None] = field(default_factory=dict)
    """Names of keys that are not read, `messages[].name`; also marks of other programs"""

    def look(self, level: str, entry: Mapping[str, Any], name: str = "") -> None:
        """Gather the keys of an entry that its level does not read; `name`: name of the entry, such as `messages[3]`.

        Raises UserError for a key that would change the meaning. A key without a value has no effect.
        """
        refused = REFUSED.get(level, {})
        for key, value in entry.items():
            if key in READ[level]:
                continue
            path = f"{name}.{key}" if name else str(key)
            if key in refused:
                if not says_nothing(value):
                    raise UserError(f"{path}: {refused[key]}")
            elif value is not None:
                self.note(_PLACE.sub("[]", path))

    def note(self, text: str) -> None:
        """Gather the name of a key, or a text, that has no effect."""
        self.unread.setdefault(text if len(text) <= 120 else text[:117] + "...")


def says_nothing(value: Any) -> bool:
    """True for a value that stands for a missing one."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or value is False or (isinstance(value, (bytes, list, tuple, dict)) and len(value) == 0)


def is_trained(entry: Mapping[str, Any], name: str, role: Literal["user", "assistant", "system"]) -> bool | None:
    """True if a turn is to be learnt from, by its keys of LOSS; None where it has no such key.

    Raises UserError for a value between 0 and 1, and where a turn by another speaker is to be learnt.
    """
    flags = {key: _zero_or_one(entry[key], f"{name}.{key}") for key in LOSS if entry.get(key) is not None}
    if len(set(flags.values())) > 1:
        raise UserError(f"{name}: {' and '.join(flags)} do not agree; keep one")
    if role != "assistant" and any(flags.values()):
        raise UserError(f"{name}.{next(iter(flags))}: only an assistant's turn is learnt from; remove the key")
    return all(flags.values()) if flags else None


def thought_of(entry: Mapping[str, Any], name: str, answer: str | None) -> str | None:
    """Thought of a turn by its keys of THOUGHT, None without one. `answer`: text of an assistant, None of others.

    Raises UserError where another speaker's turn has one, and where the answer has one in its text.
    """
    keys = [key for key in THOUGHT if not says_nothing(entry.get(key))]
    if not keys:
        return None
    where = f"{name}.{keys[0]}" if name else keys[0]
    texts = [entry[key] for key in keys]
    if not isinstance(texts[0], str):
        raise UserError(f"{where}: expected the text of a thought, found {shortened(texts[0])}")
    if any(text != texts[0] for text in texts):
        raise UserError(f"{name + ': ' if name else ''}{' and '.join(keys)} do not agree; keep one")
    if not answer:
        raise UserError(f"{where}: a thought comes before an answer; write the answer, or remove the key")
    if CLOSING in answer or CLOSING in texts[0]:
        raise UserError(f"{where}: a thought apart, and {CLOSING} in the text; write it in one of the two places")
    return texts[0]


def is_prefix(entry: Mapping[str, Any], name: str, text: Any, last_answer: bool = True) -> bool:
    """True if an entry's text is the beginning of the answer that is asked for.

    `last_answer`: True for the last turn, where the assistant speaks. Raises UserError elsewhere, and without a text.
    """
    value = entry.get(PREFIX)
    if value is None or value is False:
        return False
    if value is not True:
        raise UserError(f"{name}{PREFIX}: expected true or false, found {shortened(value)}")
    if not last_answer:
        raise UserError(f"{name}{PREFIX}: only the last turn, by the assistant, can begin the answer; remove the key")
    if not text:
        raise UserError(f"{name}{PREFIX}: the beginning of the answer is empty; write it, or leave it out for a prompt")
    return True


def weight_of(row: Mapping[str, Any]) -> float:
    """Weight of a row in the loss, by its keys of WEIGHT; 1 where it has none.

    Raises UserError for a weight that is not above 0, and where another key of LOSS says that a row is not learnt.
    """
    for key in LOSS:
        if key not in WEIGHT and row.get(key) is not None and not _is_one(row[key]):
            raise UserError(
                f"{key}: expected 1 or true, found {shortened(row[key])}; write it beside a turn, give the row a "
                "weight above 0, or leave it out"
            )
    weights = {key: _number(row[key]) for key in WEIGHT if row.get(key) is not None}
    for key, weight in weights.items():
        if weight is None or not 0 < weight <= _MOST_WEIGHT:
            raise UserError(
                f"{key}: expected a number above 0, at most {_MOST_WEIGHT:,.0f}, found {shortened(row[key])}; leave "
                "out a row that is not to be learnt"
            )
    if len(set(weights.values())) > 1:
        raise UserError(f"{' and '.join(weights)} do not agree; keep one")
    return next((weight for weight in weights.values() if weight is not None), 1.0)


def _is_one(value: Any) -> bool:
    return _number(value) == 1 or value is True


def _number(value: Any) -> float | None:
    """Number of a cell, which is a text in csv files; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _zero_or_one(value: Any, name: str) -> bool:
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise UserError(
        f"{name}: expected 0 or 1 (true or false), found {shortened(value)}; a turn is learnt from or it is not, "
        "a weight is of the whole row"
    )


FOREIGN = re.compile(
    r"<\|(?:image|video|audio|vision_start|vision_end|image_pad|video_pad|image_\d+|media_pad|media_begin|endofchunk)\|>"
    r"|<(?:IMAGE|VIDEO|Image|ImageHere|IMG_CONTEXT|image_placeholder|image_pad|image_soft_token|start_of_image|im_patch"
    r"|media|image_\d+|image\d+|audio)>"
    r"|\[(?:IMG|IMAGE)\]|<__media__>"
)
"""Marks that stand for media in other programs; plain characters here"""
