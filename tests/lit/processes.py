"""Runs in processes of their own, forked from one in which everything is imported; several as torchrun starts them."""

from __future__ import annotations

import multiprocessing
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from ivl.__main__ import main


def _child(argv: list[str], log: Path, environment: dict[str, str], prepare: Callable[[], None] | None) -> None:
    os.environ.update(environment)
    # Loader workers are its own children, and end with it, as in a run from a shell; those of the fork server go on.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)  # as in the tests' own process: sums of other threads round otherwise
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if prepare is not None:
        prepare()
    sys.exit(main(argv))


def started(
    argv: list[str], log: Path, environment: dict[str, str] | None = None, prepare: Callable[[], None] | None = None
) -> BaseProcess:
    """`python -m ivl ARGV`, what it prints in `log`; `prepare` is called in it first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ivl.lit.cli", "tests.lit.processes"])
    process = context.Process(target=_child, args=(argv, log, environment or {}, prepare))
    process.start()
    return process


def ranks(
    argv: list[str], folder: Path, count: int = 2, prepare: Callable[[], None] | None = None
) -> list[BaseProcess]:
    """The processes of one distributed run; what rank r prints is in `folder/rankR.log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "GROUP_RANK": "0"}
    common |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": str(count)}
    folder.mkdir(parents=True, exist_ok=True)
    argv = [*argv, "--trainer.devices", str(count)]
    return [
        started(argv, folder / f"rank{r}.log", common | {"RANK": str(r), "LOCAL_RANK": str(r)}, prepare)
        for r in range(count)
    ]


def finished(processes: list[BaseProcess], folder: Path, status: int = 0, limit: float = 600.0) -> None:
    """Wait for the processes of a run; all end with `status`."""
    end = time.monotonic() + limit
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [status] * len(processes), (codes, (folder / "rank0.log").read_text()[-3000:])


def wait(process: BaseProcess, condition: Callable[[], object], limit: float = 300.0) -> None:
    """Until `condition()` holds or the process ends."""
    end = time.monotonic() + limit
    while process.is_alive() and not condition():
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.001)


def in_own_group() -> None:
    """For `prepare`: the process and its children are a process group, as a shell starts a program."""
    os.setsid()


def on_terminal(name: str) -> None:
    """For `prepare`: the process has this terminal, and prints there."""
    os.setsid()
    descriptor = os.open(name, os.O_RDWR)  # the first terminal that a session opens becomes its own
    for stream in (0, 1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115


class Terminal:
    """A terminal as a person sits before; what the program prints is read all the time."""

    def __init__(self) -> None:
        self._master, self._slave = os.openpty()
        self.name = os.ttyname(self._slave)
        self._printed: list[bytes] = []
        self._closed = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._closed:
            ready, _, _ = select.select([self._master], [], [], 0.05)
            if ready:
                self._printed.append(os.read(self._master, 65536))

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def close(self) -> None:
        """The window is closed, or the connection lost."""
        self._closed = True
        self._reader.join()  # a terminal that is being read from is not gone
        os.close(self._slave)
        os.close(self._master)

    @property
    def text(self) -> str:
        return b"".join(self._printed).decode(errors="replace")


CTRL_C = "\x03"
