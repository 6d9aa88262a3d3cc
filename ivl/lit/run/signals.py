"""Signals that stop a run: Ctrl-C, SIGTERM of a scheduler, SIGHUP of a closed terminal."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from ivl.data.workers import ENDING

REPEAT_SECONDS = 0.3
"""Window in which a second signal counts as the first: launchers (torchrun and others) send it twice"""


class Stopped(SystemExit):
    """Exit after a signal. The exit status is 128 + the signal's number."""


class StopSignals:
    """Handlers of the signals that ask a program to end.

    Before there is work to finish, the first one ends it: `Stopped` is raised. While `working`, the first one is kept
    in `number` for the run to end after its step, and the second ends the process at once.
    """

    def __init__(self) -> None:
        self.number = 0
        """Number of the first signal, 0 before"""
        self.working = False
        self.processes: Callable[[int], None] | None = None
        """Function that sends a signal to the processes that this one started"""
        self._time = 0.0
        self._owner = 0
        self._before: dict[int, Any] = {}

    @property
    def active(self) -> bool:
        return bool(self._before)

    def __enter__(self) -> StopSignals:
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def take(self) -> None:
        """Handle the signals, in place of other handlers of this process; one that is ignored stays ignored (nohup)."""
        if threading.current_thread() is not threading.main_thread():
            return
        if not self.active:
            self.number, self.working, self._owner = 0, False, os.getpid()
        for number in ENDING:
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN and handler != self._handle:
                signal.signal(number, self._handle)
                self._before.setdefault(number, handler)

    def leave(self) -> None:
        """Restore the handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self.processes, self.working = {}, None, False

    def check(self) -> None:
        """Raise Stopped after a signal; called between steps that need no saving."""
        if self.number:
            if self.processes is not None:
                self.processes(self.number)
            raise Stopped(128 + self.number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a child process, before it handles signals by itself
            return
        name, now = signal.Signals(number).name, time.monotonic()
        if name == "SIGHUP":
            _leave_terminal()
        if self.number:
            # A terminal that is gone sends SIGHUP several times, and some systems send it along with SIGTERM.
            if name != "SIGHUP" and now - self._time > REPEAT_SECONDS:
                self._end_now(number)
            return
        self.number, self._time = number, now
        if self.working:
            _say(f"{name}: stops after this step; again: stops now")
            return
        _say(f"{name}: stops")
        self.check()

    def _end_now(self, number: int) -> None:
        _say(f"{signal.Signals(number).name}: stops now")
        for child in multiprocessing.active_children():
            child.kill()
        if self.processes is not None:
            self.processes(getattr(signal, "SIGKILL", signal.SIGTERM))
        os._exit(128 + number)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())  # print may be at work already where the signal comes in


def _leave_terminal() -> None:
    """Redirect output to the null device once the terminal is gone; printing would raise, and lose the state."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            mode = os.fstat(descriptor)
            if stat.S_ISCHR(mode.st_mode) and not os.isatty(descriptor):
                os.dup2(null, descriptor)
    os.close(null)


STOP = StopSignals()
"""Signal handlers of this process"""
