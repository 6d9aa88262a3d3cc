"""Which option an answer means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl.eval.choices import choice, infer_choice, mvbench_match, videomme_letter

OPTIONS = {"A": "cat", "B": "dog", "C": "hot dog", "D": "run"}


@pytest.mark.parametrize(
    ("said", "compat", "strict"),
    [
        ("B", "B", "B"),
        ("B. dog", "B", "B"),
        ("Answer: B", "A", "B"),
        ("Because it is C", "B", "C"),
        ("a dog", "B", "B"),
        ("(B)", "(B)", "B"),
        ("the hot dog", "B", "C"),
        ("", "", ""),
        (" b ", "b", "B"),
        ("neither", "neither", ""),
        ("A cat", "A", "A"),
        ("A dog", "A", "B"),
        ("B or C", "B", ""),
        ("**D**", "**D**", "D"),
    ],
)
def test_the_letter_of_an_answer(said, compat, strict):
    assert choice(said, OPTIONS) == compat
    assert choice(said, OPTIONS, "strict") == strict


def test_scienceqa_reads_brackets():
    assert choice("(B)", OPTIONS, brackets=True) == "B"
    assert choice("x. dig", OPTIONS, brackets=True) == "x"
    assert choice("(B", OPTIONS, brackets=True) == "(B"


@given(st.sampled_from("ABCD"), st.sampled_from(("{}", " {}\n", "{}.", "{}. dog", "{}: it is")))
def test_a_plain_letter_is_read_in_every_mode(letter, form):
    assert choice(form.format(letter), OPTIONS) == letter
    assert choice(form.format(letter), OPTIONS, "strict") == letter
    assert videomme_letter(form.format(letter), OPTIONS) == letter


@given(st.text(max_size=20))
def test_strict_gives_a_letter_or_nothing(said):
    assert choice(said, OPTIONS, "strict") in {"", *OPTIONS}


@pytest.mark.parametrize(
    ("said", "compat", "strict"),
    [
        ("A", 1, 1),
        ("A. run", 1, 1),
        ("(A) run", 1, 1),
        ("Answer: A", 1, 1),
        ("B", 0, 0),
        ("run", 0, 0),
        ("", 1, 0),
        ("(", 1, 0),
    ],
)
def test_mvbench(said, compat, strict):
    assert mvbench_match(said, "(A) run") == compat
    assert mvbench_match(said, "(A) run", "strict") == strict


@pytest.mark.parametrize(
    ("said", "compat", "strict"),
    [
        ("C", "C", "C"),
        ("The best answer is C.", "C", "C"),
        ("Answer: D", "D", "D"),
        ("Both", "B", ""),
        ("The best option is A", "A", "A"),
        ("Best answer: D", "B", "D"),
        ("none", "", ""),
    ],
)
def test_videomme(said, compat, strict):
    assert videomme_letter(said, OPTIONS) == compat
    assert videomme_letter(said, OPTIONS, "strict") == strict


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("(B)", "B"),
        ("B and C", ""),
        ("cat", "A"),
        ("I think that the answer is **D** because of this and that", "D"),
        ("Cannot determine the answer", "Z"),
        ("Z", "Z"),
        ("C it may be", "C"),
        ("C it may be so", ""),
        ("C it may be, at least that is what I would say", ""),
    ],
)
def test_matching_without_a_judge(said, letter):
    assert infer_choice(said, OPTIONS) == letter
