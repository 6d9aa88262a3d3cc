"""Group of the processes that read the same rows: each takes its share of the work, on one machine or several."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ivl.types import UserError

_PIECE = 64 << 20
_PATIENCE = timedelta(days=2)
"""Longest wait for the others; the shares of an index of many million rows take hours"""


class ProcessGroup:
    """One process alone; the base of several."""

    rank, size = 0, 1
    local_size = 1
    """Number of its processes on this machine"""

    def gather(self, value: Any) -> list[Any]:
        """Values of all processes, in the order of their ranks; each process calls it."""
        return [value]

    def send(self, data: bytes | None, source: int) -> bytes:
        """Bytes that the process `source` has, in every process; each process calls it."""
        assert data is not None, "a process alone sends to itself"
        return data

    def share(self, error: Exception | None) -> None:
        """Raise the first error of any process in all of them; each process calls it."""
        if error is not None:
            raise error


class DistributedGroup(ProcessGroup):
    """All processes of a torch.distributed run, joined over the network for as long as their shares take."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self.local_size = self.gather(socket.gethostname()).count(socket.gethostname())

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def send(self, data: bytes | None, source: int) -> bytes:
        size = self.gather(len(data or b"") if self.rank == source else 0)[source]
        mine = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8) if self.rank == source else None
        received = torch.empty(size, dtype=torch.uint8) if mine is None else mine
        for start in range(0, size, _PIECE):
            dist.broadcast(received[start : min(size, start + _PIECE)], source, group=self._group)
        return received[:size].numpy().tobytes()

    def share(self, error: Exception | None) -> None:
        texts = [text for text in self.gather(None if error is None else str(error)) if text is not None]
        if error is not None:
            raise error
        if texts:
            raise UserError(texts[0])

    def close(self) -> None:
        """Leave the network; each process calls it."""
        dist.destroy_process_group(self._group)


@contextmanager
def all_processes() -> Iterator[ProcessGroup]:
    """Context with the group of all processes of this run; of one alone where torch.distributed is not set up."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield ProcessGroup()
        return
    group = DistributedGroup()
    yield group
    group.close()


def folder_name(path: str | os.PathLike) -> tuple[str, str]:
    """Name of a folder that differs between machines, though their paths may be the same."""
    return socket.gethostname(), os.path.realpath(path)
