"""What broken input may cost."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def within(seconds: float, about: object) -> Iterator[None]:
    """Fails where what is inside takes more processor time."""
    begun = time.process_time()
    yield
    assert time.process_time() - begun < seconds, about


def peak_bytes() -> int:
    """The most memory this process has ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
