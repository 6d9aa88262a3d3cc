"""Scores while training: the metrics asked for, per source, over processes."""

from dataclasses import replace

import pytest
import torch

from ivl.lit.metrics import CAPTIONS, Scores, check_metrics, score, scores_table, summary
from ivl.lit.prediction.answering import name_rows
from ivl.types import Conversation, Message, UserError


def row(reference: str | None, source: str = "") -> Conversation:
    return Conversation((Message("user", ("?",)),), reference=reference, source=source)


BOX = "<ref>cat</ref><box>[[0, 0, 100, 100]]</box>"


def test_metrics_of_a_row():
    names = ("exact", "vqa", "anls", "relaxed", "iou", "iou50")
    assert score(row("Two cats"), "two cats.", names) == {
        "exact": 0,
        "vqa": 1,
        "anls": pytest.approx(8 / 9),
        "relaxed": 0,
    }
    assert score(row("100"), "104", ("relaxed", "exact")) == {"relaxed": 1, "exact": 0}
    half = BOX.replace("[0, 0, 100, 100]", "[0, 0, 100, 60]")
    assert score(row(BOX), half, ("iou", "iou50")) == {"iou": pytest.approx(0.6), "iou50": 1}
    assert score(row(BOX), "nothing", ("iou", "iou50")) == {"iou": 0, "iou50": 0}
    assert score(row(None), "x", names) == {}


def test_a_thought_is_not_judged():
    said = f"<think>Maybe {BOX}? No, a dog.</think>\n\nTwo cats"
    assert score(row("<think>Hm.</think>two cats"), said, ("exact", "anls")) == {"exact": 1, "anls": 1}
    assert score(row(BOX), said, ("iou", "exact")) == {"iou": 0, "exact": 0}
    assert score(row("two cats"), "<think>two cats", ("exact",)) == {"exact": 0}


def test_a_loss_that_is_no_number_is_an_error_that_names_the_row():
    scores = Scores(["exact"])
    rows = [replace(row("cat"), where=f"a.jsonl:{n}") for n in (1, 2)]
    losses = torch.tensor([1.0, torch.nan])
    with (
        pytest.raises(UserError, match=r"^a.jsonl:2: the model's logits are not finite in float16"),
        name_rows(rows),
    ):
        scores.add_losses(rows, losses, torch.ones(2), torch.float16)


def test_means_per_source_and_over_processes():
    parts = []
    for answers in (["cat", "dog"], ["cat"]):
        scores = Scores(["exact"])
        rows = [row("cat", "pets"), row("cat")][: len(answers)]
        scores.add_losses(
            rows, torch.tensor([6.0, 2.0])[: len(rows)], torch.tensor([3.0, 1.0])[: len(rows)], torch.float32
        )
        for r, answer in zip(rows, answers):
            scores.add_answer(r, answer)
        parts.append(scores)
    assert parts[0].means() == {
        "": {"rows": 2, "loss": 2.0, "exact": 0.5},
        "pets": {"rows": 1, "loss": 2.0, "exact": 1.0},
        "rows": {"rows": 1, "loss": 2.0, "exact": 0.0},
    }
    both = summary([p._sums for p in parts], ["exact"])
    assert both["pets"]["rows"] == 2 and both[""]["exact"] == pytest.approx(2 / 3)
    text = scores_table(both)
    assert "exact" in text and "66.7 %" in text and text.splitlines()[-1].startswith("all")


def test_one_kind_of_rows_has_one_line():
    scores = Scores(["exact"])
    scores.add_answer(row("cat", "pets"), "cat")
    assert [line.split() for line in scores_table(scores.means()).splitlines()[1:]] == [["all", "1", "100.0", "%"]]


def test_caption_metrics_are_of_all_rows_together():
    pytest.importorskip("pycocoevalcap")
    scores = Scores(CAPTIONS)
    for gold, said in (("a cat on the grass", "a cat on the grass"), ("two dogs run", "a red bus")):
        scores.add_answer(row(gold, "captions"), said)
    means = scores.means()
    assert means[""]["rouge"] == pytest.approx(0.5, abs=0.01) and means[""].keys() >= set(CAPTIONS)
    assert means["captions"] == means[""]


def test_what_cannot_be_computed_is_said_at_the_start(monkeypatch):
    with pytest.raises(UserError, match=r"expected some of exact, .* found 'F1'"):
        check_metrics(["F1"])
    monkeypatch.setattr("ivl.lit.metrics.find_spec", lambda name: None)
    with pytest.raises(UserError, match="cider needs the package pycocoevalcap"):
        check_metrics(["exact", "cider"])
    check_metrics(["exact"])
