"""The published scoring rules as pure functions of one answer (or of a whole file of answers) and its ground truth.

A box is (x1, y1, x2, y2), x to the right and y down, in any one unit.
"""

from __future__ import annotations

from collections.abc import Sequence

Box = Sequence[float]


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0..1. A box without area meets nothing, so the result is 0 and never NaN."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def exact_match(prediction: str, reference: str | Sequence[str]) -> float:
    """1.0 where the prediction is the reference (any of several), up to case and outer white space; else 0.0."""
    golds = [reference] if isinstance(reference, str) else reference
    return float(any(prediction.strip().lower() == gold.strip().lower() for gold in golds))
