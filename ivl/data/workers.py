"""Signals in child processes: loader workers and decoders leave them to the program.

Ctrl-C, SIGTERM and SIGHUP reach every process of the group. A loader worker or a decoder that ended with them would
cost the run the step that is under way. They end with the program: a worker when its parent asks or is gone, a decoder
when its input ends.
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
    """Context for starting child processes: they, and the fork server, begin with these signals blocked, from the first
    instruction on. The program receives signals held back at the end.
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
    """Leave signals to the parent: `worker_init_fn` of a loader.

    Only SIGTERM from the parent counts, with which a loader ends a worker that hangs.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    else:  # macOS does not tell the sender
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while True:
        sender = signal.sigwaitinfo([signal.SIGTERM]).si_pid
        if parent is None or sender == parent.pid:
            os._exit(0)


def cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
