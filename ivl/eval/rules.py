"""Scoring rules of benchmarks: scores of answers added up to the reported number.

Every number is a function of counts added up over units (an answer, a picture's pair of questions, the rotations
of one question), so that a bootstrap only has to add up other units. U units, G categories, K counts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ivl.errors import UserError
from ivl.eval import metrics
from ivl.eval.captions import caption_scores
from ivl.eval.choices import choice, infer_choice, mvbench_match, videomme_letter, yes_or_no
from ivl.eval.metrics import Mode

Row = dict[str, Any]
Combine = Callable[[np.ndarray], np.ndarray]
"""Counts of each category (..., G, K) → reported number (...)."""


@dataclass(frozen=True)
class Scored:
    """Scores of a file of answers."""

    scores: list[float]
    """Score of each answer, 0..1 (CIDEr: 0..10)."""
    parsed: list[str]
    """Reading of each answer, such as its option letter."""
    unit: list[int]
    """Unit of each answer."""
    counts: np.ndarray
    """Counts of each unit, (U, K)."""
    category: np.ndarray
    """Category of each unit, (U,) int, index into `categories`."""
    categories: list[str]
    combine: Combine
    extra: dict[str, float] = field(default_factory=dict)
    """Further numbers of the whole file."""

    def total(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Return the reported number, () for the file itself or (R,) for `weights` (R, U), the draws of each unit."""
        weights = np.ones(len(self.counts)) if weights is None else weights
        members = [self.category == n for n in range(len(self.categories))]
        return self.combine(np.stack([weights[..., m] @ self.counts[m] for m in members], axis=-2))

    def by_category(self) -> dict[str, float]:
        """Return the reported number of each category alone."""
        numbers = {}
        for n, name in enumerate(self.categories):
            numbers[name] = float(self.combine(self.counts[self.category == n].sum(0)[None]))
        return numbers


@dataclass(frozen=True)
class Rule:
    """Scoring of a benchmark's answers."""

    metric: str
    """Name of the reported number"""
    post: str
    """Post-processing of an answer, in words, for the record."""
    run: Callable[[Sequence[Row], Mode], Scored]
    decimals: int = 2


# -- combining counts -------------------------------------------------------------------------------------------------


def pooled(counts: np.ndarray) -> np.ndarray:
    """100 · right / all; counts (right, all)."""
    summed = counts.sum(-2)
    return 100 * summed[..., 0] / summed[..., 1]


def _mean_share(counts: np.ndarray) -> np.ndarray:
    """Mean of the categories' shares; counts (right, all)."""
    return (100 * counts[..., 0] / counts[..., 1]).mean(-1)


def _sum(counts: np.ndarray) -> np.ndarray:
    """Number of right answers; counts (right, all)."""
    return counts[..., 0].sum(-1)


def _mme(counts: np.ndarray) -> np.ndarray:
    """Sum over tasks of accuracy and accuracy of whole pairs, each times 100; counts (right, rows, both, pairs)."""
    right, rows, both, pairs = np.moveaxis(counts, -1, 0)
    return (100 * right / np.maximum(rows, 1) + 100 * both / pairs).sum(-1)


def _f1(counts: np.ndarray) -> np.ndarray:
    """Mean of the categories' F1, times 100; counts (true and false positives, true and false negatives)."""
    tp, fp, _, fn = np.moveaxis(counts, -1, 0)
    return (100 * 2 * tp / np.maximum(2 * tp + fp + fn, 1)).mean(-1)


def _hallusionbench(counts: np.ndarray) -> np.ndarray:
    """Mean of the three accuracies, by answer, figure and question; counts (right, all) of each."""
    summed = counts.sum(-2)
    return (100 * summed[..., 0::2] / summed[..., 1::2]).mean(-1)


# -- from rows to counts ----------------------------------------------------------------------------------------------


def required_field(row: Row, key: str) -> Any:
    """Return a field of the ground truth. Raises UserError with the row's name."""
    value = row.get(key)
    if value is None or value == []:
        raise UserError(f"{row['where']}: no {key!r}; --rows FILE joins the ground truth by id")
    return value


def golds(row: Row) -> list[str]:
    """Expected answers of a row, all of them."""
    answers = row.get("answers")
    return [str(a) for a in (answers if isinstance(answers, list) else [answers])] if answers else [reference(row)]


