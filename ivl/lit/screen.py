"""Screen of a run: remarks of Lightning that tell a user nothing are left out, and messages do not run into a bar."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.contrib.logging import logging_redirect_tqdm

_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode",  # parts that do not train are in eval mode on purpose
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
    r"Total length of `\w+` across ranks is zero",  # a run that holds out no rows
    r"The number of training batches \(\d+\) is smaller than the logging interval",  # then `Watch` logs every step
    r"Checkpoint directory .* exists and is not empty",  # of the run that goes on
)
_REMARKS = ("litlogger", "`weights_only` was not set", "TPU available: False")
"""An advertisement; a remark on a default of Lightning's; a device that this program does not use"""


@contextmanager
def clear_screen() -> Iterator[None]:
    """Leave out needless remarks, and write messages above a progress bar, while a command of Lightning's runs."""
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(_is_wanted)
    with logging_redirect_tqdm([logger for logger in (logging.getLogger(), *loggers) if _is_shown(logger)]):
        yield


def _is_shown(logger: logging.Logger) -> bool:
    """Return whether a logger itself writes to the terminal; another would get a second handler, and say all twice."""
    streams = [handler.stream for handler in logger.handlers if isinstance(handler, logging.StreamHandler)]
    return any(stream in (sys.stdout, sys.stderr) for stream in streams)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _REMARKS)
