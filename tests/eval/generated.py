"""Answers made up by a seeded generator, with what trips the published rules: odd spaces, marks, numbers, letters.

Only `Random.random()` is used: Python promises its values for a seed across versions.
"""

from random import Random
from typing import Any

N = 600
WORDS = """
the a an two 2 ten none couldnt dont isn't dog's red-blue 1,000 3.5 U.S. . .. (x) yes no hi! 50% somebody'd Im
Cat cat cats hot dog blue; 'twas y'alld've a/b don't, what? it's 7 zero
"""
OPTIONS = ("dog", "hot dog", "a red car", "run", "12", "Both", "yes", "Above", "the man in black", "C", "Cannot tell")
FRAMES = (
    "{}", "{}.", "({})", "({}) run", "{}. run", "Answer: {}", "The answer is {}", "Because it is {}", "{} and {}",
    "**{}**", "answer is **{}**", "I think that it might well be {} or something else entirely so", " {} ", "",
)  # fmt: skip
TASKS = ("existence", "count", "OCR", "code_reasoning")
YES_NO = (
    "Yes", "No", "yes, it is.", "no.", "NO", "No!", "There is not", "not", "", "The man. No", "是", "不是", "否",
    "True", "false", "know it", "eyes", "Yes\tindeed", "maybe", "No, there is no dog", "It is not. Yes", " yes", "\nno",
)  # fmt: skip


class Maker:
    """Draws from a stream of its own per rule, so that rules can be added without changing the others."""

    def __init__(self, rule: str):
        self.rng = Random(f"ivl {rule}")

    def below(self, n: int) -> int:
        return int(self.rng.random() * n)

    def pick(self, items):
        return items[self.below(len(items))]

    def words(self, most: int) -> str:
        return "".join(
            self.pick(WORDS.split()) + self.pick((" ", " ", "  ", "\n", "\t")) for _ in range(1 + self.below(most))
        )

    def typo(self, text: str) -> str:
        for _ in range(self.below(4)):
            at = self.below(len(text) + 1)
            text = self.pick((text[:at] + "e" + text[at:], text[:at] + text[at + 1 :], text.upper(), " " + text + " "))
        return text

    def figure(self, value: float | None = None) -> str:
        value = self.pick((0, 1, 20, 100, 1000, -5, 3.14159)) if value is None else value
        value *= self.pick((1, 1, 0.95, 1.05, 1.051, 0.9524, 1.2))
        return self.pick((f"{value:g}", f"{value:.2f}", f"{value:g}%", f"{value:,}", f" {value:g} ", "nan", "Red"))


def vqa(m: Maker) -> dict[str, Any]:
    kinds = [m.words(2) for _ in range(3)]
    return {"prediction": m.typo(m.pick(kinds)), "answers": [m.pick(kinds) for _ in range(10)]}


def anls(m: Maker) -> dict[str, Any]:
    golds = [m.words(3) for _ in range(1 + m.below(3))]
    return {"prediction": m.typo(m.pick(golds)) if m.below(4) else m.words(3), "answers": golds}


def relaxed(m: Maker) -> dict[str, Any]:
    value = m.pick((0, 1, 20, 100, 1000, -5, 3.14159))
    return {"prediction": m.figure(value), "answers": [m.figure(value) for _ in range(1 + m.below(2))]}


def exact(m: Maker) -> dict[str, Any]:
    golds = [m.words(1) for _ in range(2)]
    return {"prediction": m.typo(m.pick(golds)), "answers": golds}


def ocrbench(m: Maker) -> dict[str, Any]:
    category = m.pick(("Doc-oriented VQA", "Handwritten Mathematical Expression Recognition"))
    golds = [m.words(2).strip() for _ in range(1 + m.below(2))]
    return {"prediction": m.typo(m.pick(golds) + " " + m.words(2)), "answers": golds, "category": category}


def choice(m: Maker) -> dict[str, Any]:
    options = {letter: m.pick(OPTIONS) for letter in "ABCDE"[: 2 + m.below(4)]}
    filler = m.pick((*options, *options.values(), *OPTIONS))
    said = m.pick(FRAMES).format(filler, m.pick("ABCDZ"))
    return {"prediction": said, "options": options, "reference": m.pick(list(options))}


def mvbench(m: Maker) -> dict[str, Any]:
    letter = m.pick("ABCD")
    said = m.pick(FRAMES).format(m.pick((letter, "B", "(C)", "run")), "A")
    return {"prediction": said, "reference": f"({letter}) {m.pick(OPTIONS)}."}


def yes_no(m: Maker) -> dict[str, Any]:
    return {"prediction": m.pick(YES_NO), "reference": m.pick(("Yes", "No"))}


def mmmu(m: Maker) -> dict[str, Any]:
    gold = m.pick((m.figure(), m.words(2), "x"))
    said = m.pick(
        ("{}", "The answer is {}. So it is {}", "x = {}", "It is {}.\nTherefore {}", "so = {}\nis ", "is is:")
    )
    return {"prediction": said.format(m.pick((gold, m.figure(), m.words(2))), m.figure()), "answers": [gold]}


def refcoco(m: Maker) -> dict[str, Any]:
    w, h = 200 + m.below(500), 200 + m.below(500)
    box = [m.below(500), m.below(500)]
    box += [box[0] + 50 + m.below(400), box[1] + 50 + m.below(400)]
    near = [value + m.below(120) - 60 for value in box]
    numbers = m.pick((near, near, near, [v / 1000 for v in near], [0, 0, 1, 1], [0, 1, 2, 1], ["x1", 2, 3, 4]))
    written = m.pick(
        ("<ref>a</ref><box>[[{}, {}, {}, {}]]</box>", "car[[{}, {}, {}, {}]]", "[{},{},{},{}] [[1,2,3,4]]")
    )
    said = m.pick((written,) * 6 + ("[[{}, {}, {}]] {}", "none", "[[a, b, c, d]] [{}, {}, {}, {}]")).format(*numbers)
    gold = [box[0] * w / 1000, box[1] * h / 1000, box[2] * w / 1000, box[3] * h / 1000]
    return {"prediction": said, "box": [round(value, 3) for value in gold], "size": [w, h]}


SURE = (
    "{}", "{}.", "{}, there is.", "Yes and no", "**{}**", "I say {}!", "1,000 times {}", "{}-ish", "no...yes", "",
    "{}\n",
)  # fmt: skip


def hallusionbench(m: Maker) -> dict[str, Any]:
    place = {"l2": m.pick(("illusion", "chart")), "set": m.below(20), "figure": m.below(3), "question": m.below(3)}
    said = m.pick(SURE).format(m.pick(("Yes", "yes", "No", "NO", "not")))
    return {"prediction": said, "reference": m.pick(("Yes", "No")), **place}


def mathvista(m: Maker) -> dict[str, Any]:
    kind = m.pick(("integer", "float", "text", "list"))
    gold = {"integer": str(m.below(20)), "float": f"{m.below(50) / 10}", "text": m.pick(OPTIONS[:4]), "list": "[0, 1]"}
    said = m.pick(("{}", " {} ", "{}\n", "{}.0", "{}0", "The answer is {}", "x", "{} cm")).format(gold[kind])
    return {"prediction": said, "answer": gold[kind], "answer_type": kind}


RULES = [hallusionbench, mathvista, vqa, anls, relaxed, exact, ocrbench, choice, mvbench, yes_no, mmmu, refcoco]


def rows(rule) -> list[dict[str, Any]]:
    """The N rows of a rule, the same on every machine."""
    maker = Maker(rule.__name__)
    return [rule(maker) for _ in range(N)]
