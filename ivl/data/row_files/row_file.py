"""Row files with random access: jsonl or a JSON list, plain or compressed.

A file is not loaded into memory.

The form is seen from the content, since files of one row a line are often named `.json` and lists `.jsonl`.
"""

from __future__ import annotations

import gzip
import hashlib
import mmap
import os
import re
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ivl.data.cache import default_cache, written
from ivl.data.row_files.json_line import loads
from ivl.data.row_files.row_table import MOST_BYTES, RowTable, remembered, row_table
from ivl.options.data import FileLimits
from ivl.storage.files import atomic_file, file_digest
from ivl.types import UserError, printable

_CHUNK = 1 << 20
_BLANK = 16
"""Bytes of the shortest line that counts as a row without a look at its content"""
_SOLID = ~np.isin(np.arange(256), np.frombuffer(b" \t\n\r\x0b\x0c", np.uint8))
"""(256,) bool: True for each byte that is no blank"""
_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|[\[\]{}]', re.DOTALL)
_ALWAYS = 256 << 20
"""Bytes to which any compressed file may expand"""


class RowFile:
    """File of rows. Picklable; opened anew in each process.

    Blank lines hold no row. Compressed files (.gz, .zst) are decompressed once, into `cache_dir`.
    Raises UserError where there is no file, no row, or the file cannot be read.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None, limits: FileLimits | None = None) -> None:
        self.path = Path(path)
        self.name, self.folder = str(path), str(self.path.parent)
        """Name for messages, and folder of relative media; of an object in a store, addresses"""
        self.limits = limits or FileLimits()
        try:
            self._plain = _decompressed(self.path, Path(cache_dir or default_cache()), self.limits.max_expansion)
            with open(self._plain, "rb") as opened:
                self._listed = _is_list(opened, self.path)
                scan = _scan_list if self._listed else _scan_lines
                table = remembered(self._plain, Path(cache_dir or default_cache()), lambda: scan(opened, self.path))
            self._starts, self._sizes, self._lines, self.digest = table
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; expected rows as jsonl or a JSON list") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        if not len(self._starts):
            raise UserError(f"{path}: no rows; expected at least one JSON object")
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, i: int) -> str:
        """`file:line` of row `i`, for messages."""
        return f"{printable(self.name, ' ')}:{self._line(i)}"

    def raw(self, i: int) -> bytes:
        """Bytes of row `i` in the file. Raises UserError with `file:line` where it is longer than the limit."""
        start, size = int(self._starts[i]), int(self._sizes[i])
        if size > self.limits.max_row_bytes or size == MOST_BYTES:
            raise UserError(
                f"{self.where(i)}: a row of {size:,} bytes, but the limit is {self.limits.max_row_bytes:,}; "
                f"name media by their paths, or raise data.file_limits.max_row_bytes"
            )
        if self._descriptor is None:
            self._descriptor = os.open(self._plain, os.O_RDONLY)
        return os.pread(self._descriptor, size, start)

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
    """True for a file of one JSON list, False for one row a line."""
    head = opened.read(4096)
    opened.seek(0)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: in UTF-16; expected UTF-8, save it as such")
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        return True
    if first not in (b"{", b""):
        start = head[:40].decode("utf-8", "replace")
        raise UserError(f"{path}:1: expected JSON objects, such as {_EXAMPLE}, found {start!r}")
    if first == b"{":
        line = opened.readline(1 << 20).strip()
        opened.seek(0)
        if line in (b"{", b"\xef\xbb\xbf{"):
            raise UserError(
                f"{path}: one JSON object over several lines; expected a row a line or a list of rows "
                f"(a file that names several sources is given as a meta file)"
            )
    return False


def _scan_lines(opened: BinaryIO, path: Path) -> RowTable:
    """Lines that are not blank; no numbers of lines where no line is blank."""
    digest = hashlib.blake2b(digest_size=16)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    begin, line, size = 0, 1, 0  # start and number of the open line, and bytes read
    while chunk := opened.read(_CHUNK):
        digest.update(chunk)
        data = np.frombuffer(chunk, np.uint8)
        stops = np.flatnonzero(data == 10)
        if len(stops):
            starts = np.concatenate([[begin - size], stops[:-1] + 1])
            solid = _not_blank(opened, data, starts, stops, size)
            parts.append((starts[solid] + size, stops[solid] + size, np.flatnonzero(solid) + line))
            begin, line = size + int(stops[-1]) + 1, line + len(stops)
        size += len(chunk)
    if size - begin >= _BLANK or _read(opened, begin, size).strip():
        parts.append((np.array([begin]), np.array([size]), np.array([line])))
    if not parts:
        return row_table([], [], None, digest.hexdigest())
    start, end, numbers = (np.concatenate(columns) for columns in zip(*parts))
    counted = bool(len(numbers)) and numbers[-1] == len(numbers)
    return row_table(start, end, None if counted else numbers, digest.hexdigest())


def _not_blank(opened: BinaryIO, data: np.ndarray, starts: np.ndarray, stops: np.ndarray, size: int) -> np.ndarray:
    """(lines,) bool: True for each line of a chunk with a row. The first may begin before the chunk, at `size`."""
    solid = stops - starts >= _BLANK
    if solid.all():
        return solid
    counts = np.concatenate([[0], np.cumsum(_SOLID[data], dtype=np.int32)])
    solid |= counts[stops] > counts[np.maximum(starts, 0)]
    if starts[0] < 0 and not solid[0]:
        solid[0] = bool(_read(opened, size + int(starts[0]), size + int(stops[0])).strip())
    return solid


def _read(opened: BinaryIO, start: int, end: int) -> bytes:
    return os.pread(opened.fileno(), end - start, start)


def _scan_list(opened: BinaryIO, path: Path) -> RowTable:
    """Elements of a JSON list, without parsing them."""
    starts, ends, lines = array("q"), array("q"), array("q")  # lists of numbers take five times the memory
    with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        depth, closed, previous = 0, False, data.find(b"[")
        for match in _STRUCTURE.finditer(data):
            mark = data[match.start() : match.start() + 1]
            if mark in b"[{":
                if depth == 1:
                    gap = data[previous + 1 : match.start()].strip()
                    if mark == b"[" or gap != (b"," if starts else b""):
                        raise _not_a_list(data, match.start(), path)
                    starts.append(match.start())
                depth += 1
            elif mark in b"]}":
                depth -= 1
                if depth == 1:
                    ends.append(match.end())
                    previous = match.end() - 1
                if depth == 0:
                    gap, rest = data[previous + 1 : match.start()].strip(), data[match.end() :].strip()
                    if gap or rest or mark == b"}":
                        raise _not_a_list(data, match.start() if gap else match.end(), path)
                    closed = True
                    break
            elif depth == 1:
                raise _not_a_list(data, match.start(), path)
        if not closed:
            raise UserError(f"{path}: the JSON list has no end; is the file complete?")
        line, at = 1, 0
        for start in starts:
            line += data[at:start].count(b"\n")
            at = start
            lines.append(line)
    return row_table(starts, ends, lines, digest)


def _not_a_list(data: mmap.mmap, at: int, path: Path) -> UserError:
    line = data[:at].count(b"\n") + 1
    start = data[at : at + 30].decode("utf-8", "replace")
    return UserError(f"{path}:{line}: expected a list of JSON objects, such as [{_EXAMPLE}], found {start!r}")


def expansion_limit(path: Path, max_expansion: float) -> int:
    """Return the bytes to which a compressed file, or a table, may expand."""
    return max(_ALWAYS, int(max_expansion * path.stat().st_size))


def _decompressed(path: Path, cache: Path, max_expansion: float) -> Path:
    """Path of the decompressed file, cached under the digest of the compressed bytes; a plain file as it is."""
    if path.suffix not in (".gz", ".zst"):
        return path
    plain = cache / "rows" / f"{file_digest(path, hashlib.blake2b(digest_size=16))}.jsonl"
    return written(plain, lambda place: _decompress(path, place, expansion_limit(path, max_expansion)))


def _decompress(path: Path, place: Path, most: int) -> Path:
    if os.path.isfile(place) and os.path.getsize(place) <= most:
        return place
    source, faults = _opener(path)
    try:
        with atomic_file(place) as out, source:
            while chunk := source.read(_CHUNK):
                out.write(chunk)
                if out.tell() > most:
                    raise UserError(
                        f"{path}: {path.stat().st_size:,} bytes that become more than {most:,}; raise "
                        f"data.file_limits.max_expansion where that is meant, or decompress the file"
                    )
    except faults as error:
        raise UserError(f"{path}: its compression is damaged ({error}); copy the file again") from None
    return place


def _opener(path: Path) -> tuple[Any, tuple[type[Exception], ...]]:
    """Decompressing stream of a file, and the exceptions it raises on damaged data."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb"), (EOFError, zlib.error, gzip.BadGzipFile)
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path}: zstandard is not installed; pip install zstandard, or decompress the file") from None
    return zstandard.open(path, "rb"), (zstandard.ZstdError,)
