"""Demo data and model: numbers on notes, tags, parcels and signs in pictures and clips, a tiny InternVL; offline."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from ivl.errors import UserError

ROWS = {
    "train": {"single": 10500, "turns": 2500, "grounding": 6500, "video": 500},
    "val": {"single": 300, "turns": 100, "grounding": 150, "video": 60},
}
"""Number of rows of each kind, by split."""
TEXTS = ("query", "response")
"""Fields of a row that the tokenizer is trained on"""


def prepare(folder: str | Path, rows: dict[str, dict[str, int]] = ROWS, seed: int = 0) -> None:
    """Make the demo's data and model in `folder`, unless they are there already. Equal seeds make equal files.

    Files are written beside the folder and renamed, so the demo is complete or absent.
    Raises UserError where the folder exists and is something else.
    """
    folder = Path(folder)
    if (folder / "model/model.safetensors").is_file() and (folder / "train.jsonl").is_file():
        return
    if folder.exists():
        raise UserError(f"{folder}: exists and is not the whole demo; remove it, or name another folder with --demo")
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    print(f"demo: making rows and a tiny model in {folder}/, once", file=sys.stderr, flush=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(temporary, rows, seed)
        temporary.chmod(0o755)
        if not folder.exists():  # another process may have been faster
            temporary.rename(folder)
            print(f"demo: made in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path, rows: dict[str, dict[str, int]], seed: int) -> None:
    from ivl.demo.making import Part, make_rows
    from ivl.demo.model import write_checkpoint
    from ivl.demo.rows import make_folders
    from ivl.demo.scenes import edges
    from ivl.demo.things import CELL

    make_folders(folder)
    parts = [
        Part(str(folder), split, kind, count, 2 * seed + n)
        for n, (split, counts) in enumerate(rows.items())
        for kind, count in counts.items()
    ]
    rows_by_part = list(zip(parts, make_rows(parts), strict=True))
    for split in rows:
        lines = [json.dumps(row) + "\n" for part, part_rows in rows_by_part if part.split == split for row in part_rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [
        row[key] for part, part_rows in rows_by_part if part.split == "train" for row in part_rows for key in TEXTS
    ]
    # The tokenizer shall have a word for each number of a box.
    numbers = [round(1000 * pixel / (2 * CELL)) for pixel in edges()]
    texts += [f"<box> [[{n}, {n}, {n}, {n}]] </box>" for n in numbers] * 50
    texts += ["system\nuser\nassistant\nFrame1: "] * 2000
    write_checkpoint(folder / "model", texts, seed)
