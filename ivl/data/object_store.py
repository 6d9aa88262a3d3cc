"""Objects of stores (`s3://`, `gs://`, `oss://`) as local files, through fsspec, within the limits of downloads.

Credentials and endpoints are what the package of a store reads by itself (environment, its own config files); no option
holds them, and messages name an error by its type alone, never by its text. Rows are fetched again where the store has
another object by that name; media once, as those behind http(s).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ivl.data.cache import default_cache, optional, written
from ivl.data.media.download import cached_path
from ivl.options.media import FetchPolicy
from ivl.storage.files import atomic_file, write_text
from ivl.types import UserError

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "oss": "ossfs", "memory": "fsspec"}
"""Scheme of a store → package that reads it; `memory` is fsspec's own, for tests"""

_OBJECT = re.compile(rf"(?P<scheme>{'|'.join(PACKAGES)})://(?P<path>.+)", re.IGNORECASE | re.DOTALL)
_CHUNK = 1 << 20
T = TypeVar("T")


def is_object(name: object) -> bool:
    """True for the address of an object, or of a folder or pattern of them, in a store."""
    return isinstance(name, str) and _OBJECT.fullmatch(name) is not None


def parent_of(url: str) -> str:
    """Folder of an object."""
    return url.rpartition("/")[0]


def absolute(place: str | Path) -> str:
    """Absolute path, or the address of an object as it is."""
    return place if isinstance(place, str) and is_object(place) else str(Path(place).absolute())


def fetch_object(url: str, policy: FetchPolicy, check: Callable[[Path], None] | None = None) -> Path:
    """Local file of an object, from the cache or fetched; `check` as in `ivl.data.media.download.fetch`."""
    store = _Store(url, policy)

    def download(place: Path) -> Path:
        if not os.path.isfile(place):
            store.download(place, policy.max_bytes, policy.total_timeout, check)
        return place

    return written(cached_path(url, policy), download)


def fetch_rows(url: str, cache_dir: str | Path | None = None) -> Path:
    """Local copy of a file of rows, fetched where the cache has none of the object as it is by now (size and etag).

    Where the store cannot be asked, the last copy is used, with a note. Raises UserError where there is none.
    """
    from filelock import FileLock

    folder = Path(cache_dir or default_cache()) / "stores"
    note = folder / f"{_digest(url)}.json"
    store = _Store(url, FetchPolicy(retries=1))
    try:
        stamp = store.stamp()
    except _Unreachable as error:
        last = _last_copy(note)
        if last is None:
            raise
        _say(f"{error}; going on with the copy in the cache")
        return last
    name = re.sub(r"[^\w.-]", "_", url.rpartition("/")[2])[-80:]

    def download(place: Path) -> Path:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if not place.is_file():
                _check_room(url, store.size, place.parent)
                _say(f"{url}: {store.size:,} bytes → {place}")
                store.download(place, store.size, None)
        return place

    copy = written(folder / f"{_digest(url, stamp)}-{name}", download)
    with optional(note):
        write_text(note, json.dumps({"file": copy.name}))
    return copy


def object_files(name: str, suffixes: re.Pattern[str]) -> list[str]:
    """Addresses of the objects that a name stands for: an object, a folder of rows, or a pattern (*)."""
    store = _Store(name, FetchPolicy(retries=1))
    scheme = name.partition("://")[0]
    if "*" in name:
        paths = store.ask(lambda fs, path: sorted(fs.glob(path)))
    elif suffixes.search(name) or not store.ask(lambda fs, path: fs.isdir(path)):
        return [name]
    else:
        paths = [path for path in store.ask(lambda fs, path: sorted(fs.find(path))) if suffixes.search(path)]
    if not paths:
        raise UserError(f"{name}: no files of rows there; expected names such as *.jsonl or *.parquet")
    return [f"{scheme}://{path.lstrip('/')}" for path in paths]


class _Unreachable(UserError):
    """The store does not answer."""


