"""Structure of a JPEG: its markers up to the end, which decoders do not ask for."""

from __future__ import annotations

import re

_MOST_SCANS = 100
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
"""A marker; within a scan, 0 and the restart markers belong to its data"""
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA


def check_jpeg(data: bytes) -> None:
    """Raise OSError where the end marker is missing, or a JPEG is made to take long.

    Without its end a decoder may invent the rest, or leave it blurred. Bytes behind the end are passed over: phones
    keep a clip there (motion photos), or another picture.
    """
    at, scans = 2, 0
    while found := _MARKER.search(data, at):
        kind, at = found[1][0], found.end()
        if kind == _END:
            return
        if kind in (0x01, _START):
            continue
        scans += kind == _SCAN
        if scans > _MOST_SCANS:
            raise OSError(f"a JPEG of more than {_MOST_SCANS} scans, made to take long; expected about 10")
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    raise OSError("truncated JPEG: its end marker is missing")
