"""From answers to a benchmark's number, the sets that need more than a mean among them."""

import json
from pathlib import Path

import numpy as np
import pytest

from ivl.eval.rules import RULES
from ivl.types import UserError
from tests.eval import generated

RECORDED = json.loads(Path(__file__).with_name("recorded.json").read_text(encoding="utf-8"))


def rows_of(*rows, **common):
    return [{"id": str(n), "where": f"f:{n}", **common, **row} for n, row in enumerate(rows, 1)]


def yes_no_rows(categories):
    """The generated answers, the first share of them in the first category and so on, two to a picture."""
    rows = generated.rows(generated.yes_no)
    share = len(rows) // len(categories)
    return rows_of(
        *(
            {
                "response": row["prediction"],
                "reference": row["reference"],
                "category": categories[n // share],
                "group": str(n // 2),
            }
            for n, row in enumerate(rows)
        )
    )


def test_mme_is_the_scripts():
    recorded = RECORDED["mme"]
    found = RULES["mme"].run(yes_no_rows(generated.TASKS), "compat")
    assert found.by_category() == pytest.approx({task: recorded[task] for task in generated.TASKS}, abs=1e-9)
    assert found.extra == pytest.approx({k: recorded[k] for k in ("perception", "cognition")}, abs=1e-9)
    assert found.total() == pytest.approx(recorded["perception"] + recorded["cognition"], abs=1e-9)


def test_mme_wants_pairs():
    rows = yes_no_rows(["count"])[:-1]
    with pytest.raises(UserError, match=r"two questions a picture; 1 have another number: count/299"):
        RULES["mme"].run(rows, "compat")


def hallusion_rows():
    rows = generated.rows(generated.hallusionbench)
    groups = [f"{row['l2']}/{row['set']}/{row['figure']}/{row['question']}" for row in rows]
    return rows_of(
        *({"response": row["prediction"], "reference": row["reference"], "group": g} for row, g in zip(rows, groups))
    )


def test_hallusionbench_is_vlmevalkits():
    recorded = RECORDED["hallusionbench"]
    found = RULES["hallusionbench"].run(hallusion_rows(), "compat")
    assert found.extra == pytest.approx(recorded, abs=1e-9)
    assert found.total() == pytest.approx(sum(recorded.values()) / 3, abs=1e-9)
    assert len(found.counts) == len({row["group"].rsplit("/", 2)[0] for row in hallusion_rows()})


def test_hallusionbench_wants_its_groups():
    rows = hallusion_rows()
    rows[3]["group"] = "7"
    with pytest.raises(UserError, match=r"f:4: group '7'; expected l2-category/set/figure/question"):
        RULES["hallusionbench"].run(rows, "compat")


@pytest.mark.parametrize(
    ("answer", "gold", "compat", "strict"),
    [
        ("14", "14", 1, 1),
        (" 14\n", "14", 1, 1),
        ("14.0", "14", 0, 1),
        ("1.20", "1.2", 1, 1),
        ("The answer is 14 cm.", "14", 0, 1),
        ("2 + 12\nAnswer: \\boxed{14}", "14", 0, 1),
        ("1,400", "1400", 0, 1),
        ("13 or 14", "14", 0, 0),
        ("[0, 4]", "[0, 4]", 0, 1),
        ("", "14", 0, 0),
    ],
)
def test_mathvista_without_choices(answer, gold, compat, strict):
    rows = rows_of({"response": answer, "reference": gold})
    assert RULES["mathvista"].run(rows, "compat").scores == [compat]
    assert RULES["mathvista"].run(rows, "strict").scores == [strict]


def test_choices_without_a_judge():
    options = {"A": "cat", "B": "dog"}
    rows = rows_of(
        *(
            {"response": text, "reference": "B", "options": options}
            for text in ("B", "(B) dog", "a dog", "none", "Answer: A")
        )
    )
    assert RULES["mcq"].run(rows, "compat").parsed == ["B", "B", "B", "Z", "A"]
    assert RULES["mcq"].run(rows, "strict").scores == [1, 1, 1, 0, 0]
    assert RULES["mathvista"].run(rows, "compat").scores == [1, 1, 1, 0, 0]


def test_pope_is_the_scripts():
    recorded = RECORDED["pope"]
    found = RULES["pope"].run(yes_no_rows(["random"]), "compat")
    assert found.total() == pytest.approx(100 * recorded["f1"], abs=1e-9)
    for name in ("accuracy", "precision", "recall"):
        assert found.extra[name] == pytest.approx(100 * recorded[name], abs=1e-9)
    assert found.extra["yes ratio"] == pytest.approx(100 * recorded["yes"], abs=1e-9)


def test_pope_of_three_sets_is_their_mean():
    found = RULES["pope"].run(yes_no_rows(["random", "popular", "adversarial"]), "compat")
    assert found.total() == pytest.approx(np.mean(list(found.by_category().values())))
    assert len(found.categories) == 3


def test_circular_needs_all_rotations_right():
    options = {"A": "cat", "B": "dog"}
    rows = rows_of(
        {"response": "A", "reference": "A", "group": "7"},
        {"response": "(B)", "reference": "B", "group": "7"},
        {"response": "A", "reference": "A", "group": "8"},
        {"response": "A", "reference": "B", "group": "8"},
        options=options,
    )
    found = RULES["circular"].run(rows, "compat")
    assert found.total() == 50
    assert found.extra == {"every rotation by itself": 75}
    assert found.unit == [0, 0, 1, 1]
    assert found.parsed == ["A", "B", "A", "A"]


def test_chartqa_is_the_mean_of_its_halves():
    rows = rows_of(
        {"response": "1", "answers": ["1"], "category": "human"},
        {"response": "1", "answers": ["1"], "category": "human"},
        {"response": "1", "answers": ["2"], "category": "human"},
        {"response": "1", "answers": ["1"], "category": "augmented"},
    )
    found = RULES["relaxed"].run(rows, "compat")
    assert found.total() == pytest.approx(100 * (2 / 3 + 1) / 2)


def test_ocrbench_is_a_count():
    rows = rows_of({"response": "STOP sign", "answers": ["stop"]}, {"response": "no", "answers": ["go"]}, category="x")
    assert RULES["ocrbench"].run(rows, "compat").total() == 1


def test_mmmu_takes_letters_and_open_answers():
    rows = rows_of(
        {"response": "B. dog", "reference": "B", "options": {"A": "cat", "B": "dog"}},
        {"response": "The answer is 42", "answers": ["42"]},
        {"response": "B", "reference": "A", "options": ["cat", "dog"]},
    )
    assert RULES["mmmu"].run(rows, "compat").scores == [1, 1, 0]


def test_weights_draw_units():
    rows = rows_of(*({"response": said, "reference": "a"} for said in "aab"))
    found = RULES["exact"].run(rows, "compat")
    assert found.total(np.array([[0, 0, 3], [2, 1, 0], [1, 1, 1]])) == pytest.approx([0, 100, 200 / 3])


def test_a_row_without_ground_truth_is_named():
    with pytest.raises(UserError, match=r"f:1: no 'reference'; --rows FILE joins"):
        RULES["anls"].run(rows_of({"response": "x"}), "compat")
    with pytest.raises(UserError, match=r"f:2: expected 10 answers by people, found 1"):
        RULES["vqa"].run(
            rows_of({"response": "x", "answers": ["x"] * 10}, {"response": "x", "answers": ["x"]}), "compat"
        )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["compat", "strict"])
def test_every_rule_scores_its_rows(rule, mode):
    if rule == "captions":
        pytest.importorskip("pycocoevalcap")
    row = {"reference": "yes", "answers": ["yes"] * 10, "options": {"A": "yes", "B": "no"}, "category": "c"}
    row |= {"box": [1, 1, 2, 2], "size": [9, 9], "group": "1"}
    row |= {"group": "l2/1/0/0"} if rule == "hallusionbench" else {}
    row |= {"reference": "(A) yes"} if rule == "mvbench" else {}
    rows = rows_of(*({"response": said} for said in ("A. yes", "[[111, 111, 222, 222]]")), **row)
    found = RULES[rule].run(rows, mode)
    assert len(found.scores) == len(found.parsed) == len(found.unit) == 2
    assert np.isfinite(found.total())
    assert set(found.by_category()) == set(found.categories)


def test_seed_takes_the_first_character():
    """As its `calculation.py` does, whatever follows; strict reads the letter wherever it stands."""
    answers = ["B", "B,", "B ", "B. a dog", "Answer: B", "b", ""]
    found = RULES["letter"].run(rows_of(*({"response": text} for text in answers), reference="B"), "compat")
    assert found.scores == [1, 1, 1, 1, 0, 0, 0]
    options = {"A": "a cat", "B": "a dog"}
    rows = rows_of(*({"response": text} for text in answers), reference="B", options=options)
    assert RULES["letter"].run(rows, "strict").scores == [1, 1, 1, 1, 1, 1, 0]
