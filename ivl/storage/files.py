"""Atomic writing of files, and faults of disks in one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

REMEDIES = {
    errno.ENOSPC: "free space there, or name another folder",
    errno.EDQUOT: "free space there, or name another folder",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or name another folder",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "change its permissions, or name another folder",
    errno.EPERM: "change its permissions, or name another folder",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; name a folder",
    errno.EISDIR: "name a file",
    errno.EEXIST: "name another path, or remove it",
    errno.ENOTEMPTY: "name another path, or remove it",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.EIO: "the disk or its network fails; check it, or name another folder",
    errno.ESTALE: "the disk or its network fails; check it, or name another folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free memory, or take fewer processes",
}
"""Remedy of each error of the operating system."""

_CODE = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
_PATH = re.compile(r": '([^']+)'|at path \"([^\"]+)\"")


def disk_fault(error: BaseException | None) -> str | None:
    """Describe a fault of a file or disk in one line: path, error and remedy. None for any other error.

    Also one that came as another library's error (safetensors), or as the text of a loader worker's traceback.
    """
    if isinstance(error, OSError) and error.errno in REMEDIES:
        name = error.filename2 or error.filename
        where = f"{os.fsdecode(name)}: " if isinstance(name, (str, bytes, os.PathLike)) else ""
        return f"{where}{error.strerror}; {REMEDIES[error.errno]}"
    text = str(error).strip().rpartition("\n")[2]
    if not (isinstance(error, OSError) or type(error).__name__ == "SafetensorError"):
        return None
    codes = _CODE.search(text)
    code = int(codes[1] or codes[2]) if codes else 0
    if code not in REMEDIES:
        return None
    paths = _PATH.search(text)
    where = f"{paths[1] or paths[2]}: " if paths else ""
    return f"{where}{os.strerror(code)}; {REMEDIES[code]}"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` at the end, or vanishes on an error.

    A link stays, and the file that it leads to is replaced. A device or a pipe is written to as it is.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(part)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at `path` once it is complete, and not after an error."""
    with atomic_path(path) as part, part.open("wb") as out:
        yield out


def file_digest(path: str | Path, algorithm: Any) -> str:
    """Hexadecimal digest of a file's bytes. `algorithm`: such as `hashlib.sha256()`; it may have bytes already."""
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            algorithm.update(chunk)
    return algorithm.hexdigest()


def write_json(path: str | Path, value: Any, indent: int = 2) -> None:
    """Write a value as JSON for people, complete or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, complete or not at all, and the folders it lies in."""
    with atomic_file(path) as out:
        out.write(text.encode())
