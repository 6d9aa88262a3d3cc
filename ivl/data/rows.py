"""Files of rows, read at random without being loaded: jsonl, a JSON list, and both compressed.

What a file holds is seen from its content, since rows one a line are often named `.json` and lists `.jsonl`.
"""

from __future__ import annotations

import gzip
import hashlib
import mmap
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ivl.data.cache import default_cache, go_without, temporary, writable
from ivl.data.formats import loads
from ivl.files import whole_file
from ivl.types import UserError, printable

_CHUNK = 1 << 24
_BLANK = 16
"""Bytes of the shortest line that is not looked at for being blank; a row is longer"""
_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


class RowFile:
    """One file of rows. Picklable; opened anew in each process.

    Blank lines hold no row. Compressed files (.gz, .zst) are decompressed once, into `cache_dir`.
    Raises UserError where there is no file, no row, or the file as a whole cannot be read.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None) -> None:
        self.path = Path(path)
        try:
            self._plain = _decompressed(self.path, Path(cache_dir or default_cache()))
            with open(self._plain, "rb") as opened:
                listed = _is_list(opened, self.path)
                scan = _scan_list if listed else _scan_lines
                self._starts, self._ends, self._lines, self.digest = scan(opened, self.path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; expected rows as jsonl or a JSON list") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        if not len(self._starts):
            raise UserError(f"{path}: no rows; expected at least one JSON object")
        self._listed = listed
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, i: int) -> str:
        """`file:line` of row `i`, for messages."""
        return f"{printable(str(self.path), ' ')}:{self._line(i)}"

    def raw(self, i: int) -> bytes:
        """Row `i` as it stands in the file."""
        if self._descriptor is None:
            self._descriptor = os.open(self._plain, os.O_RDONLY)
        start, end = int(self._starts[i]), int(self._ends[i])
        return os.pread(self._descriptor, end - start, start)

    def __getitem__(self, i: int) -> Any:
        """Row `i`. Raises UserError with `file:line` where it is not JSON."""
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        try:
            return loads(self.raw(i))
        except RecursionError:
            raise UserError(f"{self.where(i)}: nested too deeply; expected an object such as {_EXAMPLE}") from None
        except ValueError as error:
            reason = re.sub(r": line \d+ column (\d+) \(char \d+\)", r", at character \1", str(error))
            shape = "a list of JSON objects" if self._listed else "one JSON object a line"
            raise UserError(f"{self.where(i)}: not JSON ({reason}); expected {shape}, such as {_EXAMPLE}") from None

    def _line(self, i: int) -> int:
        return int(self._lines[i]) if self._lines is not None else int(i) + 1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if (descriptor := getattr(self, "_descriptor", None)) is not None:
            os.close(descriptor)


_EXAMPLE = '{"query": "…", "response": "…"}'


def load_rows(path: str | Path, cache_dir: str | Path | None = None) -> Iterator[tuple[str, Any]]:
    """`file:line` and row, of every row of a file in order."""
    file = RowFile(path, cache_dir)
    for i in range(len(file)):
        yield file.where(i), file[i]


def _is_list(opened: BinaryIO, path: Path) -> bool:
    """Whether a file is one JSON list rather than a row a line."""
    head = opened.read(4096)
    opened.seek(0)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: in UTF-16; expected UTF-8, save it as such")
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        return True
    if first not in (b"{", b""):
        found = head[:40].decode("utf-8", "replace")
        raise UserError(f"{path}:1: expected JSON objects, such as {_EXAMPLE}, found {found!r}")
    if first == b"{":
        line = opened.readline(1 << 20).strip()
        opened.seek(0)
        if line in (b"{", b"\xef\xbb\xbf{"):
            raise UserError(
                f"{path}: one JSON object over several lines; expected a row a line or a list of rows "
                f"(a file that names several sources is given as a meta file)"
            )
    return False


def _scan_lines(opened: BinaryIO, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, str]:
    """Start and end of each line that is not blank, its number where some are, and the digest of the content."""
    digest = hashlib.blake2b(digest_size=16)
    ends, size = [], 0
    while chunk := opened.read(_CHUNK):
        digest.update(chunk)
        ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + size)
        size += len(chunk)
    end = np.concatenate([*ends, [size]]).astype(np.int64)
    start = np.concatenate([[0], end[:-1] + 1]).astype(np.int64)
    blank = [i for i in np.flatnonzero(end - start < _BLANK) if not _read(opened, start[i], end[i]).strip()]
    if not len(blank):
        return start, end, None, digest.hexdigest()
    kept = np.delete(np.arange(len(start)), blank)
    numbers = kept + 1 if len(kept) and kept[-1] != len(kept) - 1 else None
    return start[kept], end[kept], numbers, digest.hexdigest()


def _read(opened: BinaryIO, start: int, end: int) -> bytes:
    return os.pread(opened.fileno(), max(0, int(end) - int(start)), int(start))


def _scan_list(opened: BinaryIO, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Start, end and line of each element of a JSON list, without parsing them."""
    starts: list[int] = []
    ends: list[int] = []
    with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        depth, closed, previous = 0, False, data.find(b"[")
        for found in _STRUCTURE.finditer(data):
            mark = data[found.start() : found.start() + 1]
            if mark in b"[{":
                if depth == 1:
                    gap = data[previous + 1 : found.start()].strip()
                    if mark == b"[" or gap != (b"," if starts else b""):
                        raise _not_a_list(data, found.start(), path)
                    starts.append(found.start())
                depth += 1
            elif mark in b"]}":
                depth -= 1
                if depth == 1:
                    ends.append(found.end())
                    previous = found.end() - 1
                if depth == 0:
                    gap, rest = data[previous + 1 : found.start()].strip(), data[found.end() :].strip()
                    if gap or rest or mark == b"}":
                        raise _not_a_list(data, found.start() if gap else found.end(), path)
                    closed = True
                    break
            elif depth == 1:
                raise _not_a_list(data, found.start(), path)
        if not closed:
            raise UserError(f"{path}: the JSON list has no end; is the file complete?")
        lines, line, at = [], 1, 0
        for start in starts:
            line += data[at:start].count(b"\n")
            at = start
            lines.append(line)
    return np.array(starts, np.int64), np.array(ends, np.int64), np.array(lines, np.int64), digest


