"""Opening of picture files within limits: regular files, known formats, bounded sizes."""

from __future__ import annotations

import os
import re
import stat
import threading
from typing import BinaryIO

from PIL import Image

from ivl.errors import UserError

Image.init()
FORMATS = tuple(f for f in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if f in Image.OPEN)
"""Formats that are opened; Pillow's other plugins are not (EPS, for one, starts Ghostscript)."""
MAX_PIXELS = 89_478_485
"""Pixels above which Pillow starts to warn; at twice that it refuses by itself."""
MAX_SIDE = 65_500
"""Longest side in pixels: to resize a picture of 1 x 80,000,000 would need 100 times its memory."""
MAX_BYTES = 1 << 30
_PILLOW = threading.Lock()


def open_regular(path: str, where: str) -> BinaryIO:
    """Open a file that is no device, pipe or folder, and not empty. Raises UserError."""
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and status.st_size:
            return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{where}: no such file; expected an absolute path or one seen from {os.getcwd()}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be opened ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISREG(status.st_mode):
        raise UserError(f"{where}: the file is empty (0 bytes); copy it again or remove the row")
    kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
    raise UserError(f"{where}: expected a file, found {kind}")


def open_picture(
    opened: BinaryIO, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """Open a picture with Pillow, its limit raised where `max_pixels` is higher. Raises Pillow's errors."""
    size = opened.seek(0, os.SEEK_END)
    if size > max_bytes:
        raise OSError(f"a file of {size} bytes, above the limit of {max_bytes}")
    opened.seek(0)
    if max_pixels <= (Image.MAX_IMAGE_PIXELS or max_pixels):
        return Image.open(opened, formats=formats)
    with _PILLOW:  # the limit is the whole process's, and is looked at while the header is read
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            return Image.open(opened, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def check_size(size: tuple[int, int], where: str, max_pixels: int = MAX_PIXELS, max_side: int = MAX_SIDE) -> None:
    """Raise UserError for a picture that is too large, or has no pixel."""
    width, height = size
    if width < 1 or height < 1:
        raise UserError(f"{where}: an image of {width} x {height} pixels; expected at least 1 x 1")
    if width * height > max_pixels:
        raise UserError(
            f"{where}: {width} x {height} pixels, above the limit of {max_pixels} (max_pixels); scale it down"
        )
    if max(size) > max_side:
        raise UserError(f"{where}: {width} x {height} pixels, a side above {max_side} (max_side); cut it")


_MOST_SCANS = 100
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
"""Marker of a JPEG; within a scan, 0 and the restart markers belong to its data."""
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA


def check_jpeg(data: bytes) -> None:
    """Raise OSError where the end marker is missing, or a JPEG is made to take long.

    Without its end a decoder may invent the rest, or leave it blurred. Bytes behind the end are passed over: phones
    keep a clip there (motion photos), or another picture.
    """
    at, scans = 2, 0
    while marker := _MARKER.search(data, at):
        kind, at = marker[1][0], marker.end()
        if kind == _END:
            return
        if kind in (0x01, _START):
            continue
        scans += kind == _SCAN
        if scans > _MOST_SCANS:
            raise OSError(f"a JPEG of more than {_MOST_SCANS} scans, made to take long; expected about 10")
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    raise OSError("truncated JPEG: its end marker is missing")