def reference(row: Row) -> str:
    return str(required_field(row, "reference"))


def _categories(names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    order = list(dict.fromkeys(names))
    place = {name: n for n, name in enumerate(order)}
    return np.array([place[name] for name in names]), order


def _by_answer(judge: Callable[[Row, Mode], tuple[float, str]], combine: Combine = pooled) -> Callable:
    """Make a rule that scores each answer by itself. `judge`: row → score, reading of the answer."""

    def run(rows: Sequence[Row], mode: Mode) -> Scored:
        judged = [_judge_row(row, judge, mode) for row in rows]
        scores = [float(score) for score, _ in judged]
        category, names = _categories([str(row.get("category") or "") for row in rows])
        counts = np.stack([np.array(scores), np.ones(len(scores))], axis=1)
        return Scored(
            scores, [reading for _, reading in judged], list(range(len(rows))), counts, category, names, combine
        )

    return run


def _judge_row(row: Row, judge: Callable[[Row, Mode], tuple[float, str]], mode: Mode) -> tuple[float, str]:
    try:
        return judge(row, mode)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(row["where"]) else f"{row['where']}: {text}") from None


def _vqa(row: Row, mode: Mode) -> tuple[float, str]:
    return metrics.vqa_accuracy(row["response"], golds(row), mode), metrics.vqa_normalize(row["response"], mode)


def _text(score: Callable[[str, list[str], Mode], float]) -> Callable[[Row, Mode], tuple[float, str]]:
    return lambda row, mode: (score(row["response"], golds(row), mode), row["response"].strip())


def _options(row: Row) -> Mapping[str, str]:
    options = row.get("options") or {}
    return dict(zip("ABCDEFGHIJKLM", options)) if isinstance(options, list) else options


def _scienceqa(row: Row, mode: Mode) -> tuple[float, str]:
    reading = choice(row["response"], _options(row), mode, brackets=True)
    return reading == reference(row), reading


def _letter(row: Row, mode: Mode) -> tuple[float, str]:
    """Score of SEED: its published number takes the first character (`seed/calculation.py`)."""
    reading = row["response"][:1] if mode == "compat" else choice(row["response"], _options(row), mode)
    return reading == reference(row), reading


def _mmmu(row: Row, mode: Mode) -> tuple[float, str]:
    if options := _options(row):
        reading = choice(row["response"], options, mode)
        return reading in golds(row), reading
    return metrics.mmmu_open(row["response"], golds(row), mode), row["response"].strip()


def _ocrbench(row: Row, mode: Mode) -> tuple[float, str]:
    text = row["response"]
    return metrics.ocrbench_match(text, golds(row), required_field(row, "category"), mode), text.strip()


def _refcoco(row: Row, mode: Mode) -> tuple[float, str]:
    box = metrics.refcoco_box(row["response"], mode)
    score = metrics.refcoco_match(row["response"], required_field(row, "box"), required_field(row, "size"), mode)
    return score, "" if box is None else ", ".join(f"{value:.3f}" for value in box)


def _mvbench(row: Row, mode: Mode) -> tuple[float, str]:
    return mvbench_match(row["response"], reference(row), mode), row["response"].strip()


def _videomme(row: Row, mode: Mode) -> tuple[float, str]:
    reading = videomme_letter(row["response"], _options(row), mode)
    return reading == reference(row), reading


def _mcq(row: Row, mode: Mode) -> tuple[float, str]:
    options = _options(row)
    if mode == "compat":  # what VLMEvalKit's rules cannot read is wrong without a judge
        reading = infer_choice(row["response"], options) or "Z"
    else:
        reading = choice(row["response"], options, mode)
    return reading == reference(row), reading


def _mathvista(row: Row, mode: Mode) -> tuple[float, str]:
    if options := _options(row):
        reading = (infer_choice if mode == "compat" else partial(choice, mode="strict"))(row["response"], options)
        return reading == reference(row), reading
    return metrics.mathvista_match(row["response"], reference(row), mode), row["response"].strip()


