"""Scores of generated answers in validation: per row, per source, and over all processes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ivl.data.rows.grounding import parse_boxes
from ivl.eval.metrics import anls, exact_match, iou, relaxed_accuracy, vqa_accuracy
from ivl.inference.sampling import NotFinite
from ivl.reasoning import without_reasoning
from ivl.types import Conversation, UserError, printable, text_table

Metric = Literal["exact", "vqa", "anls", "relaxed", "iou", "iou50", "cider", "bleu4", "rouge"]
"""By the rules of `ivl.eval.metrics` and `ivl.eval.captions`; the last three are of all rows together"""


def _overlaps(answer: str, reference: str) -> list[float] | None:
    """IoU of each pair of boxes, in order; 0 for a missing or surplus box. None where the reference has no box."""
    expected, predicted = ([box for _, boxes in parse_boxes(text) for box in boxes] for text in (reference, answer))
    if not expected:
        return None
    return [iou(a, b) if a and b else 0.0 for a, b in zip_longest(predicted, expected)]


def _mean_iou(answer: str, reference: str) -> float | None:
    overlaps = _overlaps(answer, reference)
    return None if overlaps is None else sum(overlaps) / len(overlaps)


def _half_iou(answer: str, reference: str) -> float | None:
    """Share of the boxes with an IoU of at least 0.5."""
    overlaps = _overlaps(answer, reference)
    return None if overlaps is None else sum(value >= 0.5 for value in overlaps) / len(overlaps)


_ROW_METRICS: dict[str, Callable[[str, str], float | None]] = {
    "exact": exact_match,
    "vqa": lambda answer, reference: vqa_accuracy(answer, [reference], "strict"),
    "anls": lambda answer, reference: anls(answer, [reference]),
    "relaxed": lambda answer, reference: relaxed_accuracy(answer, [reference]),
    "iou": _mean_iou,
    "iou50": _half_iou,
}
CAPTIONS = ("cider", "bleu4", "rouge")


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise UserError where a metric is unknown, or needs a package that is not installed."""
    if unknown := [name for name in metrics if name not in get_args(Metric)]:
        raise UserError(f"model.metrics: expected some of {', '.join(get_args(Metric))}, found {unknown[0]!r}")
    captions = [name for name in metrics if name in CAPTIONS]
    if captions and find_spec("pycocoevalcap") is None:
        raise UserError(
            f"model.metrics: {captions[0]} needs the package pycocoevalcap, which is not installed; "
            'pip install -e ".[eval]", or leave it out'
        )


def score(row: Conversation, answer: str, metrics: Sequence[str] = ("exact", "iou")) -> dict[str, float]:
    """Score one row by the metrics that apply to it; reasoning before the answer is not judged."""
    if row.reference is None:
        return {}
    answer, reference = without_reasoning(answer), without_reasoning(row.reference)
    values = {name: _ROW_METRICS[name](answer, reference) for name in metrics if name in _ROW_METRICS}
    return {name: float(value) for name, value in values.items() if value is not None}


class Scores:
    """Sums of one validation, per kind of row; the kind "" is all rows."""

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics = tuple(metrics)
        self._sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._captions: list[tuple[str, str, str]] = []
        """(kind, answer, reference)"""

    def add_losses(self, rows: Sequence[Conversation], losses: Tensor, tokens: Tensor, dtype: torch.dtype) -> None:
        """Add a batch: negative log-likelihood and supervised tokens of each row. Raises NotFinite for the first row
        whose loss is not finite."""
        for number, (row, loss, count) in enumerate(zip(rows, losses.tolist(), tokens.tolist())):
            if not math.isfinite(loss):
                raise NotFinite(number, dtype)
            for kind in {"", row.source or "rows"}:
                self._sums[kind]["loss"] += loss
                self._sums[kind]["tokens"] += count

    def add_answer(self, row: Conversation, answer: str) -> dict[str, float]:
        """Add one answer. Returns its scores."""
        scores = score(row, answer, self.metrics)
        if row.reference is not None and any(name in CAPTIONS for name in self.metrics):
            texts = without_reasoning(answer), without_reasoning(row.reference)
            self._captions.append((row.source or "rows", *texts))
        for kind in {"", row.source or "rows"}:
            sums = self._sums[kind]
            sums["rows"] += 1
            for name, value in scores.items():
                sums[name] += value
                sums[f"{name}_rows"] += 1
        return scores

    def means(self, ranks: int = 1) -> dict[str, dict[str, float]]:
        """Means over all processes (each must call it): kind → rows, loss and the metrics that apply."""
        parts: list[Any] = [({k: dict(v) for k, v in self._sums.items()}, self._captions)]
        if ranks > 1:
            gathered: list[Any] = [None] * ranks
            torch.distributed.all_gather_object(gathered, parts[0])
            parts = gathered
        means = summary([sums for sums, _ in parts], self.metrics)
        captions = [caption for _, pairs in parts for caption in pairs]
        for kind in means if captions else ():
            pairs = [(answer, gold) for source, answer, gold in captions if kind in ("", source)]
            means[kind] |= self._captions_of(pairs)
        return means

    def _captions_of(self, pairs: list[tuple[str, str]]) -> dict[str, float]:
        if not pairs:
            return {}
        from ivl.eval.captions import caption_scores

        scores = caption_scores([answer for answer, _ in pairs], [[gold] for _, gold in pairs])
        values = {"cider": float(scores.cider.mean()), "bleu4": scores.bleu[3], "rouge": scores.rouge}
        return {name: values[name] for name in CAPTIONS if name in self.metrics}


def summary(tallies: list[dict[str, dict[str, float]]], metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Means per kind of row, from the sums of all processes."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for tally in tallies:
        for kind, values in tally.items():
            for name, value in values.items():
                sums[kind][name] += value
    means: dict[str, dict[str, float]] = {}
    for kind in sorted(sums):
        values = sums[kind]
        means[kind] = {"rows": values["rows"]}
        if values["tokens"]:
            means[kind]["loss"] = values["loss"] / values["tokens"]
        for name in metrics:
            if values[f"{name}_rows"]:
                means[kind][name] = values[name] / values[f"{name}_rows"]
    return means


_TITLES = {
    "iou": "mean IoU", "iou50": "IoU>=.5", "anls": "ANLS", "cider": "CIDEr", "bleu4": "BLEU-4", "rouge": "ROUGE-L",
}  # fmt: skip


def scores_table(scores: dict[str, dict[str, float]], with_loss: bool = False) -> str:
    """Table of held-out scores per kind of row, as text; shares in percent, the others as they are."""
    columns = [*(["loss"] if with_loss else []), *get_args(Metric)]
    names = [name for name in columns if any(name in values for values in scores.values())]
    rows = [["held-out rows", "rows", *map(title, names)]]
    if len(scores) == 2 and "" in scores:  # one kind: its line is that of all
        scores = {"": scores[""]}
    for kind, values in sorted(scores.items(), key=lambda item: (item[0] == "", item[0])):
        cells = [cell(name, values.get(name)) for name in names]
        rows.append([printable(kind, " ") or "all", str(int(values["rows"])), *cells])
    return text_table(rows)


def title(name: str) -> str:
    """Return a metric's name in tables."""
    return _TITLES.get(name, name)


def cell(name: str, value: float | None) -> str:
    """Write a metric's value in tables: a share in percent, others with three digits, "-" where there is none."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if name in ("exact", "vqa", "relaxed", "iou50") else f"{value:.3f}"
