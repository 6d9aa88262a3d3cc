"""Published scoring rules as pure functions of one answer and its ground truth.

`compat` gives what the published script gives, known defects included; `strict` mends those that the docstring names.
Sources are OpenGVLab/InternVL `internvl_chat/eval` (commit 2410d1d) and, where its README sends people there,
open-compass/VLMEvalKit (commit e8e78f0). A box is (x1, y1, x2, y2), x to the right and y down, in any one unit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from rapidfuzz.distance import Levenshtein

from ivl.errors import UserError

Mode = Literal["compat", "strict"]
Box = Sequence[float] | Sequence[np.floating]


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0..1. A box without area meets nothing: 0, never NaN."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def exact_match(prediction: str, reference: str | Sequence[str]) -> float:
    """Return 1.0 where the prediction is the reference (any of several), up to case and outer white space; else 0.0."""
    golds = [reference] if isinstance(reference, str) else reference
    return float(any(prediction.strip().lower() == gold.strip().lower() for gold in golds))


# -- VQA soft accuracy ------------------------------------------------------------------------------------------------

_CONTRACTED = """\
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, c in enumerate(word) if c == "'"}
_CONTRACTIONS_OF = {
    # The published table also lists forms of "I" with a capital, which lowered text never meets.
    "compat": _CONTRACTIONS | {"somebody'd": "somebodyd"},
    "strict": _CONTRACTIONS | {"im": "i'm", "ive": "i've", "id've": "i'd've", "i'dve": "i'd've"},
}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'


@lru_cache(maxsize=1 << 16)  # people give the same answers again and again
def vqa_normalize(answer: str, mode: Mode = "compat") -> str:
    """EvalAI form of an answer: lower case, no articles, digits for number words, contractions restored.

    Source: internvl_chat/eval/vqa/textvqa_eval.py. Defects: at most 32 full stops are removed (a flag passed as a
    count), "somebody'd" loses its apostrophe, the contractions of "I" never apply.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for mark in _PUNCTUATION:
        beside_space = mark + " " in spaced or " " + mark in spaced
        text = text.replace(mark, "" if beside_space else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32 if mode == "compat" else 0)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    table = _CONTRACTIONS_OF[mode]
    return " ".join(table.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(prediction: str, answers: Sequence[str], mode: Mode = "compat") -> float:
    """Soft accuracy, 0..1: the mean over the people of min(1, number of others with the same answer / 3).

    `compat` takes exactly 10 answers, as the script asserts; `strict` any number from 1, counting "a third of the
    others" as 3 of 9 is, so that it equals `compat` at 10. Raises UserError for another number.
    """
    people = len(answers)
    if people != 10 and (mode == "compat" or people == 0):
        raise UserError(f"expected 10 answers by people, found {people}; --mode strict takes any number from 1")
    normalized = vqa_normalize(prediction, mode)
    agree = [vqa_normalize(answer, mode) == normalized for answer in answers]
    if people == 1:
        return float(agree[0])
    enough = (people - 1) / 3
    total = 0.0
    for match in agree:  # one by one: from Python 3.12 on, sum() rounds otherwise than the script did
        total += min(1, (sum(agree) - match) / enough)
    return total / people


# -- documents, charts, exact answers ---------------------------------------------------------------------------------


def anls(prediction: str, answers: Sequence[str], mode: Mode = "compat", threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one answer: the best over the golds, 0 below the threshold.

    Source: internvl_chat/eval/vqa/infographicsvqa_eval.py. Defect: the distance is taken after white space is
    collapsed, the length it is divided by before, so padding with spaces raises the score.
    """
    values = []
    for gold in answers:
        a, b = (" ".join(text.lower().split()) for text in (gold, prediction))
        lengths = (gold.upper(), prediction.upper()) if mode == "compat" else (a, b)
        length = max(map(len, lengths))
        values.append(Levenshtein.distance(a, b) / length if length else 0.0)
    score = 1 - min(values)
    return score if score >= threshold else 0.0


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy(prediction: str, answers: Sequence[str], mode: Mode = "compat", tolerance: float = 0.05) -> float:
    """Return 1.0 where a number is within 5 % of a gold number, or a text is a gold text up to case.

    Source: internvl_chat/eval/vqa/evaluate_vqa.py. Defect: prediction and gold are swapped in the call, so the 5 % are
    relative to the prediction; `strict` is the published formula (Masry et al. 2022, section 5.1).
    """

    def close(answer: str, gold: str) -> bool:
        base, other = (answer, gold) if mode == "compat" else (gold, answer)
        base_number, other_number = _number(base), _number(other)
        if other_number is not None and base_number:
            return abs(other_number - base_number) / abs(base_number) <= tolerance
        return answer.lower() == gold.lower()

    return float(any(close(prediction.strip(), gold) for gold in answers))


