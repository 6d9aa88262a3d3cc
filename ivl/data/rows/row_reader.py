"""Reader of a row's fields: texts, media in every spelling, and `<img>path</img>` in a text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ivl.data.rows.keys import FOREIGN, SAMPLING, Keys
from ivl.types import Media, UserError
from ivl.types import shortened as short

Row = dict[str, Any]
Kind = Literal["image", "video"]

_PATH = re.compile(r"<img>([^<>]+)</img>")
_OPENED = re.compile(r"<img>([^<>\n]*)")
_PICTURE = re.compile(r"\S\.(?:jpe?g|png|gif|webp|bmp|tiff?)$|^(?:https?://|data:)", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.IGNORECASE)


def nothing(value: Any) -> bool:
    """True for a field without a value."""
    return value is None or (isinstance(value, (str, bytes, list, tuple, dict)) and len(value) == 0)


def text_of(value: Any, name: str) -> str:
    """Check that a field is a text. Raises UserError that begins with its name."""
    if not isinstance(value, str):
        raise UserError(f"{name}: expected a text, found {'nothing' if value is None else short(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{name}: half a surrogate pair at character {error.start}; write the text as UTF-8"
            ) from None
    return value


def optional_text(row: Row, key: str) -> str | None:
    """Text of a key, or None where the row has none."""
    return None if row.get(key) is None else text_of(row[key], key)


def optional_name(row: Row, key: str) -> str | None:
    """Value of a key as text, or None where the row has none."""
    value = row.get(key)
    return value if value is None else str(value)


class RowReader:
    """Reader of one row. Relative paths of media start at `root`; `keys` gathers keys that are not read."""

    def __init__(self, root: str | Path | None) -> None:
        self.root = root
        self.keys = Keys()

    def resolved(self, path: str) -> str:
        """Join a path to `root`; an absolute path, a URL and a `data:` URI stay as they are."""
        if self.root is None or os.path.isabs(path) or _SCHEME.match(path):
            return path
        return os.path.join(self.root, path)

    def user_text(self, value: Any, name: str) -> list[str | Media]:
        """Split a user's text into texts and the images of `<img>path</img>`."""
        text = text_of(value, name)
        if "<img>" not in text:
            return [text]
        parts: list[str | Media] = []
        for n, part in enumerate(_PATH.split(text)):
            if n % 2:
                parts.append(self.medium("image", part.strip(), "<img>"))
            else:
                self._check_unclosed(part, name)
                parts.append(part)
        return parts

    def content(self, value: Any, role: str, name: str) -> list[str | Media]:
        """Parts of a text of any speaker; `<img>path</img>` is an image in a user's text only."""
        return self.user_text(value, name) if role == "user" else [text_of(value, name)]

    def _check_unclosed(self, text: str, name: str) -> None:
        """Raise UserError for `<img>` before a path without `</img>`; other text after it is plain characters."""
        for match in _OPENED.finditer(text):
            words = match[1].strip()
            for path in (words, words.partition(" ")[0]):
                if path and (_PICTURE.search(path) or (len(path) < 4096 and os.path.isfile(self.resolved(path)))):
                    raise UserError(f"{name}: <img> without </img> before {short(path)}; write <img>path</img>")
            self.keys.note("<img> without </img>, plain characters in a user's text")

    def note_marks(self, text: str) -> None:
        """Gather marks of other programs in a text."""
        for mark in dict.fromkeys(FOREIGN.findall(text)):
            self.keys.note(f"{mark}, a mark of another program, plain characters in a user's text")

    def media(self, row: Row, kind: Kind) -> list[Media]:
        """Media of one kind that the row lists, in any spelling."""
        keys = [key for key in (kind, f"{kind}s") if not nothing(row.get(key))]
        if not keys:
            return []
        if len(keys) == 2:
            raise UserError(f"{keys[0]} and {keys[1]}: both are given; keep one")
        name, value = keys[0], row[keys[0]]
        if isinstance(value, str):
            # a comma belongs to a data: URI, and may belong to a name
            one = value[:5].lower() == "data:" or os.path.exists(self.resolved(value))
            value = [value] if one else [part.strip() for part in value.split(",")]
        elif not isinstance(value, (list, tuple)):
            value = [value]
        media = [self.medium(kind, source, f"{name}[{n}]") for n, source in enumerate(value)]
        if kind == "image":
            return media
        settings = _settings(row, "", len(media))
        return [replace(medium, **of_row) if of_row else medium for medium, of_row in zip(media, settings, strict=True)]

    def medium(self, kind: Kind, source: Any, name: str) -> Media:
        """Read one image or video: a path, a URL, bytes, a picture, frames, or an object around one of them."""
        settings: dict[str, Any] = {}
        if isinstance(source, dict):  # as Hugging Face datasets has it, and a video with its own times
            self.keys.look(kind, source, name)
            if kind == "video":
                (settings,) = _settings(source, f"{name}.", 1)
            source = next((source[key] for key in ("bytes", "path", "url", kind) if source.get(key)), None)
        if kind == "video" and isinstance(source, (list, tuple)) and source:
            frames = [self.medium("image", frame, f"{name}[{n}]").source for n, frame in enumerate(source)]
            return Media(kind, frames, **settings)
        if nothing(source) or isinstance(source, (bool, int, float, dict, list, tuple)):
            raise UserError(f"{name}: expected a path, URL, data: URI, bytes or image, found {short(source)}")
        if isinstance(source, (str, os.PathLike)):
            source = self.resolved(text_of(os.fspath(source), name))
        return Media(kind, source, **settings)

    def part_medium(self, kind: Kind, part: Row, source: Any, name: str) -> Media:
        """Medium that a part of a content names; a video's part may hold its times."""
        medium = self.medium(kind, source, name)
        return medium if kind == "image" else replace(medium, **_settings(part, f"{name}.", 1)[0])


def _settings(entry: Row, name: str, count: int) -> list[dict[str, Any]]:
    """Settings of each of `count` videos, from the keys of an entry: one value for all, or a list.

    Raises UserError that begins with the name of the key.
    """
    settings: list[dict[str, Any]] = [{} for _ in range(count)]
    for setting, keys in SAMPLING.items():
        present = [key for key in keys if entry.get(key) is not None]
        if len(present) > 1:
            raise UserError(f"{name}{present[0]} and {present[1]}: both are given; keep one")
        for key in present:
            values = entry[key] if isinstance(entry[key], list) else [entry[key]] * count
            if len(values) != count:
                raise UserError(f"{name}{key}: {len(values)} values but {count} videos")
            for of_video, value in zip(settings, values, strict=True):
                if value is not None:
                    of_video[setting] = _EXPECTED[setting](value, f"{name}{key}")
    if any("fps" in one and "num_frames" in one for one in settings):
        raise UserError(f"{name}fps and num_frames: frames by their rate or by their number; keep one")
    return settings


def _seconds(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise UserError(f"{name}: expected seconds, found {short(value)}")
    return float(value)


def _rate(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e4:
        raise UserError(f"{name}: expected frames per second above 0, found {short(value)}")
    return float(value)


def _frames(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < 1e6 or value != int(value):
        raise UserError(f"{name}: expected a number of frames, found {short(value)}")
    return int(value)


_EXPECTED: dict[str, Callable[[Any, str], Any]] = {
    "start": _seconds,
    "end": _seconds,
    "fps": _rate,
    "num_frames": _frames,
    "max_frames": _frames,
}
"""Setting of a video → the check of its value"""
