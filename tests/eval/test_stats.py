"""Intervals and comparisons."""

import math

import pytest

from ivl.eval.rules import RULES
from ivl.eval.stats import difference, interval


def scored(said: str, categories: str | None = None, rule: str = "exact"):
    rows = [{"id": str(n), "where": f"f:{n}", "response": c, "reference": "1"} for n, c in enumerate(said)]
    for row, category in zip(rows, categories or "x" * len(said)):
        row |= {"category": category, "answers": ["1"]}
    return RULES[rule].run(rows, "compat")


def test_interval_of_a_share_is_about_the_normal_one():
    found = scored("1" * 300 + "0" * 700)
    low, high = interval(found, 2000)
    half = 196 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(30 - half, abs=0.3)
    assert high == pytest.approx(30 + half, abs=0.3)


def test_interval_is_repeatable_and_depends_on_the_seed():
    found = scored("1" * 30 + "0" * 70)
    assert interval(found) == interval(found)
    assert interval(found) == (21.0, 38.0)
    assert interval(found, 50, seed=1) != interval(found, 50, seed=2)


def test_certain_answers_have_no_interval():
    assert interval(scored("1" * 50)) == (100, 100)


def test_categories_are_drawn_by_themselves():
    assert interval(scored("1" * 5 + "0" * 5, "a" * 5 + "b" * 5, "relaxed")) == (50, 50)


def test_many_units_are_drawn_in_parts(monkeypatch):
    found = scored("1" * 30 + "0" * 70)
    whole = interval(found)
    monkeypatch.setattr("ivl.eval.stats._AT_ONCE", 1000)
    assert interval(found) == whole


def test_the_same_answers_do_not_differ():
    a = scored("110010" * 20)
    gap = difference(a, a)
    assert (gap.value, gap.low, gap.high, gap.p, gap.mcnemar) == (0, 0, 0, 1, 1)


def test_a_clear_difference():
    a, b = scored("0" * 40 + "1" * 60), scored("1" * 20 + "0" * 20 + "1" * 60)
    gap = difference(a, b)
    assert gap.value == pytest.approx(20)
    assert gap.low > 10 and gap.high < 30
    assert gap.p < 0.01
    assert gap.mcnemar == pytest.approx(2 * 0.5**20)


def test_mcnemar_by_hand():
    """7 answers gained, 2 lost: twice the share of 9 coins that fall so or further, (1 + 9 + 36) / 512."""
    a, b = scored("0" * 7 + "1" * 2 + "1" * 11), scored("1" * 7 + "0" * 2 + "1" * 11)
    assert difference(a, b, 10).mcnemar == pytest.approx(2 * 46 / 512)


def test_mcnemar_is_for_right_and_wrong_only():
    rows = [{"id": "1", "where": "f:1", "response": "hallo", "reference": "hello"}]
    half = RULES["anls"].run(rows, "compat")
    assert difference(half, half, 10).mcnemar is None