def gqa_match(prediction: str, answers: Sequence[str], mode: Mode = "compat") -> float:
    """Exact match of GQA's eval.py after final full stops are cut and the prediction is lowered.

    Source: internvl_chat/eval/vqa/convert_gqa_for_eval.py. Defect: white space, and capitals of the gold, count.
    """
    if mode == "strict":
        return exact_match(prediction.strip().rstrip("."), answers)
    return float(prediction.rstrip(".").lower() in answers)


def ocrbench_match(prediction: str, answers: Sequence[str], category: str, mode: Mode = "compat") -> float:
    """Return 1.0 where a gold answer is contained in the prediction; handwritten formulas are compared without spaces.

    Source: VLMEvalKit vlmeval/dataset/utils/ocrbench.py. Defect: "1" is found in "10" and "art" in "party";
    `strict` wants no Latin letter or digit on either side of what it finds.
    """
    formula = category == "Handwritten Mathematical Expression Recognition"

    def form(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    text, golds = form(prediction), [form(gold) for gold in answers]
    if mode == "compat" or formula:
        return float(any(gold in text for gold in golds))
    return float(any(re.search(rf"(?<![0-9a-z]){re.escape(gold)}(?![0-9a-z])", text) for gold in golds if gold))


# -- yes or no --------------------------------------------------------------------------------------------------------


def mme_answer(prediction: str, mode: Mode = "compat") -> Literal["yes", "no", "other"] | None:
    """Read an answer to MME; None for one that the script leaves out (it splits its lines at tabs).

    Source: internvl_chat/eval/mme/eval.py and calculation.py. Defects: besides the tab, "know" and "note" mean no and
    "eyes" means yes, since only the first four characters are looked at.
    """
    text = prediction.replace("\n", "").replace("不是", "No").replace("是", "Yes").replace("否", "No")
    text = text.lower().replace("true", "yes").replace("false", "no")
    text = re.sub("[\u4e00-\u9fa5]", "", text)
    words: tuple[Literal["yes", "no"], ...] = ("yes", "no")
    if mode == "strict":
        return next((word for word in words if re.match(rf"\W*{word}\b", text)), "other")
    if "\t" in text:
        return None
    return next((word for word in words if word in text[:4]), "other")


def pope_answer(prediction: str, mode: Mode = "compat") -> Literal["yes", "no"]:
    """Read an answer to POPE: no, if the first sentence holds "No", "no" or "not"; else yes.

    Source: internvl_chat/eval/pope/eval_pope.py. Defects: "NO", "No!" and an empty answer mean yes. `strict` reads
    words, and takes an answer with neither for no, as one who was asked whether a thing is there and did not see it.
    """
    text = prediction.split(".")[0]
    if mode == "strict":
        words = re.findall(r"\w+", text.lower())
        return "yes" if "yes" in words and not {"no", "not"} & set(words) else "no"
    return "no" if {"No", "not", "no"} & set(text.replace(",", "").split(" ")) else "yes"


# -- MMMU's open questions --------------------------------------------------------------------------------------------

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_FIGURES = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def _open_forms(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def mmmu_open(prediction: str, answers: Sequence[str], mode: Mode = "compat") -> float:
    """Return 1.0 where a gold number or text is in the part of the answer after its key word ("is", "=" …).

    Source: internvl_chat/eval/mmmu/eval_utils.py. Defect: the text is lowered before it is cut at sentences that start
    with a capital, so it is cut at line ends only.
    """
    text = prediction.strip().strip(".")
    parts = re.split(r"\.\s(?=[A-Z])|\n", text if mode == "strict" else text.lower())
    tails = []
    for number, part in enumerate(part.lower() for part in parts):
        shortest = ""
        for key in (*_KEYS, "=") if number == len(parts) - 1 else _KEYS:
            tail = part.split(key)[-1].strip()
            if key in part and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            tails.append(shortest)
    tails = tails or [text.lower()]
    readings = {f for t in tails for s in [t, *(n for p in _FIGURES for n in re.findall(p, t))] for f in _open_forms(s)}
    golds = [form for gold in answers for form in _open_forms(gold)]
    texts = [gold for gold in golds if isinstance(gold, str)]
    return float(any(any(g in s for g in texts) if isinstance(s, str) else s in golds for s in readings))


# -- MathVista's free-form answers ------------------------------------------------------------------------------------

_FINAL = re.compile(r"(?i)\\boxed\{([^{}]*)\}|\banswer\b(?:\s+is\b)?\s*[:=]?\s*([^\n]+)")


def _final_part(text: str) -> str:
    """Return what stands in the last `\\boxed{}` or after the last "answer", without marks around it; else the text."""
    parts = [boxed or tail for boxed, tail in _FINAL.findall(text) if boxed or tail]
    return (parts[-1] if parts else text).strip().strip("*$. ")


def mathvista_match(prediction: str, gold: str, mode: Mode = "compat") -> float:
    """Return 1.0 where an answer without choices is the gold whole number, number or text.

    Source: VLMEvalKit vlmeval/dataset/utils/mathvista.py, `post_check`, whose kind of answer is told from the gold
    here. `compat` takes the whole answer, as `post_check` does of what a judge model extracts. Defect: a text or a list
    is never right. `strict` takes what stands in `\\boxed{}` or after "answer", and of it the one number, thousands
    commas and units aside, or compares texts.
    """
    if mode == "strict":
        return _mathvista_strict(_final_part(prediction), gold.strip())
    for kind in (int, float):
        try:
            wanted = kind(gold)
        except ValueError:
            continue
        try:
            return float(kind(prediction) == wanted)
        except ValueError:
            return 0.0
    return 0.0


def _mathvista_strict(answer: str, gold: str) -> float:
    try:
        wanted = float(gold)
    except ValueError:
        return float(answer.lower() == gold.lower().strip(". "))
    figures = re.findall(r"-?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", answer)
    numbers = {float(figure.replace(",", "")) for figure in figures}
    return float(len(numbers) == 1 and math.isclose(numbers.pop(), wanted, rel_tol=1e-9))


# -- boxes ------------------------------------------------------------------------------------------------------------

_BOX = re.compile(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*")


def _box_numbers(prediction: str, mode: Mode) -> tuple[list[float], bool] | None:
    """Read four numbers as written, and a flag: True for thousandths."""
    for match in _BOX.finditer(prediction):
        try:
            box = [float(number) for number in match.groups()]
        except ValueError:
            if mode == "compat":
                return None
            continue
        if mode == "compat":
            return box, float(np.array(box, np.float32).sum()) >= 4
        return box, max(box) > 1 or all(re.fullmatch(r"\s*-?\d+\s*", number) for number in match.groups())
    return None


def refcoco_box(prediction: str, mode: Mode = "compat") -> list[float] | None:
    """Return the first box of an answer, as fractions of the picture's sides; None where there is none.

    Source: internvl_chat/eval/refcoco/evaluate_grounding.py. Numbers are thousandths where they add up to 4 or more,
    else fractions. Defects: `[[0, 0, 1, 1]]`, one thousandth, is read as the whole picture; the first bracket with
    three commas counts even if what it holds are no numbers. `strict` takes the first box that has four numbers, and
    takes whole numbers for thousandths.
    """
    numbers = _box_numbers(prediction, mode)
    return numbers and [value / 1000 if numbers[1] else value for value in numbers[0]]


def refcoco_match(
    prediction: str, box: Box, size: tuple[float, float], mode: Mode = "compat", threshold: float = 0.5
) -> float:
    """Return 1.0 where the answer's box and `box` overlap by IoU >= threshold. `box` in pixels, `size` (width, height).

    Source: as `refcoco_box`. The script computes in float32, and so does `compat`.
    """
    numbers = _box_numbers(prediction, mode)
    if numbers is None:
        return 0.0
    kind = np.float32 if mode == "compat" else np.float64
    scale = kind(1000 if numbers[1] else 1)
    answer: list[np.floating] = [kind(value) / scale * kind(size[i % 2]) for i, value in enumerate(numbers[0])]
    return float(iou(answer, [kind(value) for value in box]) >= threshold)
