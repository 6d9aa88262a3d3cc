"""Feature cache on disk: outputs of a frozen vision tower by content, shared by runs.

DIR/MODEL/ab/abcdef….safetensors   one image: (tiles, P, C), in the type they were computed in
DIR/names/ab/cdef…                 a link whose text is the key of a file that has not changed since it was read

The size of the cache is bounded. MODEL names the weights and settings, so features of other weights are never used. A
file is written under another name and moved into place, and carries a checksum: a file that a crash left counts as
missing. Where the limit is reached, features of other models are removed first, longest unused first; then nothing more
is added (in an epoch every image is used as often as any other, so replacing one by another gains nothing).
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ivl.architecture.config import Config
from ivl.data.cache import go_without
from ivl.storage.files import atomic_path

_SUFFIX = ".safetensors"
SETTLED = 2.0
"""Seconds for which a file must have been as it is: a clock may stand still between two changes of the same size"""


def bytes_needed(config: Config, tiles: int, width: int, element: int) -> int:
    """Disk of the features of `tiles` tiles, each of `width` numbers a token; `element`: bytes of a number."""
    return tiles * config.tokens_per_tile * width * element


def key_of(data: bytes, settings: Any) -> str:
    """Digest of an image's bytes and of all settings that decide how they become tiles."""
    return hashlib.blake2b(data, digest_size=20, person=hashlib.md5(repr(settings).encode()).digest()).hexdigest()


class FeatureStore:
    """The features of one model below `folder`. Picklable."""

    def __init__(self, folder: str | Path, model: str, limit: int) -> None:
        """`limit`: bytes of all files below `folder`, those of other models included."""
        self.folder, self.model, self.limit = Path(folder), model, limit
        self._used: int | None = None
        self._unseen = 0
        self._writable = True

    def path(self, key: str) -> Path:
        return self.folder / self.model / key[:2] / f"{key}{_SUFFIX}"

    def key(self, file: Path | None, read: Callable[[], bytes | None], settings: Any) -> str | None:
        """`key_of` the bytes that `read` returns; None where there are none.

        `file`: the file they are read from. Its key is stored for all processes and runs; the file is read again only
        where its path, size or times have changed. The time of its last change (ctime) cannot be set back, the time of
        its content can.
        """
        before = _stamp(file)
        name = before and hashlib.blake2b(repr((before, settings)).encode(), digest_size=20).hexdigest()
        link = name and self.folder / "names" / name[:2] / name[2:]
        if link:
            with suppress(OSError):
                return os.readlink(link)
        data = read()
        if not data:
            return None
        digest = key_of(data, settings)
        if before and link and _stamp(file) == before and time.time() - max(before[-2:]) / 1e9 > SETTLED:
            with suppress(OSError):  # a link is there at once and whole; without links every epoch reads the files
                link.parent.mkdir(parents=True, exist_ok=True)
                os.symlink(digest, link)
        return digest

    def get(self, key: str, tiles: int) -> Tensor | None:
        """Features (tiles, P, C), or None where there are none or the file is damaged; a damaged file is removed."""
        path = self.path(key)
        if not os.path.isfile(path):
            return None
        try:
            with safe_open(path, "pt") as file:
                features, metadata = file.get_tensor("features"), file.metadata() or {}
            if len(features) == tiles and metadata.get("crc") == _crc(features):
                return features
        except (SafetensorError, OSError, ValueError):
            pass
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None

    def put(self, key: str, features: Tensor) -> bool:
        """Store features (tiles, P, C) where there is room. Returns True if they are on disk now."""
        path = self.path(key)
        if os.path.isfile(path):
            return True
        if not self._writable:
            return False
        features = features.detach().cpu().contiguous()
        size = features.nbytes
        try:
            if not self._room(size):
                return False
            with atomic_path(path) as temporary:
                save_file({"features": features}, temporary, {"crc": _crc(features)})
        except (OSError, SafetensorError) as error:  # a full disk is no reason to stop a run
            go_without(self.folder, error)
            self._writable = False
            return False
        self._used = (self._used or 0) + size
        self._unseen += size
        return True

    def _room(self, size: int) -> bool:
        # Other processes write as well: their share is measured now and then
        if self._used is None or self._unseen > self.limit // 64:
            self._used, self._unseen = sum(stat.st_size for _, stat in self._files()), 0
        if self._used + size > self.limit:
            self._used -= self._drop_others(self._used + size - self.limit)
        return self._used + size <= self.limit

    def _files(self) -> Iterable[tuple[Path, os.stat_result]]:
        for path in self.folder.glob(f"*/*/*{_SUFFIX}"):
            try:
                yield path, path.stat()
            except FileNotFoundError:  # another process removed it
                continue

    def _drop_others(self, wanted: int) -> int:
        """Remove features of other models, longest unused first, and files that crashes left. Returns bytes freed."""
        for path in self.folder.glob("*/*/.*.part"):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink(missing_ok=True)
        others = [(stat.st_atime, path, stat.st_size) for path, stat in self._files() if self.model not in path.parts]
        gained = 0
        for _, path, size in sorted(others):
            if gained >= wanted:
                break
            path.unlink(missing_ok=True)
            gained += size
        return gained


def _stamp(file: Path | None) -> tuple[Any, ...] | None:
    """Path, size, device, inode and times of a file, to see that it changed; the last two are nanoseconds."""
    if file is None:
        return None
    try:
        stat = os.stat(file)
    except (OSError, ValueError):
        return None
    return (os.path.abspath(file), stat.st_size, stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)


def _crc(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.view(torch.uint8).numpy().data):08x}"