def _hallusionbench_rule(rows: Sequence[Row], mode: Mode) -> Scored:
    """Score HallusionBench (VLMEvalKit, `Hallusion_rating`).

    A figure and a question are right where all their answers are. A unit is a set of figures and their questions.
    """
    parsed = [yes_or_no(row["response"]) for row in rows]
    if mode == "strict":  # of "Yes, no doubt" the first word counts
        parsed = [_first_yes_or_no(row["response"]) for row in rows]
    scores = [float(reading == reference(row)) for reading, row in zip(parsed, rows)]
    parts = [str(required_field(row, "group")).rsplit("/", 3) for row in rows]
    for row, part in zip(rows, parts):
        if len(part) != 4:
            raise UserError(f"{row['where']}: group {row['group']!r}; expected l2-category/set/figure/question")
    unit, sets = _categories([f"{part[0]}/{part[1]}" for part in parts])
    every = np.arange(len(rows))
    members = [_categories([f"{part[0]}/{part[1]}/{part[n]}" for part in parts])[0] for n in (2, 3)]
    counts = np.hstack([_all_right(np.array(scores), unit, groups) for groups in (every, *members)])
    first = {int(u): row for u, row in reversed(list(zip(unit, rows)))}
    category, names = _categories([str(first[u].get("category") or "") for u in range(len(sets))])
    summed = counts.sum(0)
    extra = {name: float(100 * summed[k] / summed[k + 1]) for k, name in ((0, "aAcc"), (2, "fAcc"), (4, "qAcc"))}
    return Scored(scores, parsed, unit.tolist(), counts, category, names, _hallusionbench, extra)


