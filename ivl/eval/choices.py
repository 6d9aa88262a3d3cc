"""Which option an answer to a multiple-choice question means. `compat` and `strict` as in `ivl.eval.metrics`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ivl.eval.metrics import Mode


def choice(prediction: str, options: Mapping[str, str], mode: Mode = "compat", brackets: bool = False) -> str:
    """The letter that an answer to a multiple-choice question means, or the answer itself where none was found.

    `options`: letter → text. `brackets` adds ScienceQA's forms `X.` and `(X)`.
    Source: `post_process` in internvl_chat/eval/{mmbench,scienceqa,mmmu}. Defects: any answer that starts with an
    option's letter means that option ("Answer: B" → A, "Because it is C" → B). `strict` returns "" where no letter is
    found or two are equally likely.
    """
    said = prediction.strip()
    if mode == "strict":
        return _strict_choice(said, options)
    if len(said) <= 1:
        return said
    if said[0] in options:
        return said[0]
    found = next((letter for letter, text in options.items() if text in said), None)
    if found is not None:
        return found
    if brackets and said[1] == ".":
        return said[0]
    if brackets and len(said) > 2 and said[0] == "(" and said[2] == ")":
        return said[1]
    return said


def _strict_choice(said: str, options: Mapping[str, str]) -> str:
    letters = "".join(options) or "ABCD"
    if len(said) == 1:
        return said.upper() if said.upper() in letters else ""
    named = [
        rf"^\(?([{letters}])(?:[).:,]|$)",  # "B." "(B)" "B) a dog"
        rf"\b(?i:answer|option|choice)\b(?i: is)?[\s:*(\"']*([{letters}])\b",
    ]
    for pattern in named:
        match = re.search(pattern, said)
        if match:
            return match.group(1)
    low = said.lower()
    inside = {
        letter: text.lower()
        for letter, text in options.items()
        if text and re.search(rf"(?<!\w){re.escape(text.lower())}(?!\w)", low)
    }
    longest = [k for k, text in inside.items() if not any(text != t and text in t for t in inside.values())]
    if len(longest) == 1:
        return longest[0]
    alone = set(re.findall(rf"(?!^A\b)\b([{letters}])\b", said))  # a first "A" is an article
    return alone.pop() if len(alone) == 1 and not longest else ""


def mvbench_match(prediction: str, gold: str, mode: Mode = "compat") -> float:
    """1.0 where the first word of the answer and the letter of `gold`, as "(A) run", contain one another.

    Source: internvl_chat/eval/mvbench/evaluate_mvbench.py. Defects: an empty answer and a lone bracket are right.
    """
    if mode == "strict":
        letters = "ABCDEFGHIJ"
        return float(choice(prediction, dict.fromkeys(letters, ""), "strict") == gold.strip()[1])
    said = prediction.replace("Answer: ", "").lower().split(" ")[0]
    wanted = gold.lower().split(" ")[0]
    return float(said.replace(".", "") in wanted or wanted in said)


def videomme_letter(prediction: str, options: Mapping[str, str], mode: Mode = "compat") -> str:
    """The letter A to D of an answer, "" for none.

    Source: VLMEvalKit vlmeval/dataset/utils/videomme.py without a judge. Defects: the first capital A to D anywhere
    counts ("Both" → B), and four of the ten prefixes never match, for want of commas in their list.
    """
    if mode == "strict":
        return choice(prediction, options, "strict")
    said = prediction.strip()
    prefixes = ["The best answer is", "The correct answer is", "The answer is", "The answer"]
    prefixes += ["The best option isThe correct option is", "Best answer:Best option:", "Answer:", "Option:"]
    for prefix in prefixes:
        said = said.replace(prefix, "")
    match = re.search("[ABCD]", said)
    return match.group() if match else ""


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def infer_choice(answer: str, options: Mapping[str, str]) -> str:
    """The letter that VLMEvalKit finds without a judge model: "Z" for a refusal, "" where it would ask the judge.

    Source: VLMEvalKit vlmeval/utils/matching_util.py, `can_infer`. One letter that stands alone among the last four
    words counts, then "answer is X", then the one option whose text occurs.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    said = re.search(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", answer)
    if said and said.group(1).upper() in options:
        return said.group(1).upper()
    if len(answer.lower()) > 2 * sum(map(len, options.values())):
        return ""
    found = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else ""
