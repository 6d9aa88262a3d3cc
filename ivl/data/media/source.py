"""Sources of media: path, URL, `data:` URI or bytes, opened; file kinds by the first bytes.

Text never counts as a video: ffmpeg would follow a playlist to files and addresses that no row named.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from ivl.data.media.download import fetch
from ivl.data.object_store import fetch_object, is_object
from ivl.options import FetchPolicy
from ivl.storage.picture_file import open_regular
from ivl.types import UserError

HEAD = 512
"""Number of bytes that `kind_of` needs"""

_MAGIC = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"\0\0\0\x0cjP  ", "JPEG2000"),
    (8, b"WEBP", "WEBP"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIF"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftyp", "video"),
    (4, b"moov", "video"),
    (4, b"mdat", "video"),
    (4, b"free", "video"),
    (4, b"skip", "video"),
    (4, b"wide", "video"),
    (0, b"\x1aE\xdf\xa3", "video"),  # Matroska, WebM
    (8, b"AVI ", "video"),
    (0, b"FLV\x01", "video"),
    (0, b"OggS", "video"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "video"),  # ASF, WMV
    (0, b"\0\0\x01", "video"),  # MPEG program or elementary stream
    (0, b"\0\0\0\x01", "video"),  # raw H.264 or H.265
    (188, b"G", "video"),  # MPEG transport stream: packets of 188 bytes
    (0, b"%PDF", "PDF"),
    (0, b"PK\x03\x04", "zip"),
)
"""Offset, bytes, kind; the first that fits"""


def is_url(source: str) -> bool:
    """True for an http(s) URL or an object in a store, which must be fetched to be opened."""
    return source[:8].lower().startswith(("http://", "https://")) or is_object(source)


def kind_of(head: bytes) -> str | None:
    """Kind of a file by its first bytes: an image format, "video", another kind, or None where it is not known."""
    for offset, magic, kind in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return kind
    return None


def content(head: bytes) -> str:
    """Description of a file's content for a message."""
    kind = kind_of(head)
    if kind:
        return f"{kind} data, damaged or of a sort that is not supported"
    text = head[:60].decode("utf-8", "replace").strip()
    if text and sum((c.isprintable() and c != "\ufffd") or c.isspace() for c in text) > 0.9 * len(text):
        return f"text that begins with {text[:40]!r}"
    if not head.strip(b"\0"):
        return "nothing but zeros"
    return f"data that begins with {head[:8].hex(' ')}"


def describe(source: Any) -> str:
    """Short name of a source for messages; never its content."""
    if isinstance(source, Image.Image):
        return f"PIL image {source.mode} {source.width}x{source.height}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    if isinstance(source, (list, tuple)):
        return f"list of {len(source)} frames"
    if not isinstance(source, (str, os.PathLike)):
        return type(source).__name__
    text = str(source)
    if text[:5].lower() == "data:":
        return f"{text[:40].split(',')[0]} URI of {len(text)} characters"
    return text if len(text) <= 500 else f"{text[:500]}…"


def open_source(source: Any, policy: FetchPolicy, check: Callable[[BinaryIO], None]) -> BinaryIO:
    """Seekable stream over a path, http(s) URL, `data:` URI or bytes; not empty. That of a local file has a `name`.

    `check` gets a download before it enters the cache, and raises UserError where it is not the expected medium.
    """
    where = describe(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _memory(bytes(source), where)
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(
            f"{where}: cannot be opened; expected a path, an http(s) URL, a data: URI, bytes or a PIL image"
        )
    text = os.fsdecode(source)
    if text[:5].lower() == "data:":
        return _memory(_data_uri(text, where), where)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", text)
    if scheme and scheme[1].lower() in ("http", "https"):
        return open(fetch(text, policy, lambda path: _checked(path, check)), "rb")
    if is_object(text):
        return open(fetch_object(text, policy, lambda path: _checked(path, check)), "rb")
    if scheme:
        raise UserError(
            f"{where}: {scheme[1]}:// is not opened; expected a local path, http(s)://, data:, s3://, gs:// or oss://"
        )
    return open_regular(text, where)


def _checked(path: Path, check: Callable[[BinaryIO], None]) -> None:
    with open(path, "rb") as opened:
        check(opened)


def _memory(data: bytes, where: str) -> BinaryIO:
    if not data:
        raise UserError(f"{where}: empty; expected the content of an image or a video")
    return io.BytesIO(data)


def _data_uri(text: str, where: str) -> bytes:
    header, comma, body = text.partition(",")
    if not comma:
        raise UserError(f"{where}: not a data: URI; expected data:image/png;base64,… with a comma")
    try:
        if not header.lower().endswith(";base64"):
            return urllib.parse.unquote_to_bytes(body)
        body = urllib.parse.unquote(body) if "%" in body else body
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where}: its base64 is damaged ({error})") from None
