"""Child processes leave signals to the program: Ctrl-C, SIGTERM and SIGHUP reach every process of the group.

A loader worker or a decoder that ended with them would cost the run the step that is under way. They end with the
program: a worker when its parent asks or is gone, a decoder when its input ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a program to end"""


@contextmanager
def signals_held() -> Iterator[None]:
    """Start child processes inside: they, and the fork server, begin with these signals blocked, from the first
    instruction on. The program itself receives them at the end.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals(worker: int = 0) -> None:
    """Leave signals to the parent, in a loader's worker (its `worker_init_fn`): only the parent's own SIGTERM counts,
    with which a loader ends a worker that hangs.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    else:  # macOS: no telling who sent it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while True:
        sender = signal.sigwaitinfo([signal.SIGTERM]).si_pid
        if parent is None or sender == parent.pid:
            os._exit(0)
