"""Cache folder, and a temporary one where it cannot be written."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path

from ivl.storage.files import atomic_file, disk_fault

_PROBE = bytes(4096)
"""Bytes of a test write: a full disk still takes an empty file"""
_noted: list[str] = []


def default_cache() -> Path:
    """Folder of decompressed rows, indexes and fetched media, by the XDG rules."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ivl"


def go_without(place: Path, error: BaseException) -> None:
    """Print, once a run, that the cache cannot be written. Raises `error` where it is no fault of a disk."""
    fault = disk_fault(error) or (str(error) if isinstance(error, OSError) else None)
    if fault is None:
        raise error
    if not _noted and os.environ.get("LOCAL_RANK", "0") == "0":
        fault = fault if str(place) in fault else f"{place}: {fault}"
        with contextlib.suppress(OSError):  # a log on the same disk
            print(f"note: the cache cannot be written ({fault}); going on without it", file=sys.stderr, flush=True)
    _noted.append(str(place))


def writable(place: Path) -> Path:
    """Return `place`, a file of the cache, if it exists or can be written; else a temporary file of the same name.

    The temporary folder is shared with processes forked later, and removed when this one ends.
    """
    if os.path.isfile(place) or _can_write(place.parent):
        return place
    return temporary(place)


def temporary(place: Path) -> Path:
    """Path of the same name in the temporary folder that replaces a cache that cannot be written."""
    folder = _temporary_folder() / place.parent.name
    folder.mkdir(exist_ok=True)
    return folder / place.name


def written(place: Path, write: Callable[[Path], Path]) -> Path:
    """Call `write` with `place`, a file of the cache; with a temporary path where the cache cannot be written."""
    target = writable(place)
    try:
        return write(target)
    except OSError as error:
        if target != place:
            raise
        go_without(place, error)
        return write(temporary(place))


@contextlib.contextmanager
def optional(place: Path) -> Iterator[None]:
    """Context for writing `place`, a file of the cache that only saves time: a fault of the disk is noted."""
    try:
        yield
    except OSError as error:
        go_without(place, error)


@functools.cache
def _can_write(folder: Path) -> bool:
    probe = folder / f".writable-{os.getpid()}-{threading.get_ident()}"
    try:
        with atomic_file(probe) as out:
            out.write(_PROBE)
        os.unlink(probe)
    except OSError as error:
        go_without(folder, error)
        return False
    return True


@functools.cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="ivl-cache-")
    Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=0)
    return Path(folder)
