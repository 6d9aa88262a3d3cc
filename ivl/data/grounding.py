"""`<ref-object>` and `<bbox>` marks with `objects` → `<ref>…</ref>` and `<box>…</box>`, and boxes back from an answer.

Boxes are x1, y1, x2, y2; in texts integers 0..1000, thousandths of the width and height of the image as it was before
any resize. Source: the grounding section of ms-swift's InternVL document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from ivl.reasoning import without_reasoning
from ivl.types import UserError, many
from ivl.types import shortened as _short

Box = tuple[float, float, float, float]
MARK = re.compile(r"<ref-object>|<bbox>")
_TYPES = ("real", "norm_1000", "norm_1")


def fill(
    texts: Sequence[str], objects: Any, size: Callable[[int], tuple[int, int]], compact: bool = False
) -> list[str]:
    """The texts of a conversation in reading order, with their marks replaced.

    The k-th `<ref-object>` and the k-th `<bbox>` both speak of the k-th object. `objects`: a list of dicts (or its
    JSON) with `caption`, `bbox` (one box or a list of boxes), `bbox_type` (real, norm_1000 or norm_1; default real) and
    `image` (index, default 0). `size`: index of an image → (width, height); asked only for `real` boxes. `compact`:
    `<box>[[…]]</box>` as the releases write it, not the document's `<box> [[…]] </box>`.
    Raises UserError where counts differ or a box is not one.
    """
    objects = _read(objects)
    for mark in ("<ref-object>", "<bbox>"):
        count = sum(text.count(mark) for text in texts)
        if count and count != len(objects):
            raise UserError(f"{many(count, f'{mark} mark')} but {many(len(objects), 'object')}; expected one mark each")
    if objects and not any(MARK.search(text) for text in texts):
        raise UserError(
            f"{many(len(objects), 'object')} but no <ref-object> or <bbox> mark; write a mark where each is named"
        )
    boxes = [_boxes(entry, n, size) for n, entry in enumerate(objects)]
    captions, written = iter(objects), iter(boxes)

    def replace(match: re.Match[str]) -> str:
        if match[0] == "<bbox>":
            return write_boxes(next(written), compact)
        return f"<ref>{next(captions)['caption']}</ref>"

    for n, entry in enumerate(objects):
        if any("<ref-object>" in text for text in texts) and not isinstance(entry.get("caption"), str):
            raise UserError(f"objects[{n}].caption: expected a text, found {entry.get('caption')!r}")
    return [MARK.sub(replace, text) for text in texts]


def _read(objects: Any) -> list[dict[str, Any]]:
    if isinstance(objects, str) and objects.strip():
        try:
            objects = json.loads(objects)
        except (ValueError, RecursionError) as error:
            raise UserError(f"objects: not valid JSON ({error}); expected a list of objects") from None
    if not objects and not isinstance(objects, (int, float)):
        return []
    objects = [objects] if isinstance(objects, dict) else objects
    if not isinstance(objects, list) or not all(isinstance(entry, dict) for entry in objects):
        raise UserError(f"objects: expected a list of objects with caption and bbox, found {_short(objects)}")
    return objects


def _boxes(entry: dict[str, Any], n: int, size: Callable[[int], tuple[int, int]]) -> list[Box]:
    """Boxes of an object in thousandths, not yet rounded."""
    where = f"objects[{n}]"
    found = entry.get("bbox")
    kind = entry.get("bbox_type") or "real"
    if kind not in _TYPES:
        raise UserError(f"{where}.bbox_type: expected one of {', '.join(_TYPES)}, found {_short(kind)}")
    if not isinstance(found, (list, tuple)) or not found:
        raise UserError(
            f"{where}.bbox: expected [x_min, y_min, x_max, y_max] or a list of those, found {_short(found)}"
        )
    boxes = found if isinstance(found[0], (list, tuple)) else [found]
    if kind == "real":
        image = entry.get("image", 0)
        if not isinstance(image, int) or isinstance(image, bool):
            raise UserError(f"{where}.image: expected the index of an image, from 0, found {_short(image)}")
        width, height = size(image)
    else:
        width = height = 1000 if kind == "norm_1000" else 1
    return [_scaled(box, width, height, f"{where}.bbox", kind) for box in boxes]


def _scaled(box: Any, width: int, height: int, where: str, kind: str) -> Box:
    numbers = isinstance(box, (list, tuple)) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and -1e9 < v < 1e9 for v in box
    )
    if not numbers or len(box) != 4:
        raise UserError(f"{where}: expected four numbers x_min, y_min, x_max, y_max, found {_short(box)}")
    x1, y1, x2, y2 = box
    if x1 > x2 or y1 > y2:
        raise UserError(f"{where}: expected x_min <= x_max and y_min <= y_max, found {_short(box)}")
    # one pixel of slack: annotators round, and some count the last pixel as its far edge
    slack = 0.001 if kind == "norm_1" else 1
    if min(x1, y1) < -slack or x2 > width + slack or y2 > height + slack:
        raise UserError(f"{where}: {_short(box)} reaches outside of {width} x {height} ({kind}); check bbox_type")
    return 1000 * x1 / width, 1000 * y1 / height, 1000 * x2 / width, 1000 * y2 / height


def write_boxes(boxes: Sequence[Box], compact: bool = False) -> str:
    """Boxes in thousandths as a model writes them, rounded as Python rounds and clamped to 0..1000."""
    whole = [[min(1000, max(0, round(v))) for v in box] for box in boxes]
    return f"<box>{whole}</box>" if compact else f"<box> {whole} </box>"


_NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
_BOX = rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]"
_BOXES = re.compile(rf"\[\s*{_BOX}(?:\s*,\s*{_BOX})*\s*\]|{_BOX}")
_ONE = re.compile(_BOX)
_TAG = re.compile(r"</?(?:box|ref)>")


def parse_boxes(text: str) -> list[tuple[str | None, list[Box]]]:
    """Boxes of an answer in reading order, in 0..1000, each group with what it speaks of where that is said.

    Reads `<ref>cat</ref><box>[[1, 2, 3, 4]]</box>` in both spellings, and the same with the tags lost
    (`cat[[1, 2, 3, 4]]`), not those of a thought before `</think>`. Never raises: what is no box (reversed, above
    1000, not four numbers) is left out.
    """
    groups: list[tuple[str | None, list[Box]]] = []
    text, end = without_reasoning(text), 0
    for match in _BOXES.finditer(text):
        before, end = text[end : match.start()], match.end()
        boxes = [box for one in _ONE.findall(match[0]) if (box := _parsed(one)) is not None]
        if not boxes:
            continue
        refs = re.findall(r"<ref>(.*?)</ref>", before, flags=re.DOTALL)
        named = refs[-1] if refs else _TAG.sub("", before).strip(" \t\r\n,;:.")
        groups.append((named.strip() or None, boxes))
    return groups


def _parsed(text: str) -> Box | None:
    x1, y1, x2, y2 = (float(v) for v in text.strip("[]").split(","))
    good = 0 <= x1 <= x2 <= 1000 and 0 <= y1 <= y2 <= 1000
    return (x1, y1, x2, y2) if good else None


def to_pixels(box: Box, size: tuple[int, int]) -> Box:
    """A box in thousandths → pixels of an image of `size` (width, height)."""
    width, height = size
    x1, y1, x2, y2 = box
    return x1 * width / 1000, y1 * height / 1000, x2 * width / 1000, y2 * height / 1000
