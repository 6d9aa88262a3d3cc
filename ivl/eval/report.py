"""HTML page of every answer of a file: picture, boxes, reference, score.

The page needs no network and no other files.

Only the rows in view are in the document, so thousands scroll and sort at once; all text is set as text, never as
markup, since a model wrote it.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import ImageOps

from ivl.eval.rules import Scored
from ivl.storage.files import write_text
from ivl.storage.picture_file import check_jpeg, check_size, open_picture, open_regular

Row = dict[str, Any]
PAGE = Path(__file__).with_name("report.html")
"""Page with the places @TITLE@, @FACTS@, @ROWS@ and @PICTURES@"""
SIDE = 192
"""Longest side of a picture on the page, in pixels"""
_BOX = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")


def write(path: Path, record: Mapping[str, Any], rows: Sequence[Row], scored: Scored) -> None:
    """Write the page of one file's answers; `record` as `ivl.eval.score.record` makes it."""
    pictures: dict[str, int] = {}
    shown: list[str | None] = []
    lines = []
    for row, score, parsed in zip(rows, scored.scores, scored.parsed):
        source = next((image for image in row.get("images") or [] if isinstance(image, str)), None)
        if source is not None and source not in pictures:
            pictures[source] = len(shown)
            shown.append(thumbnail(source))
        lines.append(
            {
                "id": row["id"],
                "category": str(row.get("category") or ""),
                "prompt": short_prompt(str(row.get("prompt") or row.get("query") or "")),
                "response": row["response"],
                "reasoning": row.get("reasoning") or "",
                "parsed": parsed if parsed != row["response"].strip() else "",
                "gold": _gold(row),
                "score": round(score, 4),
                "picture": None if source is None else pictures[source],
                "found": _boxes(row["response"]),
                "wanted": _wanted(row),
            }
        )
    file = record["files"][0]
    head = f"{record['title']}: {record['metric']} {file['score']:.2f} [{file['low']:.2f}, {file['high']:.2f}]"
    facts = f"{file['file']} · {record['mode']} · {len(rows)} rows · {record['post_processing']}"
    parts = {
        "TITLE": html.escape(head),
        "FACTS": html.escape(facts),
        "ROWS": _script(lines),
        "PICTURES": _script(shown),
    }
    page = re.sub("@(TITLE|FACTS|ROWS|PICTURES)@", lambda match: parts[match[1]], PAGE.read_text(encoding="utf-8"))
    write_text(path, page)


def _script(value: Any) -> str:
    """Encode JSON that cannot end its script element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def thumbnail(source: str) -> str | None:
    """Make a small JPEG of a picture, upright, as a data: URI. None where it is not here, too large, or damaged."""
    try:
        uri = source.startswith("data:")
        opened = io.BytesIO(base64.b64decode(source.split(",", 1)[1])) if uri else open_regular(source, source)
        with opened, open_picture(opened) as image:
            check_size(image.size, source[:80])
            if image.format == "JPEG":
                opened.seek(0)
                check_jpeg(opened.read())
                opened.seek(0)
            image.draft("RGB", (2 * SIDE, 2 * SIDE))
            reduced = ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # noqa: BLE001  (decoders raise every kind there is)
        return None
    reduced.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    reduced.save(out, "JPEG", quality=60)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def short_prompt(prompt: str) -> str:
    """Write a prompt with each medium's tokens as one mark."""
    return re.sub(r"<img>(?:<IMG_CONTEXT>)*</img>", "<image>", prompt)


def _gold(row: Row) -> str:
    answers = row.get("answers")
    if isinstance(answers, list) and answers:
        return " | ".join(dict.fromkeys(map(str, answers)))
    if row.get("reference") is None and row.get("box"):
        return f"box {row['box']} in a picture of {row.get('size')}"
    return str(row.get("reference") or "")


def _boxes(text: str) -> list[list[float]]:
    """Boxes written in thousandths, as fractions."""
    return [[int(value) / 1000 for value in match] for match in _BOX.findall(text)]


def _wanted(row: Row) -> list[list[float]]:
    if row.get("box") and row.get("size"):
        width, height = row["size"]
        return [[round(value / side, 4) for value, side in zip(row["box"], (width, height) * 2)]]
    return _boxes(str(row.get("reference") or ""))
