"""Arrays mapped from files: processes share their pages, and copies sent to loader workers are paths, not numbers."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ivl.data.cache import optional
from ivl.storage.files import atomic_file

SPOOLED_BYTES = 32 << 20
"""Size from which `spooled` moves an array to the cache"""


class MappedArray(np.memmap):
    """Array mapped from a file, read-only; views of it too. Pickled as its place in the file."""

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        copied = isinstance(part, MappedArray) and part._mmap is None  # type: ignore[attr-defined]
        return part.view(np.ndarray) if copied else part

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        plain = np.asarray(array)
        return plain[()] if return_scalar or plain.ndim == 0 else plain  # NumPy 1 does not say return_scalar

    def __reduce__(self) -> Any:
        if self._mmap is None:  # type: ignore[attr-defined]
            return np.asarray(self).__reduce__()
        start = np.frombuffer(self._mmap, np.uint8).__array_interface__["data"][0]  # type: ignore[attr-defined]
        offset = self.__array_interface__["data"][0] - start
        return _reopened, (str(self.filename), self.dtype, self.shape, self.strides, offset)


def _reopened(path: str, dtype: np.dtype, shape: tuple, strides: tuple, offset: int) -> np.ndarray:
    if 0 in shape:
        return np.empty(shape, dtype)
    pages = np.memmap(path, np.uint8, mode="r")
    array = np.ndarray(shape, dtype, pages, offset, strides).view(MappedArray)
    array._mmap, array.filename = pages._mmap, pages.filename  # type: ignore[attr-defined]
    return array


def load_mapped(path: str | Path) -> np.ndarray:
    """Map the array of an `.npy` file. Raises OSError or ValueError where it is missing or damaged."""
    return np.load(path, mmap_mode="r", allow_pickle=False).view(MappedArray)


def spooled(array: np.ndarray, cache: Path) -> np.ndarray:
    """Return a large array mapped from a file in the cache, named by its content; a small one as it is.

    Processes of a machine that compute the same array then hold it once.
    """
    if array.nbytes < SPOOLED_BYTES or getattr(array, "_mmap", None) is not None:
        return array
    name = hashlib.blake2b(np.ascontiguousarray(array).view(np.uint8).data, digest_size=16)
    name.update(repr((array.dtype.descr, array.shape)).encode())
    path = cache / "arrays" / f"{name.hexdigest()}.npy"
    with contextlib.suppress(OSError, ValueError):  # missing, or damaged
        return load_mapped(path)
    with optional(path):
        with atomic_file(path) as out:
            np.save(out, array)
        return load_mapped(path)
    return array
