"""Reproduction of a run: its command, and what has changed since (`python -m ivl reproduce RUN`).

The exit status is 0 where rows, base and versions are those of the run, and 1 where one of them differs or is missing.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ivl.data.object_store import is_object
from ivl.data.row_files.open_file import open_file
from ivl.lit.run.record import base_identity, versions
from ivl.options import ReproduceOptions
from ivl.run import RECORD, Run
from ivl.types import UserError, plural, printable, text_table

SAME, MISSING = "the same", "missing"


def reproduce(run: str) -> int:
    """Print the commands of a run and what has changed since. Returns the number of changes."""
    found = Run.named(run)
    _ = found.config  # a damaged one is refused
    fits = found.fits
    print(printable(f"{found.folder}: {_summary(found, fits[0][1])}\n"))
    for config, record in fits:
        print(printable("\n".join(_command(found, config, record))))
    record = fits[-1][1]
    with _working_folder(record):
        compared = [*_base(record), *_rows(record), *_versions(record)]
    if not compared:
        print(f"\nno {RECORD} beside its config: nothing to compare")
        return 0
    changes = [row for row in compared if not row[2].startswith(SAME)]
    print(printable("\n" + text_table([["", "then", "now"], *compared], left=(0, 1, 2))))
    print(f"\n{plural(len(changes), 'change')} since" if changes else "\nnothing has changed since")
    return len(changes)


def _summary(run: Run, record: dict[str, Any]) -> str:
    if not record.get("device"):  # of an earlier version
        return f"{run.base}, seed {run.config.get('seed_everything')}"
    processes = "1 process" if record["processes"] == 1 else f"{record['processes']} processes"
    nodes = f" of {record['nodes']} machines" if record["nodes"] > 1 else ""
    return f"{run.base}, seed {record['seed']}, {processes}{nodes} on {record['device']}, {record['time']}"


def _command(run: Run, config: Path, record: dict[str, Any]) -> list[str]:
    """Command that repeats a fit from its config, and the one that was typed, as a comment."""
    there = Path(record.get("folder") or ".").absolute()
    words = ["python", "-m", "ivl", "fit", "--config", str(config if there == Path.cwd() else config.absolute())]
    trainer = run.config.get("trainer") or {}
    if record.get("processes", 1) > 1 and not isinstance(trainer.get("devices"), int):
        words += ["--trainer.devices", str(record["processes"] // record["nodes"])]
    lines = [] if there == Path.cwd() else [f"cd {shlex.quote(str(there))}"]
    if not there.is_dir():
        lines = [f"# its folder {there} is gone; run it where the paths of its config start"]
    lines.append(shlex.join(words))
    if typed := record.get("command"):
        lines.append(f"# typed: {typed}")
    return [f"  {line}" for line in lines]


@contextmanager
def _working_folder(record: dict[str, Any]) -> Iterator[None]:
    """Stand in the folder that a fit ran in, where paths of its config start; the present one if that is gone."""
    before = os.getcwd()
    if (folder := record.get("folder")) and Path(folder).is_dir():
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _base(record: dict[str, Any]) -> list[list[str]]:
    if (then := record.get("base")) is None:
        return []
    shown = f"{then['name']} {then['commit'] or then['digest']}"
    try:
        now = base_identity(then["name"], offline=True)
    except UserError:
        return [["base", shown, MISSING]]
    same = then["digest"] == now["digest"]
    return [["base", shown, SAME if same else str(now["commit"] or now["digest"])]]


def _rows(record: dict[str, Any]) -> list[list[str]]:
    counts, rows = record.get("rows", {}), []
    for path, digest in record.get("data", {}).items():
        then = f"{plural(counts[path], 'row')}, {digest}" if path in counts else digest
        now = MISSING
        if is_object(path) or Path(path).is_file():
            file = open_file(path)
            now = SAME if file.digest == digest else f"{plural(len(file), 'row')}, {file.digest}"
        rows.append([path, then, now])
    return rows


_UNTOLD = f"{SAME}, with changes that no commit holds"


def _versions(record: dict[str, Any]) -> list[list[str]]:
    versions_now = versions()
    rows = []
    for name, then in record.get("versions", {}).items():
        now = versions_now.get(name, MISSING)
        rows.append([name, then, now if now != then else _UNTOLD if then.endswith("-dirty") else SAME])
    return rows


def main(options: ReproduceOptions) -> int:
    """Run the command. Returns 0 where nothing has changed since, else 1."""
    return 1 if reproduce(options.run) else 0
