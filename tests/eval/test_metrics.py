"""The rules on answers whose score is known by hand, and what must hold for every answer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.text import EditDistance
from torchvision.ops import box_iou

from ivl.eval.metrics import (
    anls,
    exact_match,
    gqa_match,
    iou,
    mme_answer,
    mmmu_open,
    ocrbench_match,
    pope_answer,
    refcoco_box,
    refcoco_match,
    relaxed_accuracy,
    vqa_accuracy,
    vqa_normalize,
)
from ivl.types import UserError
from tests.eval import generated

coordinate = st.floats(0, 1000, allow_nan=False, width=32)
boxes = st.tuples(coordinate, coordinate, st.floats(0.125, 500, width=32), st.floats(0.125, 500, width=32)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
texts = st.text("abc .'ß\t-1", max_size=12)
modes = st.sampled_from(("compat", "strict"))


@settings(deadline=None)  # torchvision's first call takes longer
@given(boxes, boxes)
def test_iou_is_torchvisions(a, b):
    official = box_iou(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)).item()
    assert iou(a, b) == pytest.approx(official, abs=1e-9)


@given(boxes, boxes)
def test_iou_is_symmetric_and_bounded(a, b):
    assert iou(a, b) == iou(b, a)
    assert 0 <= iou(a, b) <= 1 + 1e-12
    assert iou(a, a) == pytest.approx(1)


def test_a_box_without_area_meets_nothing():
    assert iou((1, 1, 1, 1), (0, 0, 2, 2)) == 0
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0


def test_exact_match():
    assert exact_match(" Blue\n", "blue") == 1
    assert exact_match("blue", ["red", "Blue"]) == 1
    assert exact_match("dark blue", "blue") == 0
    assert exact_match("blue", []) == 0


# VQA


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("The Cat.", "cat"),
        ("two dogs", "2 dogs"),
        ("1,000", "1000"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("dog's", "dog 's"),
        ("red-blue", "red blue"),
        ("red - blue", "red blue"),
        ("3.5", "3.5"),
        ("what?\n", "what"),
        ("none", "0"),
        ("Im", "im"),
        ("somebody'd", "somebodyd"),
        ("." * 40, "." * 8),
    ],
)
def test_normal_form_of_an_answer(answer, form):
    assert vqa_normalize(answer) == form


def test_strict_normal_form_mends_the_named_defects():
    assert vqa_normalize("Im", "strict") == "i'm"
    assert vqa_normalize("somebody'd", "strict") == "somebody'd"
    assert vqa_normalize("." * 40, "strict") == ""


def test_soft_accuracy_of_three_and_of_ten():
    assert vqa_accuracy("yes", ["yes"] * 3 + ["no"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("yes", ["yes"] * 10) == 1
    assert vqa_accuracy("maybe", ["yes"] * 10) == 0


def test_soft_accuracy_takes_ten_people_unless_strict():
    with pytest.raises(UserError, match="10 answers by people, found 3"):
        vqa_accuracy("yes", ["yes"] * 3)
    assert vqa_accuracy("yes", ["yes"], "strict") == 1
    assert vqa_accuracy("yes", ["yes"] * 3, "strict") == 1
    assert vqa_accuracy("yes", ["yes"] * 3 + ["no"] * 7, "strict") == vqa_accuracy("yes", ["yes"] * 3 + ["no"] * 7)


@given(texts, st.lists(texts, min_size=10, max_size=10), st.randoms(), modes)
def test_soft_accuracy_is_bounded_and_blind_to_order_and_case(said, answers, rng, mode):
    score = vqa_accuracy(said, answers, mode)
    assert 0 <= score <= 1
    mixed = answers[:]
    rng.shuffle(mixed)
    assert vqa_accuracy(f"  {said.lower()} ", mixed, mode) == pytest.approx(score)


# ANLS


def test_anls_is_the_similarity_of_torchmetrics():
    rows = generated.rows(generated.anls)
    pairs = [[" ".join(text.lower().split()) for text in (row["prediction"], row["answers"][0])] for row in rows]
    assert len(rows) >= 500
    distances = EditDistance(reduction="none")(*zip(*pairs)).tolist()
    expected = [1 - distance / (max(map(len, pair)) or 1) for pair, distance in zip(pairs, distances)]
    scores = [anls(row["prediction"], row["answers"][:1], "strict") for row in rows]
    assert scores == pytest.approx([value if value >= 0.5 else 0 for value in expected])


@given(texts, st.lists(texts, min_size=1, max_size=3), modes)
def test_anls_is_bounded_and_never_between_nought_and_the_threshold(said, golds, mode):
    score = anls(said, golds, mode)
    assert score == 0 or 0.5 <= score <= 1
    assert anls(said.lower(), golds, "strict") == anls(said, golds, "strict")
    assert anls(f" {said}\t", golds, "strict") == anls(said, golds, "strict")


def test_anls_by_hand():
    assert anls("hello", ["help me", "Hello "]) == 1
    assert anls("hallo", ["hello"]) == pytest.approx(0.8)
    assert anls("xyz", ["hello"]) == 0
    assert anls("", [""]) == 1


def test_spaces_raise_the_published_anls_only():
    assert anls("hallo     ", ["hello"]) == pytest.approx(0.9)
    assert anls("hallo     ", ["hello"], "strict") == pytest.approx(0.8)


# ChartQA


@pytest.mark.parametrize(
    ("said", "gold", "compat", "strict"),
    [
        ("95", "100", 0, 1),
        ("105.1", "100", 1, 0),
        ("20%", "0.2", 1, 1),
        ("20", "20%", 0, 0),
        ("1,000", "1000", 0, 0),
        ("0", "0.0", 0, 0),
        ("Red", "red", 1, 1),
        (" Red ", "red", 1, 1),
        ("nan", "nan", 0, 0),
        ("-5", "5", 0, 0),
    ],
)
def test_relaxed_accuracy(said, gold, compat, strict):
    assert relaxed_accuracy(said, [gold]) == compat
    assert relaxed_accuracy(said, [gold], "strict") == strict


@given(st.floats(0.01, 1e6), st.floats(0.5, 1.5))
def test_the_published_tolerance_is_of_the_prediction(gold, factor):
    said = gold * factor
    swapped = relaxed_accuracy(repr(gold), [repr(said)])
    assert relaxed_accuracy(repr(said), [repr(gold)], "strict") == swapped


# GQA, OCRBench


def test_gqa():
    assert gqa_match("Yes.", ["yes"]) == 1
    assert gqa_match(" yes", ["yes"]) == 0
    assert gqa_match(" yes. ", ["Yes"], "strict") == 1


@pytest.mark.parametrize(
    ("said", "gold", "compat", "strict"),
    [
        ("It says\nSTOP", "stop", 1, 1),
        ("10", "1", 1, 0),
        ("party", "art", 1, 0),
        ("出口在左", "出口", 1, 1),
        ("x", "", 1, 0),
    ],
)
def test_ocrbench(said, gold, compat, strict):
    assert ocrbench_match(said, [gold], "Doc-oriented VQA") == compat
    assert ocrbench_match(said, [gold], "Doc-oriented VQA", "strict") == strict


def test_ocrbench_formulas_lose_their_spaces_but_keep_their_case():
    formula = "Handwritten Mathematical Expression Recognition"
    assert ocrbench_match("a ^ { 2 }", ["a^{2}"], formula) == 1
    assert ocrbench_match("A^{2}", ["a^{2}"], formula) == 0


# Yes or no


@pytest.mark.parametrize(
    ("said", "compat", "strict"),
    [
        ("Yes", "yes", "yes"),
        ("no.", "no", "no"),
        ("是", "yes", "yes"),
        ("不是", "no", "no"),
        ("False", "no", "no"),
        ("know it", "no", "other"),
        ("eyes", "yes", "other"),
        ("Yes\tsir", None, "yes"),
        ("", "other", "other"),
    ],
)
def test_mme_answers(said, compat, strict):
    assert mme_answer(said) == compat
    assert mme_answer(said, "strict") == strict


@pytest.mark.parametrize(
    ("said", "compat", "strict"),
    [
        ("No, there is not.", "no", "no"),
        ("There is not", "no", "no"),
        ("Yes", "yes", "yes"),
        ("NO", "yes", "no"),
        ("No!", "yes", "no"),
        ("", "yes", "no"),
        ("Yes. No.", "yes", "yes"),
    ],
)
def test_pope_answers(said, compat, strict):
    assert pope_answer(said) == compat
    assert pope_answer(said, "strict") == strict


# MMMU


@pytest.mark.parametrize(
    ("said", "gold", "score"),
    [
        ("The answer is 42.", "42", 1),
        ("x = 1,000", "1000", 1),
        ("It is blue. So it is red", "red", 1),
        ("3.14159", "3.14", 1),
        ("I see a x here", "x", 1),
        ("extra", "x", 0),
    ],
)
def test_mmmu_open_questions(said, gold, score):
    assert mmmu_open(said, [gold]) == score


def test_strict_mmmu_cuts_at_sentences():
    said = "The result is 7. Thank you for the nice question"
    assert mmmu_open(said, ["7"]) == mmmu_open(said, ["7"], "strict") == 1
    assert mmmu_open("It is red. The sky so blue", ["red"]) == 0
    assert mmmu_open("It is red. The sky so blue", ["red"], "strict") == 1


# RefCOCO


@pytest.mark.parametrize(
    ("said", "compat", "strict"),
    [
        ("<ref>a</ref><box>[[100, 200, 300, 400]]</box>", [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]),
        ("car[[561, 660, 695, 1000]]", [0.561, 0.66, 0.695, 1.0], [0.561, 0.66, 0.695, 1.0]),
        ("[0.1, 0.2, 0.3, 0.4]", [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]),
        ("[0, 0, 1, 1]", [0, 0, 1, 1], [0, 0, 0.001, 0.001]),
        ("[0, 0.0, 1, 1.0]", [0, 0, 1, 1], [0, 0, 1, 1]),
        ("[[0, 1, 2, 1]]", [0, 0.001, 0.002, 0.001], [0, 0.001, 0.002, 0.001]),
        ("[[0, 0, 1, 1]]", [0, 0, 1, 1], [0, 0, 0.001, 0.001]),
        ("[x1, y1, x2, y2]", None, None),
        ("[1, 2, 3]", None, None),
        ("none", None, None),
        ("[a, b, c, d] [[1, 2, 3, 4]]", None, [0.001, 0.002, 0.003, 0.004]),
        ("[[1, 2, 3, 4], [5, 6, 7, 8]]", [0.001, 0.002, 0.003, 0.004], [0.001, 0.002, 0.003, 0.004]),
    ],
)
def test_boxes_of_answers(said, compat, strict):
    assert refcoco_box(said) == compat
    assert refcoco_box(said, "strict") == strict


@given(boxes, modes)
def test_the_box_itself_is_found_and_none_is_not(box, mode):
    side = max(box[2:])
    said = str([value / side for value in box])
    assert refcoco_match(said, box, (side, side), mode) == 1
    assert refcoco_match("nothing", box, (side, side), mode) == 0
