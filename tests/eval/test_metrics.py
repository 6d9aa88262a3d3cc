import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from ivl.eval.metrics import exact_match, iou

coordinate = st.floats(0, 1000, allow_nan=False, width=32)
boxes = st.tuples(coordinate, coordinate, st.floats(0.125, 500, width=32), st.floats(0.125, 500, width=32)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


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
