"""Folder that an export writes: what it may replace, and its change of place at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ivl.export.push import REPORT
from ivl.types import UserError


def check_target(target: Path, sources: list[str], overwrite: bool) -> None:
    """Raise UserError where writing `target` would harm something."""
    for source in sources:
        path, resolved = Path(source), target.resolve()
        if path.exists() and (resolved == path.resolve() or resolved in path.resolve().parents):
            raise UserError(f"--out {target}: {source} is read from there; expected another folder")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UserError(f"--out {target}: exists already; name another folder, or add --overwrite to replace it")
    if not any((target / name).is_file() for name in ("config.json", "adapter_config.json", REPORT)):
        raise UserError(f"--out {target}: --overwrite replaces checkpoint folders only, and this is none")


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Make a folder next to `target` that takes its place at the end, or vanishes on an exception."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (target.with_name(f".{target.name}.{word}-{os.getpid()}") for word in ("new", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
