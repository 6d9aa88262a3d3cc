"""Facts of a row beside its lengths, for `check`: turns, media, boxes, and a digest to find duplicates."""

from __future__ import annotations

import hashlib
import os

from ivl.data.rows.grounding import parse_boxes
from ivl.types import Conversation

FIELDS = [("turns", "<u2"), ("media", "<u2"), ("boxes", "<u2"), ("same", "<u8")]
"""Answers, images and videos, boxes in all texts (at most 65535 of each); `same` is equal for rows of equal text and
media"""


def facts_of(conversation: Conversation) -> tuple[int, int, int, int]:
    """Values of FIELDS of a row."""
    answers = sum(message.role == "assistant" for message in conversation.messages)
    boxes = sum(len(group) for message in conversation.messages for _, group in parse_boxes(message.text))
    digest = hashlib.blake2b(digest_size=8)
    for message in conversation.messages:
        digest.update(f"\0{message.role}\0{message.text}".encode())
    for medium in conversation.media:
        digest.update(f"\0{medium.start}\0{medium.end}\0".encode() + _source(medium.source))
    turns, media, groups = (min(count, 0xFFFF) for count in (answers, len(conversation.media), boxes))
    return turns, media, groups, int.from_bytes(digest.digest(), "little")


def _source(source: object) -> bytes:
    if isinstance(source, (bytes, bytearray)):
        return bytes(source)
    return os.fsencode(source) if isinstance(source, (str, os.PathLike)) else repr(source).encode()
