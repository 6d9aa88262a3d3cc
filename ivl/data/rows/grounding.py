"""Grounding: marks for objects and boxes → `<ref>` and `<box>` text; boxes of an answer.

The marks are `<ref-object>` and `<bbox>`; their contents are in the row's `objects`.

Boxes are x1, y1, x2, y2; in texts integers 0..1000, thousandths of the width and height of the image as it was before
any resize. Source: the grounding section of ms-swift's InternVL document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from ivl.reasoning import without_reasoning
from ivl.types import UserError, plural
from ivl.types import shortened as _short

Box = tuple[float, float, float, float]
Points = tuple[float, ...]
"""A box, or a point x, y"""
Reorient = Callable[[int, Box, bool], Box]
MARK = re.compile(r"<ref-object>|<bbox>")
_TYPES = ("real", "norm_1000", "norm_1")
_SPELLED = {"norm1000": "norm_1000", "norm1": "norm_1"}


def fill(
    texts: Sequence[str],
    objects: Any,
    size: Callable[[int], tuple[int, int]],
    compact: bool = False,
    reorient: Reorient | None = None,
) -> list[str]:
    """Replace the marks in the texts of a conversation, in reading order.

    `objects` has one of two forms, or is the JSON of one:
    - a list: the k-th `<ref-object>` and the k-th `<bbox>` both refer to the k-th entry, which has `caption`, `bbox`
      (one box or a list of boxes), `bbox_type` (default real) and `image` (index, default 0; or `image_id`);
    - lists in an object, as ms-swift 3 writes them: the k-th `<ref-object>` is the k-th of `ref`, the k-th `<bbox>` the
      k-th of `bbox`, a box or a point; one `bbox_type` for all, and `image_id` for each box.
    `bbox_type` is real (pixels), norm_1000 or norm_1 (norm1000, norm1). `size`: index of an image → (width, height);
    called only for `real` boxes. `compact`: `<box>[[…]]</box>` as the releases write it, not the document's
    `<box> [[…]] </box>`. `reorient`: index of an image, box in thousandths, True if it was written in pixels → the box
    in the image as it is shown; None: boxes stay as they are.
    Raises UserError where counts differ or a box is not one.
    """
    objects = read(objects)
    counts = {mark: sum(text.count(mark) for text in texts) for mark in ("<ref-object>", "<bbox>")}
    captions, boxes = (
        _entries(objects, size, bool(counts["<ref-object>"]), reorient)
        if isinstance(objects, list)
        else _columns(objects, size, reorient)
    )
    for mark, key, there in (("<ref-object>", "ref", len(captions)), ("<bbox>", "bbox", len(boxes))):
        if counts[mark] not in (0, there):
            objects_text = plural(there, "object") if isinstance(objects, list) else f"{there} in objects.{key}"
            raise UserError(f"{plural(counts[mark], f'{mark} mark')} but {objects_text}; expected one mark each")
    if (captions or boxes) and not any(counts.values()):
        objects_there = plural(max(len(captions), len(boxes)), "object")
        raise UserError(f"{objects_there} but no <ref-object> or <bbox> mark; write a mark where each is named")
    refs, written = iter(captions), iter(boxes)

    def replace(match: re.Match[str]) -> str:
        return write_boxes(next(written), compact) if match[0] == "<bbox>" else f"<ref>{next(refs)}</ref>"

    return [MARK.sub(replace, text) for text in texts]


Objects = list[dict[str, Any]] | dict[str, Any]


def read(objects: Any) -> Objects:
    """`objects` of a row in one of its two forms, its JSON parsed. Raises UserError where it is neither."""
    if isinstance(objects, str) and objects.strip():
        try:
            objects = json.loads(objects)
        except (ValueError, RecursionError) as error:
            raise UserError(f"objects: not valid JSON ({error}); expected a list of objects") from None
    if not objects and not isinstance(objects, (int, float)):
        return []
    if isinstance(objects, dict):
        return objects if _is_columns(objects) else [objects]
    if not isinstance(objects, list) or not all(isinstance(entry, dict) for entry in objects):
        raise UserError(f"objects: expected a list of objects with caption and bbox, found {_short(objects)}")
    return objects


def _is_columns(objects: dict[str, Any]) -> bool:
    """True for the form with lists in an object; False for a single object."""
    boxes = objects.get("bbox")
    nested = isinstance(boxes, list) and (not boxes or isinstance(boxes[0], (list, tuple)))
    return "caption" not in objects and (isinstance(objects.get("ref"), list) or nested)


def _entries(
    objects: list[dict[str, Any]], size: Callable[[int], tuple[int, int]], named: bool, reorient: Reorient | None
) -> tuple[list[str], list[list[Points]]]:
    """Captions and boxes of a list of objects."""
    captions, boxes = [], []
    for n, entry in enumerate(objects):
        caption = entry.get("caption")
        if named and not isinstance(caption, str):
            raise UserError(f"objects[{n}].caption: expected a text, found {caption!r}")
        captions.append(caption if isinstance(caption, str) else "")
        where, bbox = f"objects[{n}]", entry.get("bbox")
        if not isinstance(bbox, (list, tuple)) or not bbox:
            raise UserError(
                f"{where}.bbox: expected [x_min, y_min, x_max, y_max] or a list of those, found {_short(bbox)}"
            )
        kind = _kind(entry.get("bbox_type"), f"{where}.bbox_type")
        key = "image" if entry.get("image") is not None else "image_id"
        image = _index(entry.get(key), f"{where}.{key}")
        extent = _extent(kind, image, size)
        group = bbox if isinstance(bbox[0], (list, tuple)) else [bbox]
        scaled = [_scaled(box, *extent, f"{where}.bbox", kind) for box in group]
        boxes.append([_shown(box, image, kind, reorient) for box in scaled])
    return captions, boxes


def _columns(
    objects: dict[str, Any], size: Callable[[int], tuple[int, int]], reorient: Reorient | None
) -> tuple[list[str], list[list[Points]]]:
    """Captions and boxes of lists in an object."""
    columns = {key: objects.get(key) or [] for key in ("ref", "bbox", "image_id")}
    for key, value in columns.items():
        if not isinstance(value, list):
            raise UserError(f"objects.{key}: expected a list, found {_short(value)}")
    captions, bbox, images = columns.values()
    for n, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise UserError(f"objects.ref[{n}]: expected a text, found {_short(caption)}")
    if images and len(images) != len(bbox):
        raise UserError(
            f"objects.image_id: expected the index of an image for each of {len(bbox)} boxes, found {len(images)}"
        )
    kind, boxes = _kind(objects.get("bbox_type"), "objects.bbox_type"), []
    for n, box in enumerate(bbox):
        image = _index(images[n] if images else None, f"objects.image_id[{n}]")
        scaled = _scaled(box, *_extent(kind, image, size), f"objects.bbox[{n}]", kind, points=True)
        boxes.append([_shown(scaled, image, kind, reorient)])
    return captions, boxes


def _kind(value: Any, where: str) -> str:
    """Unit of a box: real, norm_1000 or norm_1."""
    kind = _SPELLED.get(value, value) if isinstance(value, str) else value
    kind = "real" if kind is None or kind == "" else kind
    if kind not in _TYPES:
        raise UserError(f"{where}: expected one of {', '.join(_TYPES)}, found {_short(kind)}")
    return kind


def _index(image: Any, where: str) -> int:
    """Index of the image that a box belongs to."""
    image = 0 if image is None else image
    if not isinstance(image, int) or isinstance(image, bool):
        raise UserError(f"{where}: expected the index of an image, from 0, found {_short(image)}")
    return image


def _shown(points: Points, image: int, kind: str, reorient: Reorient | None) -> Points:
    """Convert a box or point to the image as it is shown."""
    if reorient is None:
        return points
    x1, y1, x2, y2 = points if len(points) == 4 else (*points, *points)
    return reorient(image, (x1, y1, x2, y2), kind == "real")[: len(points)]


def _extent(kind: str, image: int, size: Callable[[int], tuple[int, int]]) -> tuple[int, int]:
    """Width and height that a box's numbers are relative to."""
    if kind == "real":
        return size(image)
    return (1000, 1000) if kind == "norm_1000" else (1, 1)


