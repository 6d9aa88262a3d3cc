"""Error propagation between processes: all of them end with the line of the first error."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from ivl.lit.run.signals import Stopped
from ivl.types import UserError

ERROR = "error"
"""Key of the first error's line in the rendezvous store"""
HEARD_SECONDS = 5.0
"""Longest time that a process waits for the others to read its line, and for a line of theirs"""
HANGING_SECONDS = 30.0
"""Longest time that a process may hang in a collective after another has ended, before it is ended too"""
BROKEN = re.compile(
    r"closed by peer|reset by peer|Broken pipe|gloo|NCCL|ProcessGroup|TCPStore|Connection|Timed out", re.IGNORECASE
)


class Peers(Callback):
    """Callback that ends all processes with the error line of the first one that fails."""

    def __init__(self) -> None:
        self._store: Any = None
        self._rank = self._ranks = 0
        self._heard: str | None = None
        self._ending = threading.Event()
        self._launched = False

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or not dist.is_initialized() or self._store is not None:
            return
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("ivl", store)
        self._rank, self._ranks = trainer.global_rank, trainer.world_size
        environment: Any = getattr(trainer.strategy, "cluster_environment", None)
        self._launched = not trainer.is_global_zero and not environment.creates_processes_externally
        threading.Thread(target=self._listen, daemon=True).start()

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._ending.set()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if self._store is None or isinstance(exception, Stopped):
            return
        if BROKEN.search(str(exception)) and not isinstance(exception, UserError):
            self._wait(lambda: self._heard)
        elif self._heard is None:
            self._tell(exception)
        self._ending.set()

    def explained(self, error: Exception) -> BaseException:
        """Return the error to end with: another process's where this one only lost its connection."""
        if self._store is None:
            return error
        if self._heard is not None:
            error = UserError(self._heard)
        elif BROKEN.search(str(error)) and not isinstance(error, UserError):
            error = UserError(
                "another process of this run has ended without a word (it was killed, or ran out of memory); look at "
                "its log, and go on with the same command and --ckpt_path last"
            )
        if not self._launched:
            return error
        # Lightning kills the first process, and what it is about to save and say, where one that it started ends badly.
        print(f"error: {error}", file=sys.stderr)
        return Stopped(0)

    def _tell(self, error: BaseException) -> None:
        text = str(error).strip() or type(error).__name__
        if "Original Traceback" in text:  # of a loader worker
            text = text.rpartition("UserError: ")[2]
        line = f"process {self._rank}: " + " ".join(text.split())
        others = [f"heard{rank}" for rank in range(self._ranks) if rank != self._rank]
        try:
            self._store.set(ERROR, line)
            self._wait(lambda: self._store.check(others))
        except RuntimeError:  # the process that holds the store is gone
            pass

    def _listen(self) -> None:
        while not self._ending.wait(0.25):
            try:
                if not self._store.check([ERROR]):
                    continue
                line = self._store.get(ERROR).decode()
                if line.startswith(f"process {self._rank}: "):
                    return
                self._heard = line
                self._store.set(f"heard{self._rank}", "yes")
            except RuntimeError:
                return
            if not self._ending.wait(HANGING_SECONDS):
                os.write(2, f"error: {self._heard}\n".encode())
                os._exit(2)

    @staticmethod
    def _wait(condition: Any) -> None:
        end = time.monotonic() + HEARD_SECONDS
        while not condition() and time.monotonic() < end:
            time.sleep(0.05)
