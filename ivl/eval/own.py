"""Scores of any answers with references: exact, ANLS, F1 of words, IoU of boxes and CIDEr, per source of the rows.

All are shown times 100, with bootstrap intervals; two files are compared row by row.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ivl.errors import UserError, first_few, text_table
from ivl.eval import stats
from ivl.eval.metrics import anls, exact_match, iou
from ivl.eval.predictions import RUN, Row
from ivl.eval.rules import Scored, golds, pooled

TITLES = {"exact": "exact", "anls": "ANLS", "f1": "F1", "iou": "IoU", "cider": "CIDEr"}
CAPTION_WORDS = 5
"""Mean number of words of references from which a source is scored by CIDEr: of short answers it says nothing"""
ALL = "all"
_CHINESE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CHINESE}]|[^\W_{_CHINESE}]+")
"""Word, or one character of a script without blanks between words"""
_BOX = re.compile(r"\[\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*\]")

Scores = dict[str, float]


def boxes_in(text: str) -> list[list[float]]:
    """Boxes written in thousandths, as fractions; numbers that are no box are left out."""
    boxes = []
    for match in _BOX.findall(text):
        try:
            x1, y1, x2, y2 = (float(number) for number in match)
        except ValueError:  # such as 1.2.3
            continue
        if 0 <= x1 <= x2 <= 1000 and 0 <= y1 <= y2 <= 1000:
            boxes.append([x1 / 1000, y1 / 1000, x2 / 1000, y2 / 1000])
    return boxes


def mean_iou(response: str, reference: str) -> float | None:
    """Mean IoU of the boxes in order, 0 for a missing or surplus one; None where the reference has no box."""
    wanted, predicted = boxes_in(reference), boxes_in(response)
    if not wanted:
        return None
    overlaps = [iou(a, b) if a and b else 0.0 for a, b in zip_longest(predicted, wanted)]
    return sum(overlaps) / len(overlaps)


def word_f1(response: str, reference: str) -> float:
    """F1 of the words of two texts, without case and punctuation; of Chinese, each character is a word."""
    a, b = (Counter(_WORD.findall(text.lower())) for text in (response, reference))
    if not a or not b:
        return float(a == b)
    both = sum((a & b).values())
    return 2 * both / (a.total() + b.total())


_EACH: dict[str, Callable[[str, str], float | None]] = {
    "exact": exact_match,
    "anls": lambda response, reference: anls(response, [reference], "strict"),
    "f1": word_f1,
    "iou": mean_iou,
}
"""Scores of an answer by one expected answer; the best of several counts"""


def score_rows(rows: Sequence[Row]) -> list[Scores]:
    """Scores of each row by all metrics that apply to it. Raises UserError where rows have no reference."""
    missing = [row["where"] for row in rows if not row.get("answers") and row.get("reference") is None]
    if missing:
        raise UserError(
            f"{missing[0]}: no reference, as {len(missing)} of {len(rows)} rows; --field reference=NAME says what it "
            "is called, and --rows FILE joins it by id"
        )
    scores = []
    for row in rows:
        values = {name: [judge(row["response"], gold) for gold in golds(row)] for name, judge in _EACH.items()}
        known = {name: [v for v in found if v is not None] for name, found in values.items()}
        scores.append({name: max(found) for name, found in known.items() if found})
    _add_cider(rows, scores)
    return scores


def _add_cider(rows: Sequence[Row], scores: list[Scores]) -> None:
    """Add CIDEr to the rows of sources whose references are sentences, where pycocoevalcap is installed."""
    if find_spec("pycocoevalcap") is None:
        return
    from ivl.eval.captions import caption_scores

    for members in by_source(rows).values():
        texts = [n for n in members if "iou" not in scores[n]]
        lengths = [len(_WORD.findall(golds(rows[n])[0])) for n in texts]
        if texts and sum(lengths) / len(lengths) >= CAPTION_WORDS:
            found = caption_scores([rows[n]["response"] for n in texts], [golds(rows[n]) for n in texts])
            for n, value in zip(texts, found.cider.tolist()):
                scores[n]["cider"] = value


def by_source(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Numbers of the rows of each source."""
    places: dict[str, list[int]] = {}
    for n, row in enumerate(rows):
        places.setdefault(str(row.get("source") or row.get("category") or "rows"), []).append(n)
    return places


def main_score(scores: Scores) -> float:
    """Score by which a page sorts rows: the IoU of boxes, else exact."""
    return scores.get("iou", scores["exact"])


