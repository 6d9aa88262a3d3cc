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

from ivl.eval import own
from ivl.eval.rules import Scored
from ivl.storage.files import write_text
from ivl.storage.picture_file import check_jpeg, check_size, open_picture, open_regular

Row = dict[str, Any]
PAGE = Path(__file__).with_name("report.html")
"""Page with the places @TITLE@, @FACTS@, @NAMES@, @ROWS@ and @PICTURES@"""
SIDE = 192
"""Longest side of a picture on the page, in pixels"""
MOST_PICTURES = 4
"""Pictures of a row on the page, the last ones; boxes are drawn on the last"""


def write(path: Path, record: Mapping[str, Any], rows: Sequence[Row], scored: Scored) -> None:
    """Write the page of one file's answers to a benchmark; `record` as `ivl.eval.score.record` makes it."""
    pictures = _Pictures()
    lines = []
    for row, score, parsed in zip(rows, scored.scores, scored.parsed):
        more = {"parsed": f"read as: {parsed}" if parsed != row["response"].strip() else ""}
        lines.append(_line(row, score, pictures) | more)
    file = record["files"][0]
    head = f"{record['title']}: {record['metric']} {file['score']:.2f} [{file['low']:.2f}, {file['high']:.2f}]"
    facts = f"{file['file']} · {record['mode']} · {len(rows)} rows · {record['post_processing']}"
    _write(path, head, facts, lines, pictures)


def write_own(
    path: Path,
    title: str,
    totals: Sequence[Mapping[str, Any]],
    rows: Sequence[Sequence[Row]],
    scores: Sequence[Sequence[own.Scores]],
    names: Sequence[str] = (),
) -> None:
    """Write the page of the user's own rows, of one file of answers, or of two in the same order.

    `totals`: of each file value and ends of each metric, as `ivl.eval.own.summarized` has them of all rows. `names`:
    those of two files.
    """
    pictures = _Pictures()
    lines = []
    for n, row in enumerate(rows[0]):
        line = _line(row, own.main_score(scores[0][n]), pictures) | {"parsed": _described(scores[0][n])}
        if len(rows) > 1:
            other = rows[1][n]
            gap = own.main_score(scores[1][n]) - own.main_score(scores[0][n])
            line |= {"other": other["response"], "otherFound": own.boxes_in(other["response"]), "gap": round(gap, 4)}
            line["otherParsed"] = _described(scores[1][n])
        lines.append(line)
    heads = [f"{name}: " for name in names[:2]] or [""]
    numbers = "; ".join(f"{head}{_numbers(total)}" for head, total in zip(heads, totals))
    of_row = f"score of a row{f' of {names[0]}' if names else ''}: IoU of its boxes, else exact"
    facts = f"{numbers} · times 100, with 95 % intervals · {of_row}"
    _write(path, f"{title}: {totals[0]['rows']} rows", facts, lines, pictures, names)


def _numbers(total: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {total[key]['value']:.1f} [{total[key]['low']:.1f}, {total[key]['high']:.1f}]"
        for key, name in own.TITLES.items()
        if key in total
    )


def _described(scores: own.Scores) -> str:
    return ", ".join(f"{own.TITLES[name]} {value:.2f}" for name, value in scores.items())


class _Pictures:
    """Pictures of a page, each once."""

    def __init__(self) -> None:
        self.thumbnails: list[str | None] = []
        self._places: dict[str, int] = {}

    def place(self, source: str) -> int:
        """Number of a picture among those of the page."""
        if source not in self._places:
            self._places[source] = len(self.thumbnails)
            self.thumbnails.append(thumbnail(source))
        return self._places[source]


def _line(row: Row, score: float, pictures: _Pictures) -> dict[str, Any]:
    """Entry of a row, as the page's script reads it."""
    sources = [image for image in row.get("images") or [] if isinstance(image, str)][-MOST_PICTURES:]
    return {
        "id": row["id"],
        "category": str(row.get("category") or row.get("source") or ""),
        "prompt": strip_template(short_prompt(str(row.get("prompt") or row.get("query") or ""))),
        "response": row["response"],
        "reasoning": row.get("reasoning") or "",
        "gold": _gold(row),
        "score": round(score, 4),
        "pictures": [pictures.place(source) for source in sources],
        "found": own.boxes_in(row["response"]),
        "wanted": _wanted(row),
    }


def _write(
    path: Path,
    head: str,
    facts: str,
    lines: list[dict[str, Any]],
    pictures: _Pictures,
    names: Sequence[str] = (),
) -> None:
    parts = {
        "TITLE": html.escape(head),
        "FACTS": html.escape(facts),
        "NAMES": _script(list(names[:2])),
        "ROWS": _script(lines),
        "PICTURES": _script(pictures.thumbnails),
    }
    page = re.sub(
        "@(TITLE|FACTS|NAMES|ROWS|PICTURES)@", lambda match: parts[match[1]], PAGE.read_text(encoding="utf-8")
    )
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


_TURN = re.compile(r"(?:<\|im_start\|>|<\|)(system|user|assistant)(?:\|>)?\n|<(human|bot)>: ?")
_TURN_END = re.compile(r"(?:<\|im_end\|>|<\|end\|>|</s>)\s*$")


def strip_template(prompt: str) -> str:
    """Return the words of a prompt without its template and its system message; roles only where there are turns."""
    parts = _TURN.split(prompt)[1:]
    turns = [
        (role or {"human": "user"}.get(name, "assistant"), _TURN_END.sub("", text).strip())
        for role, name, text in zip(parts[::3], parts[1::3], parts[2::3])
    ]
    turns = [(role, text) for role, text in turns if role != "system" and text]
    if [role for role, _ in turns] == ["user"]:
        return turns[0][1]
    return "\n".join(f"{role}: {text}" for role, text in turns) if turns else prompt


def _gold(row: Row) -> str:
    answers = row.get("answers")
    if isinstance(answers, list) and answers:
        return " | ".join(dict.fromkeys(map(str, answers)))
    if row.get("reference") is None and row.get("box"):
        return f"box {row['box']} in a picture of {row.get('size')}"
    return str(row.get("reference") or "")


def _wanted(row: Row) -> list[list[float]]:
    if row.get("box") and row.get("size"):
        width, height = row["size"]
        return [[round(value / side, 4) for value, side in zip(row["box"], (width, height) * 2)]]
    return own.boxes_in(_gold(row))
