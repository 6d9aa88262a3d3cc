"""Option letters read from answers to multiple-choice questions.

`compat` and `strict` as in `ivl.eval.metrics`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ivl.eval.metrics import Mode


def choice(prediction: str, options: Mapping[str, str], mode: Mode = "compat", brackets: bool = False) -> str:
    """Return the option letter that an answer means, or the answer itself where it names none.

    `options`: letter → text. `brackets` adds ScienceQA's forms `X.` and `(X)`.
    Source: `post_process` in internvl_chat/eval/{mmbench,scienceqa,mmmu}. Defects: any answer that starts with an
    option's letter means that option ("Answer: B" → A, "Because it is C" → B). `strict` returns "" where no letter is
    found or two are equally likely.
    """
    answer = prediction.strip()
    if mode == "strict":
        return _strict_choice(answer, options)
    if len(answer) <= 1:
        return answer
    if answer[0] in options:
        return answer[0]
    letter_of_text = next((letter for letter, text in options.items() if text in answer), None)
    if letter_of_text is not None:
        return letter_of_text
    if brackets and answer[1] == ".":
        return answer[0]
    if brackets and len(answer) > 2 and answer[0] == "(" and answer[2] == ")":
        return answer[1]
    return answer


def _strict_choice(answer: str, options: Mapping[str, str]) -> str:
    letters = "".join(options) or "ABCD"
    if len(answer) == 1:
        return answer.upper() if answer.upper() in letters else ""
    named = [
        rf"^\(?([{letters}])(?:[).:,]|$)",  # "B." "(B)" "B) a dog"
        rf"\b(?i:answer|option|choice)\b(?i: is)?[\s:*(\"']*([{letters}])\b",
    ]
    for pattern in named:
        match = re.search(pattern, answer)
        if match:
            return match.group(1)
    low = answer.lower()
    inside = {
        letter: text.lower()
        for letter, text in options.items()
        if text and re.search(rf"(?<!\w){re.escape(text.lower())}(?!\w)", low)
    }
    longest = [k for k, text in inside.items() if not any(text != t and text in t for t in inside.values())]
    if len(longest) == 1:
        return longest[0]
    alone = set(re.findall(rf"(?!^A\b)\b([{letters}])\b", answer))  # a first "A" is an article
    return alone.pop() if len(alone) == 1 and not longest else ""


def mvbench_match(prediction: str, gold: str, mode: Mode = "compat") -> float:
    """Return 1.0 where the first word of the answer and the letter of `gold`, as "(A) run", contain one another.

    Source: internvl_chat/eval/mvbench/evaluate_mvbench.py. Defects: an empty answer and a lone bracket are right.
    """
    if mode == "strict":
        letters = "ABCDEFGHIJ"
        return float(choice(prediction, dict.fromkeys(letters, ""), "strict") == gold.strip()[1])
    answer = prediction.replace("Answer: ", "").lower().split(" ")[0]
    wanted = gold.lower().split(" ")[0]
    return float(answer.replace(".", "") in wanted or wanted in answer)


def videomme_letter(prediction: str, options: Mapping[str, str], mode: Mode = "compat") -> str:
    """Return the letter A to D of an answer, "" for none.

    Source: VLMEvalKit vlmeval/dataset/utils/videomme.py without a judge. Defects: the first capital A to D anywhere
    counts ("Both" → B), and four of the ten prefixes never match, for want of commas in their list.
    """
    if mode == "strict":
        return choice(prediction, options, "strict")
    answer = prediction.strip()
    prefixes = ["The best answer is", "The correct answer is", "The answer is", "The answer"]
    prefixes += ["The best option isThe correct option is", "Best answer:Best option:", "Answer:", "Option:"]
    for prefix in prefixes:
        answer = answer.replace(prefix, "")
    match = re.search("[ABCD]", answer)
    return match.group() if match else ""


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def infer_choice(answer: str, options: Mapping[str, str]) -> str:
    """Return the letter that VLMEvalKit reads without a judge: "Z" for a refusal, "" where it would ask the judge.

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
    match = re.search(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", answer)
    if match and match.group(1).upper() in options:
        return match.group(1).upper()
    if len(answer.lower()) > 2 * sum(map(len, options.values())):
        return ""
    letters = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return letters[0] if len(letters) == 1 else ""


_MARKS = (*';/[]"{}()=+\\_-><@`,?!',)


def yes_or_no(answer: str) -> str:
    """Return "Yes" or "No" where exactly one of the two words stands in an answer, else "Unknown".

    Source: VLMEvalKit vlmeval/dataset/utils/yorn.py, `YOrN_Extraction`, with `process_punctuation` of
    vlmeval/smp/misc.py, where a mark beside a space is cut and another one becomes a space, and where every mark is cut
    from a text with a number such as 1,000.
    """
    low = answer.lower()
    words = low
    number = re.search(r"\d,\d", low) is not None
    for mark in _MARKS:
        cut = number or f"{mark} " in low or f" {mark}" in low
        words = words.replace(mark, "" if cut else " ")
    # Their flag re.UNICODE stands where a count belongs: the first 32 full stops go.
    left = re.sub(r"(?<!\d)\.(?!\d)", "", words, count=32).split()
    if ("yes" in left) == ("no" in left):
        return "Unknown"
    return "Yes" if "yes" in left else "No"
