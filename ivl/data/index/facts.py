"""Facts of a row beside its lengths, for `check`: turns, media, boxes, and a digest to find duplicates."""

from __future__ import annotations

import hashlib
import os

from ivl.data.rows.grounding import parse_boxes
from ivl.types import Conversation

FIELDS = [("turns", "<u2"), ("media", "<u2"), ("boxes", "<u2"), ("same", "<u8"), ("weight", "<f2")]
"""Answers, images and videos, boxes in all texts (at most 65535 of each); `same` is equal for rows of equal text and
media; `weight`: of the row in the loss, without its source's"""


def facts_of(conversation: Conversation) -> tuple[int, int, int, int, float]:
    """Values of FIELDS of a row."""
    answers = sum(message.role == "assistant" for message in conversation.messages)
    boxes = sum(len(group) for message in conversation.messages for _, group in parse_boxes(message.text))
    digest = hashlib.blake2b(digest_size=8)
    for message in conversation.messages:
        digest.update(f"\0{message.role}\0{message.text}".encode())
    digest.update(conversation.tools.encode())
    for medium in conversation.media:
        cut = (medium.start, medium.end, medium.fps, medium.num_frames, medium.max_frames)
        digest.update(f"\0{cut}\0".encode() + _source(medium.source))
    turns, media, groups = (min(count, 0xFFFF) for count in (answers, len(conversation.media), boxes))
    same = int.from_bytes(digest.digest(), "little")
    return turns, media, groups, same, min(conversation.weight, 65504.0)


def _source(source: object) -> bytes:
    if isinstance(source, (bytes, bytearray)):
        return bytes(source)
    return os.fsencode(source) if isinstance(source, (str, os.PathLike)) else repr(source).encode()
