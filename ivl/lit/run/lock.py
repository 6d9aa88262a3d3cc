"""Lock of a run's folder, against a second run that writes the same checkpoints."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ivl.types import UserError

if sys.platform != "win32":  # without it there is no lock
    import fcntl


@contextmanager
def run_lock(checkpoints: Path) -> Iterator[None]:
    """Hold the lock of a folder of checkpoints. Raises UserError where another process holds it.

    It belongs to the process alone, not to its loader workers, which outlive a killed run by some seconds.
    """
    path = checkpoints.parent / f".{checkpoints.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        if sys.platform != "win32":
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                raise UserError(
                    f"{checkpoints}: another run ({file.read().strip()}) is writing there; wait for it, "
                    "or give this one a folder of its own (trainer.logger.init_args.version)"
                ) from None
            except OSError:  # a file system without locks
                pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