def align(first: Sequence[Row], path: Path, rows: Sequence[Row]) -> list[Row]:
    """Sort `rows` into the order of `first`, by source and id, or by place where the expected answers are the same.

    Raises UserError where they are answers to other questions.
    """
    place = {_key(row): row for row in rows}
    if place.keys() == {_key(row) for row in first}:
        return [place[_key(row)] for row in first]
    if len(first) == len(rows) and all(golds(a) == golds(b) for a, b in zip(first, rows)):
        return list(rows)
    unmatched = sorted({row["id"] for row in first} ^ {row["id"] for row in rows})
    raise UserError(
        f"{path}: not the same questions as the first file, neither by id (only one has {first_few(unmatched)}) nor by "
        "place; comparing takes the same questions"
    )


def _key(row: Row) -> tuple[str, str]:
    return str(row.get("source") or ""), row["id"]


# -- record and table ----------------------------------------------------------------------------------------------


def record(
    files: Sequence[Path], rows: Sequence[list[Row]], scores: Sequence[list[Scores]], resamples: int, seed: int
) -> dict[str, Any]:
    """Record of the scores of one or more files, without times and folders: equal inputs make equal records."""
    summary: dict[str, Any] = {
        "task": "own",
        "rows": len(rows[0]),
        "interval": {"level": stats.LEVEL, "resamples": resamples, "seed": seed},
        "files": [
            {
                "file": path.name,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "run": {key: answers[0].get(key) for key in RUN},
                "scores": summarized(answers, values, resamples, seed),
            }
            for path, answers, values in zip(files, rows, scores)
        ],
        "comparison": [],
    }
    for path, values in zip(files[1:], scores[1:]):
        gaps = {}
        for name in TITLES:
            members = [n for n, one in enumerate(scores[0]) if name in one and name in values[n]]
            if members:
                a, b = (_scored([one[n][name] for n in members]) for one in (scores[0], values))
                gap = stats.difference(a, b, resamples, seed)
                gaps[name] = {key: None if v is None else round(v, 6) for key, v in vars(gap).items()}
        summary["comparison"].append({"file": path.name, "less": files[0].name, "scores": gaps})
    return summary


def summarized(rows: Sequence[Row], scores: Sequence[Scores], resamples: int, seed: int) -> dict[str, Any]:
    """Number of rows, and value with its interval of each metric, of each source and of all rows."""
    groups = {**by_source(rows), ALL: list(range(len(rows)))}
    summary: dict[str, Any] = {}
    for source, members in groups.items():
        summary[source] = {"rows": len(members)}
        for name in TITLES:
            values = [scores[n][name] for n in members if name in scores[n]]
            if values:
                counted = _scored(values)
                low, high = stats.interval(counted, resamples, seed)
                ends = {"value": float(counted.total()), "low": low, "high": high}
                summary[source][name] = {key: round(v, 6) for key, v in ends.items()}
    return summary


def _scored(values: list[float]) -> Scored:
    counts = np.stack([np.array(values), np.ones(len(values))], axis=1)
    return Scored(values, [], list(range(len(values))), counts, np.zeros(len(values), int), [""], pooled)


def table(summary: dict[str, Any]) -> str:
    """Format a record for people."""
    blocks = []
    for file in summary["files"]:
        scores = file["scores"]
        names = [name for name in TITLES if any(name in values for values in scores.values())]
        head = [file["file"], "rows", *(TITLES[name] for name in names)]
        lines = [[source, str(v["rows"]), *(_cell(v.get(name)) for name in names)] for source, v in _ordered(scores)]
        blocks.append(text_table([head, *lines]))
    for gap in summary["comparison"]:
        lines = [[f"{gap['file']} less {gap['less']}", "difference", "p", "McNemar p"]]
        for name, v in gap["scores"].items():
            exact = "-" if v["mcnemar"] is None else f"{v['mcnemar']:.3g}"
            lines.append(
                [TITLES[name], f"{v['value']:+.1f} [{v['low']:+.1f}, {v['high']:+.1f}]", f"{v['p']:.3g}", exact]
            )
        blocks.append(text_table(lines))
    return "\n\n".join([*blocks, "all times 100, with 95 % intervals"])


def _ordered(scores: dict[str, Any]) -> list[tuple[str, Any]]:
    """Sources by name, and all rows last; alone where there is one source."""
    sources = sorted((source, v) for source, v in scores.items() if source != ALL)
    return [*(sources if len(sources) > 1 else []), (ALL, scores[ALL])]


def _cell(values: dict[str, float] | None) -> str:
    return "-" if values is None else f"{values['value']:.1f} [{values['low']:.1f}, {values['high']:.1f}]"