def _scaled(box: Any, width: int, height: int, where: str, kind: str, points: bool = False) -> Points:
    """Scale a box to thousandths, not yet rounded; with `points`, a point as well."""
    numbers = isinstance(box, (list, tuple)) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and -1e9 < v < 1e9 for v in box
    )
    if not numbers or not (len(box) == 4 or (points and len(box) == 2)):
        point = ", or a point x, y" * points
        raise UserError(f"{where}: expected four numbers x_min, y_min, x_max, y_max{point}, found {_short(box)}")
    x1, y1, x2, y2 = box if len(box) == 4 else (*box, *box)
    if x1 > x2 or y1 > y2:
        raise UserError(f"{where}: expected x_min <= x_max and y_min <= y_max, found {_short(box)}")
    # one pixel of slack: annotators round, and some count the last pixel as its far edge
    slack = 0.001 if kind == "norm_1" else 1
    if min(x1, y1) < -slack or x2 > width + slack or y2 > height + slack:
        raise UserError(f"{where}: {_short(box)} reaches outside of {width} x {height} ({kind}); check bbox_type")
    return (1000 * x1 / width, 1000 * y1 / height, 1000 * x2 / width, 1000 * y2 / height)[: len(box)]


def write_boxes(boxes: Sequence[Points], compact: bool = False) -> str:
    """Boxes in thousandths as a model writes them, rounded as Python rounds and clamped to 0..1000."""
    rounded = [[min(1000, max(0, round(v))) for v in box] for box in boxes]
    return f"<box>{rounded}</box>" if compact else f"<box> {rounded} </box>"


_NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
_BOX = rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]"
_BOXES = re.compile(rf"\[\s*{_BOX}(?:\s*,\s*{_BOX})*\s*\]|{_BOX}")
_ONE = re.compile(_BOX)
_TAG = re.compile(r"</?(?:box|ref)>")


def parse_boxes(text: str) -> list[tuple[str | None, list[Box]]]:
    """Boxes of an answer in reading order, in 0..1000: pairs of a name (None where there is none) and its boxes.

    Reads `<ref>cat</ref><box>[[1, 2, 3, 4]]</box>` in both spellings, and the same with the tags lost
    (`cat[[1, 2, 3, 4]]`), not those of a thought before `</think>`. Never raises: numbers that are no box (reversed,
    above 1000, not four) are left out.
    """
    groups: list[tuple[str | None, list[Box]]] = []
    text, end = without_reasoning(text), 0
    for match in _BOXES.finditer(text):
        before, end = text[end : match.start()], match.end()
        boxes = [box for box_text in _ONE.findall(match[0]) if (box := _parsed(box_text)) is not None]
        if not boxes:
            continue
        ref = next((part for part in reversed(before.split("</ref>")[:-1]) if "<ref>" in part), None)
        named = _TAG.sub("", before).strip(" \t\r\n,;:.") if ref is None else ref.partition("<ref>")[2]
        groups.append((named.strip() or None, boxes))
    return groups


def _parsed(text: str) -> Box | None:
    x1, y1, x2, y2 = (float(v) for v in text.strip("[]").split(","))
    good = 0 <= x1 <= x2 <= 1000 and 0 <= y1 <= y2 <= 1000
    return (x1, y1, x2, y2) if good else None


def to_pixels(box: Box, size: tuple[int, int]) -> Box:
    """Convert a box in thousandths to pixels of an image of `size` (width, height)."""
    width, height = size
    x1, y1, x2, y2 = box
    return x1 * width / 1000, y1 * height / 1000, x2 * width / 1000, y2 * height / 1000
