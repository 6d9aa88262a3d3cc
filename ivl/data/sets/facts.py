"""Facts of rows for `check` beside lengths: turns, media, boxes, duplicates; cached on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

import ivl
from ivl.data.cache import default_cache, optional
from ivl.data.rows.grounding import parse_boxes
from ivl.data.sets.dataset import RowDataset
from ivl.data.worker_loader import WorkerLoader
from ivl.files import whole_file
from ivl.types import Conversation

FACTS = np.dtype([("turns", "<i4"), ("media", "<i4"), ("boxes", "<i4"), ("same", "<u8")])
"""Record of a row: answers, images and videos, boxes in all texts; `same` is equal for rows of equal text and media"""
_CHUNK = 256


def read_facts(
    rows: RowDataset,
    usable: np.ndarray,
    workers: int = 0,
    cache_dir: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
    media: bytes = b"",
) -> np.ndarray:
    """Records of FACTS, (rows,); zeros where `usable` (rows,) is False. `progress`: called with rows done.

    `media`: sizes and times of the rows' media, which decide their boxes.
    """
    path = _place(rows, usable, media, Path(cache_dir or default_cache()) / "facts")
    facts = _load(path, len(rows))
    if facts is not None:
        return facts
    facts, numbers, done = np.zeros(len(rows), FACTS), np.flatnonzero(usable), 0
    chunks = [numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK)]
    loader = WorkerLoader(
        _Facts(rows),
        batch_size=None,
        sampler=chunks,
        num_workers=min(workers, len(chunks) // 8),
        collate_fn=_as_it_is,
        generator=torch.Generator(),
    )
    for chunk, part in zip(chunks, loader):
        facts[chunk] = part
        done += len(chunk)
        if progress is not None:
            progress(done)
    _save(path, facts)
    return facts


def facts_of(conversation: Conversation) -> tuple[int, int, int, int]:
    """Fields of FACTS of a row."""
    answers = sum(message.role == "assistant" for message in conversation.messages)
    boxes = sum(len(group) for message in conversation.messages for _, group in parse_boxes(message.text))
    digest = hashlib.blake2b(digest_size=8)
    for message in conversation.messages:
        digest.update(f"\0{message.role}\0{message.text}".encode())
    for medium in conversation.media:
        digest.update(f"\0{medium.start}\0{medium.end}\0".encode() + _source(medium.source))
    return answers, len(conversation.media), boxes, int.from_bytes(digest.digest(), "little")


def _source(source: object) -> bytes:
    if isinstance(source, (bytes, bytearray)):
        return bytes(source)
    return os.fsencode(source) if isinstance(source, (str, os.PathLike)) else repr(source).encode()


class _Facts(Dataset):
    def __init__(self, rows: RowDataset) -> None:
        self.rows = rows

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return np.array([facts_of(self.rows.conversation(int(n))) for n in numbers], FACTS)


def _as_it_is(value: Any) -> Any:
    return value


def _place(rows: RowDataset, usable: np.ndarray, media: bytes, folder: Path) -> Path:
    files = [(file.digest, str(Path(rows.root or file.path.parent).absolute())) for file in rows.files]
    settings = repr((ivl.__version__, files, rows.as_prompt, FACTS.descr)).encode()
    selection = np.ascontiguousarray(rows.numbers).tobytes() + np.packbits(usable).tobytes() + media
    return folder / f"{hashlib.blake2b(settings + selection, digest_size=16).hexdigest()}.npy"


def _load(path: Path, count: int) -> np.ndarray | None:
    try:
        facts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return facts if facts.dtype == FACTS and len(facts) == count else None


def _save(path: Path, facts: np.ndarray) -> None:
    with optional(path), whole_file(path) as out:
        np.save(out, facts)