def _all_right(scores: np.ndarray, unit: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return (U, 2): groups of a unit whose answers are all right, and groups of the unit; `groups` (rows,) int."""
    right, home = np.ones(groups.max() + 1), np.zeros(groups.max() + 1, dtype=int)
    np.minimum.at(right, groups, scores)
    home[groups] = unit
    size = int(unit.max()) + 1
    return np.stack([np.bincount(home, right, size), np.bincount(home, minlength=size)], axis=1)


def _first_yes_or_no(answer: str) -> str:
    match = re.search(r"(?i)\b(yes|no)\b", answer)
    return match.group(1).capitalize() if match else ""


def _circular(rows: Sequence[Row], mode: Mode) -> Scored:
    """Score circular evaluation (VLMEvalKit, `mcq_circular_eval`).

    A question is right where it is right under all rotations of its options.
    """
    parsed = []
    for row in rows:
        options = _options(row)
        reading = choice(row["response"], options, mode)
        parsed.append(infer_choice(reading, options) if mode == "compat" else reading)
    scores = [float(reading == reference(row)) for reading, row in zip(parsed, rows)]
    unit, groups = _categories([str(row.get("group") or row["id"]) for row in rows])
    first = {int(u): row for u, row in reversed(list(zip(unit, rows)))}
    right = np.ones(len(groups))
    np.minimum.at(right, unit, scores)
    category, names = _categories([str(first[u].get("category") or "") for u in range(len(groups))])
    counts = np.stack([right, np.ones(len(groups))], axis=1)
    vanilla = {"every rotation by itself": 100 * float(np.mean(scores))}
    return Scored(scores, parsed, unit.tolist(), counts, category, names, pooled, vanilla)


def _mme_rule(rows: Sequence[Row], mode: Mode) -> Scored:
    parsed = [metrics.mme_answer(row["response"], mode) for row in rows]
    scores = [float(reading == reference(row).strip().lower()) for reading, row in zip(parsed, rows)]
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for n, row in enumerate(rows):
        members[str(required_field(row, "category")), str(required_field(row, "group"))].append(n)
    unpaired = [f"{category}/{group}" for (category, group), pair in members.items() if len(pair) != 2]
    if unpaired:
        raise UserError(
            f"MME: expected two questions a picture; {len(unpaired)} have another number: {', '.join(unpaired[:5])}"
        )
    counts, unit = np.zeros((len(members), 4)), [0] * len(rows)
    for u, pair in enumerate(members.values()):
        right = sum(scores[n] for n in pair)
        counts[u] = right, sum(parsed[n] is not None for n in pair), right == 2, 1
        for n in pair:
            unit[n] = u
    category, names = _categories([name for name, _ in members])
    scored = Scored(scores, [reading or "left out" for reading in parsed], unit, counts, category, names, _mme)
    cognition = {"commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"}
    parts = {"perception": 0.0, "cognition": 0.0}
    for name, value in scored.by_category().items():
        parts["cognition" if name in cognition else "perception"] += value
    return Scored(scores, scored.parsed, unit, counts, category, names, _mme, parts)


def _pope_rule(rows: Sequence[Row], mode: Mode) -> Scored:
    readings = [metrics.pope_answer(row["response"], mode) for row in rows]
    yes = np.array([answer == "yes" for answer in readings])
    wanted = np.array([reference(row).strip().lower() != "no" for row in rows])
    counts = np.stack([yes & wanted, yes & ~wanted, ~yes & ~wanted, ~yes & wanted], axis=1).astype(float)
    category, names = _categories([str(row.get("category") or "") for row in rows])
    tp, fp, tn, fn = counts.sum(0)
    extra = {
        "accuracy": 100 * (tp + tn) / len(rows),
        "precision": 100 * tp / max(tp + fp, 1),
        "recall": 100 * tp / max(tp + fn, 1),
        "yes ratio": 100 * yes.mean(),
    }
    right = (yes == wanted).astype(float).tolist()
    extra = {name: float(value) for name, value in extra.items()}
    return Scored(right, list(readings), list(range(len(rows))), counts, category, names, _f1, extra)


def _captions(rows: Sequence[Row], mode: Mode) -> Scored:
    captions = caption_scores([row["response"] for row in rows], [golds(row) for row in rows])
    counts = np.stack([captions.cider, np.ones(len(rows))], axis=1)
    extra = {f"BLEU-{n}": 100 * value for n, value in enumerate(captions.bleu, 1)} | {"ROUGE-L": 100 * captions.rouge}
    units = list(range(len(rows)))
    category = np.zeros(len(rows), dtype=int)
    return Scored(captions.cider.tolist(), captions.tokens, units, counts, category, [""], pooled, extra)


RULES: dict[str, Rule] = {
    "vqa": Rule("VQA soft accuracy", "EvalAI normaliser", _by_answer(_vqa)),
    "gqa": Rule("accuracy", "final full stops cut, lower case", _by_answer(_text(metrics.gqa_match))),
    "exact": Rule(
        "accuracy",
        "stripped, lower case",
        _by_answer(_text(lambda prediction, gold, mode: metrics.exact_match(prediction, gold))),
    ),
    "relaxed": Rule("relaxed accuracy", "stripped", _by_answer(_text(metrics.relaxed_accuracy), _mean_share)),
    "anls": Rule("ANLS", "lower case, white space collapsed", _by_answer(_text(metrics.anls))),
    "mme": Rule("score", "Chinese and true/false mapped to yes/no, first four characters read", _mme_rule),
    "pope": Rule("F1", "first sentence; No, no or not: no, else yes", _pope_rule),
    "circular": Rule("circular accuracy", "option letter, then VLMEvalKit's matching without a judge", _circular),
    "scienceqa": Rule("accuracy", "option letter, also X. and (X)", _by_answer(_scienceqa)),
    "mmmu": Rule("accuracy", "option letter; open questions: part after the key word", _by_answer(_mmmu)),
    "mcq": Rule("accuracy", "VLMEvalKit's matching without a judge", _by_answer(_mcq)),
    "mathvista": Rule(
        "accuracy",
        "option letter by VLMEvalKit's matching without a judge; else the whole answer",
        _by_answer(_mathvista),
    ),
    "hallusionbench": Rule("mean of aAcc, fAcc and qAcc", "yes or no, where one of them occurs", _hallusionbench_rule),
    "letter": Rule("accuracy", "first character", _by_answer(_letter)),
    "ocrbench": Rule(
        "score", "lower case, line ends to spaces; formulas: spaces removed", _by_answer(_ocrbench, _sum), 0
    ),
    "captions": Rule("CIDEr", "tokens as the Penn Treebank's, punctuation dropped", _captions),
    "refcoco": Rule("precision at IoU 0.5", "first box of the answer", _by_answer(_refcoco, _mean_share)),
    "mvbench": Rule("accuracy", "first word against the option's letter", _by_answer(_mvbench)),
    "videomme": Rule("accuracy", "known beginnings cut, first letter A to D", _by_answer(_videomme)),
}
