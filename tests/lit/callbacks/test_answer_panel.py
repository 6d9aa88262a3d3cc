"""Panel of answers: which rows it shows, and what is drawn of them."""

import numpy as np
import pytest
from PIL import Image

from ivl.lit.callbacks import images
from ivl.lit.callbacks.answer_panel import COLUMNS, PICTURE, WIDTH, answer_panel, in_true_share, is_right
from ivl.lit.callbacks.images import ANSWERED, EXPECTED
from ivl.types import Conversation, Media, Message


def answered(parts: tuple, reference: str, answer: str, **scores: float) -> dict:
    row = Conversation((Message("user", parts),), reference=reference, where="a.jsonl:1")
    return {"index": 0, "row": row, "answer": answer, "reasoning": None, **scores}


def text(answer: str) -> dict:
    return answered(("?",), "yes", answer)


@pytest.mark.parametrize(
    ("right", "wrong", "shown"), [(9, 3, (6, 2)), (20, 0, (8, 0)), (98, 2, (8, 0)), (1, 2, (1, 2))]
)
def test_right_and_wrong_answers_are_shown_in_their_true_share(right, wrong, shown):
    answers = [text("yes") for _ in range(right)] + [text("no") for _ in range(wrong)]
    picked = in_true_share(answers, 8)
    assert (sum(map(is_right, picked)), len(picked) - sum(map(is_right, picked))) == shown
    assert [answers.index(a) for a in picked] == sorted(answers.index(a) for a in picked)


def test_boxes_are_right_from_half_an_overlap_on():
    assert is_right(text("Yes ")) and is_right(answered((), "", "", iou=0.5, exact=0.0))
    assert not is_right(answered((), "", "", iou=0.49, exact=0.0)) and not is_right(answered((), "a", "b", exact=0.0))


def colours(panel: Image.Image) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(panel).reshape(-1, 3)))


def test_pictures_frames_boxes_and_texts_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "FONTS", ())  # of a system without Chinese
    for name, colour in (("a", "blue"), ("b", "yellow")):
        Image.new("RGB", (400, 300), colour).save(tmp_path / f"{name}.png")
    frames = tmp_path / "frames"
    frames.mkdir()
    for n in range(4):
        Image.new("RGB", (40, 30), (200 + n, 0, 200)).save(frames / f"{n}.png")
    first, second = (Media("image", str(tmp_path / f"{name}.png")) for name in "ab")
    box = answered((first, "Where?"), "[[0, 0, 300, 300]]", "[[500, 500, 900, 900]]", iou=0.0, exact=0.0)
    panel = answer_panel([box], 8)
    assert {EXPECTED, ANSWERED, (0, 0, 255)} <= colours(panel)
    several = answer_panel([answered((first, second, "Which?"), "a", "a")], 8)
    assert {(0, 0, 255), (255, 255, 0)} <= colours(several)
    assert {(200 + n, 0, 200) for n in range(3)} <= colours(  # the middles of four spans of four frames
        answer_panel([answered((Media("video", str(frames)), "?"), "a", "a")], 8)
    )
    answer_panel([answered((Media("image", "/gone.png"), "这是什么"), "猫", "狗")], 8)
    assert answer_panel([text("yes")] * 9, 8).width < 2 * COLUMNS * WIDTH and answer_panel([], 8) is None


def test_a_cell_is_no_larger_than_what_it_holds(tmp_path):
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "a.png")
    panel = np.asarray(answer_panel([answered((Media("image", str(tmp_path / "a.png")), "?"), "a", "a")] * 2, 8))
    blue = (panel == (0, 0, 255)).all(axis=-1)
    assert blue.sum() > 2 * 0.9 * WIDTH * PICTURE
    assert answer_panel([text("yes")], 8).height < PICTURE


def test_a_row_of_text_has_a_cell(tmp_path):
    assert EXPECTED in colours(answer_panel([text("yes")], 8)) and ANSWERED in colours(answer_panel([text("no")], 8))
