"""Every rule, in `compat`, gives the scores that the published scripts gave on the same 600 generated answers.

`record.py` made `recorded.json`. None: the script stopped with an error at that answer (an empty one, or "(B").
"""

import json
from pathlib import Path

import pytest

from ivl.eval import choices, metrics
from tests.eval import generated

RECORDED = json.loads(Path(__file__).with_name("recorded.json").read_text(encoding="utf-8"))
OURS = {
    "vqa": (generated.vqa, lambda r: metrics.vqa_accuracy(r["prediction"], r["answers"])),
    "anls": (generated.anls, lambda r: metrics.anls(r["prediction"], r["answers"])),
    "relaxed": (generated.relaxed, lambda r: metrics.relaxed_accuracy(r["prediction"], r["answers"])),
    "exact": (generated.exact, lambda r: metrics.exact_match(r["prediction"], r["answers"])),
    "ocrbench": (generated.ocrbench, lambda r: metrics.ocrbench_match(r["prediction"], r["answers"], r["category"])),
    "choice": (generated.choice, lambda r: choices.choice(r["prediction"], r["options"])),
    "scienceqa": (generated.choice, lambda r: choices.choice(r["prediction"], r["options"], brackets=True)),
    "infer": (generated.choice, lambda r: choices.infer_choice(r["prediction"], r["options"])),
    "videomme": (generated.choice, lambda r: choices.videomme_letter(r["prediction"], r["options"])),
    "mvbench": (generated.mvbench, lambda r: choices.mvbench_match(r["prediction"], r["reference"])),
    "mmmu": (generated.mmmu, lambda r: metrics.mmmu_open(r["prediction"], r["answers"])),
    "yes_no": (generated.hallusionbench, lambda r: choices.yes_or_no(r["prediction"])),
    "mathvista": (generated.mathvista, lambda r: metrics.mathvista_match(r["prediction"], r["answer"])),
    "refcoco": (generated.refcoco, lambda r: metrics.refcoco_match(r["prediction"], r["box"], r["size"])),
}


@pytest.mark.parametrize("rule", OURS)
def test_equal_on_every_generated_answer(rule):
    rows, score = generated.rows(OURS[rule][0]), OURS[rule][1]
    recorded = RECORDED[rule]
    assert len(recorded) == len(rows) >= 500
    wrong = [(r, score(r), s) for r, s in zip(rows, recorded) if s is not None and score(r) != s]
    assert not wrong, f"{len(wrong)} rows differ: {wrong[:3]}"
    assert len(set(map(str, recorded))) > 1