class _Store:
    """Store of an object, asked in a thread, so that no silence of it holds up a run."""

    def __init__(self, url: str, policy: FetchPolicy) -> None:
        match = _OBJECT.fullmatch(url)
        assert match is not None, "an address of a store"
        self.url, self.policy, self.size = url, policy, 0
        self.scheme, self.path = match["scheme"].lower(), match["path"]
        if "::" in url:
            raise UserError(f"{url}: addresses within addresses (::) are not opened; expected one of a store")
        if "@" in self.path.partition("/")[0]:
            raise UserError(
                f"{self.scheme}://…: a user name in an address is not sent; credentials are read by "
                f"{PACKAGES[self.scheme]} itself, from its environment or config file"
            )

    def stamp(self) -> str:
        """Size of the object, and what the store knows of its content: etag, checksum, or time."""
        info = self.ask(lambda fs, path: fs.info(path))
        if info.get("type") == "directory":
            raise UserError(f"{self.url}: a folder; expected a file of rows")
        self.size = int(info.get("size") or 0)
        names = ("ETag", "etag", "md5Hash", "crc32c", "generation", "LastModified", "mtime", "updated", "created")
        return repr([self.size, *(str(info[name]) for name in names if info.get(name) is not None)])

    def ask(self, request: Callable[[Any, str], T]) -> T:
        """Answer to a request of a few bytes."""
        return self._retried(lambda: self._in_time(lambda fs, path, moved: request(fs, path), None))

    def download(
        self, place: Path, most: int, seconds: float | None, check: Callable[[Path], None] | None = None
    ) -> None:
        """Write the object to `place`: at most `most` bytes, in `seconds` (None: as long as bytes come in)."""

        def copy() -> None:
            with atomic_file(place) as out:
                self._in_time(lambda fs, path, moved: self._copy(fs, path, out, most, moved), seconds)
                out.flush()
                if check is not None:
                    check(Path(out.name))

        self._retried(copy)

    def _copy(self, fs: Any, path: str, out: BinaryIO, most: int, moved: _Progress) -> None:
        size = fs.info(path).get("size") or 0
        count = 0
        if size > most:
            raise UserError(f"{self.url}: {size} bytes, above the limit of {most} (max_bytes)")
        with fs.open(path, "rb", cache_type="none" if self.scheme != "memory" else None) as opened:
            while chunk := opened.read(_CHUNK):
                count += len(chunk)
                if count > most:
                    raise UserError(f"{self.url}: more bytes than the limit of {most} (max_bytes)")
                moved.write(out, chunk)
        if not count:
            raise UserError(f"{self.url}: empty; expected the content of a file")

    def _in_time(self, request: Callable[[Any, str, _Progress], T], seconds: float | None) -> T:
        """Result of a request in a thread of its own. Raises _Unreachable after a silence, or after `seconds`."""
        progress, answers, faults = _Progress(), list[T](), list[BaseException]()

        def run() -> None:
            try:
                answers.append(request(_filesystem(self.scheme), self.path, progress))
            except BaseException as error:  # noqa: BLE001  (raised by the thread that waits)
                faults.append(error)

        thread = threading.Thread(target=run, daemon=True)
        begin = time.monotonic()
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            now = time.monotonic()
            if seconds is not None and now - begin > seconds:
                progress.stop()
                raise _Unreachable(f"{self.url}: not complete after {seconds:g} seconds")
            if now - progress.last > self.policy.timeout:
                progress.stop()
                raise _Unreachable(f"{self.url}: the store was silent for {self.policy.timeout:g} seconds")
        if faults:
            raise self._named(faults[0]) from None
        return answers[0]

    def _retried(self, request: Callable[[], T]) -> T:
        for attempt in range(self.policy.retries + 1):
            try:
                return request()
            except _Unreachable:
                if attempt == self.policy.retries:
                    raise
                time.sleep(self.policy.backoff * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _named(self, error: BaseException) -> BaseException:
        """Error of a store as one of ours, without its text, which may hold credentials."""
        if isinstance(error, UserError) or not isinstance(error, Exception):
            return error
        package, kind = PACKAGES[self.scheme], type(error).__name__
        if isinstance(error, ImportError):
            return UserError(f"{self.url}: reading it needs {package}; pip install 'ivl[stores]'")
        if isinstance(error, (FileNotFoundError, IsADirectoryError)):
            return UserError(f"{self.url}: no such object in the store; check the address")
        if isinstance(error, PermissionError) or re.search("Credential|Forbidden|Denied|Auth", kind):
            return UserError(
                f"{self.url}: not yours to read ({kind}); give {package} its credentials, by its environment or its "
                "config file"
            )
        return _Unreachable(f"{self.url}: the store cannot be read ({kind}); try again later, or copy the files here")


class _Progress:
    """Bytes that came in, and the time of the last of them; a thread that is given up writes no more."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self._lock, self._stopped = threading.Lock(), False

    def write(self, out: BinaryIO, chunk: bytes) -> None:
        with self._lock:
            if self._stopped:
                raise InterruptedError("given up")
            out.write(chunk)
        self.last = time.monotonic()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True


def _filesystem(scheme: str) -> Any:
    import fsspec

    return fsspec.filesystem(scheme)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _last_copy(note: Path) -> Path | None:
    try:
        copy = note.parent / str(json.loads(note.read_text())["file"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return copy if copy.is_file() else None


def _check_room(url: str, size: int, folder: Path) -> None:
    if size > (free := shutil.disk_usage(folder).free):
        raise UserError(f"{url}: {size:,} bytes, and {folder} has room for {free:,}; make room, or set XDG_CACHE_HOME")


def _say(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)