def _not_a_list(data: mmap.mmap, at: int, path: Path) -> UserError:
    line = data[:at].count(b"\n") + 1
    found = data[at : at + 30].decode("utf-8", "replace")
    return UserError(f"{path}:{line}: expected a list of JSON objects, such as [{_EXAMPLE}], found {found!r}")


def _decompressed(path: Path, cache: Path) -> Path:
    """The plain file of a compressed one, kept under the digest of the compressed bytes."""
    if path.suffix not in (".gz", ".zst"):
        return path
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    plain = cache / "rows" / f"{digest.hexdigest()}.jsonl"
    if os.path.isfile(place := writable(plain)):
        return place
    try:
        return _decompress(path, place)
    except OSError as error:
        if place != plain:
            raise
        go_without(plain, error)
        return _decompress(path, temporary(plain))


def _decompress(path: Path, place: Path) -> Path:
    source, faults = _opener(path)
    try:
        with whole_file(place) as out, source:
            while chunk := source.read(_CHUNK):
                out.write(chunk)
    except faults as error:
        raise UserError(f"{path}: its compression is damaged ({error}); copy the file again") from None
    return place


def _opener(path: Path) -> tuple[Any, tuple[type[Exception], ...]]:
    """The decompressing stream of a file, and what it raises on damaged ones."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb"), (EOFError, zlib.error, gzip.BadGzipFile)
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path}: zstandard is not installed; pip install zstandard, or decompress the file") from None
    return zstandard.open(path, "rb"), (zstandard.ZstdError,)
