"""Boxes into texts and back."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl.data.rows.formats import parse
from ivl.data.rows.grounding import fill, parse_boxes, to_pixels, write_boxes
from ivl.types import UserError


def size(index):
    return [(640, 480), (1000, 500)][index]


GUY = {"caption": "guy in red", "bbox": [138, 136, 235, 359], "bbox_type": "real", "image": 0}


@pytest.mark.parametrize(
    ("texts", "objects", "expected"),
    [
        (["Find <bbox>", "<ref-object>"], [GUY], ["Find <box> [[216, 283, 367, 748]] </box>", "<ref>guy in red</ref>"]),
        (
            ["Find <ref-object>", "<bbox>"],
            json.dumps([GUY]),
            ["Find <ref>guy in red</ref>", "<box> [[216, 283, 367, 748]] </box>"],
        ),
        (["<bbox>"], [{"bbox": [0.1, 0.2, 0.3, 0.4], "bbox_type": "norm_1"}], ["<box> [[100, 200, 300, 400]] </box>"]),
        (["<bbox>"], [{"bbox": [1, 2, 3, 1000], "bbox_type": "norm_1000"}], ["<box> [[1, 2, 3, 1000]] </box>"]),
        (["<bbox>"], [{"bbox": [0, 0, 1000, 500], "image": 1}], ["<box> [[0, 0, 1000, 1000]] </box>"]),
        (["<bbox>"], [{"bbox": [0, 0, 640.6, 480]}], ["<box> [[0, 0, 1000, 1000]] </box>"]),
        (
            ["<ref-object> <bbox>"],
            {"caption": "cats", "bbox": [[0, 0, 64, 48], [64, 48, 128, 96]]},
            ["<ref>cats</ref> <box> [[0, 0, 100, 100], [100, 100, 200, 200]] </box>"],
        ),
        (
            ["<ref-object>, <ref-object>?", "<bbox>; <bbox>"],
            [GUY | {"caption": "a"}, {"caption": "<bbox>", "bbox": [0, 0, 64, 48]}],
            [
                "<ref>a</ref>, <ref><bbox></ref>?",
                "<box> [[216, 283, 367, 748]] </box>; <box> [[0, 0, 100, 100]] </box>",
            ],
        ),
        (["no marks"], [], ["no marks"]),
        (["no marks"], None, ["no marks"]),
        (["no marks"], "", ["no marks"]),
    ],
)
def test_fill(texts, objects, expected):
    assert fill(texts, objects, size) == expected


def test_the_compact_spelling():
    assert fill(["<bbox>"], [GUY], size, compact=True) == ["<box>[[216, 283, 367, 748]]</box>"]


def test_halves_round_as_python_rounds():
    assert write_boxes([(0.5, 1.5, 2.5, 999.5)]) == "<box> [[0, 2, 2, 1000]] </box>"


@pytest.mark.parametrize(
    ("texts", "objects", "message"),
    [
        (["<bbox> <bbox>"], [GUY], "2 <bbox> marks? but 1 object;"),
        (["<ref-object>"], [GUY, GUY], "1 <ref-object> marks? but 2 objects"),
        (["<bbox>"], [], "1 <bbox> marks? but 0 objects"),
        (["nothing"], [GUY], "1 object but no <ref-object> or <bbox> mark"),
        (["<bbox>"], [GUY | {"bbox": [235, 136, 138, 359]}], r"objects\[0\].bbox: expected x_min <= x_max"),
        (["<bbox>"], [GUY | {"bbox": [1, 2, 3]}], "expected four numbers"),
        (["<bbox>"], [GUY | {"bbox": [1, 2, 3, 4, 5]}], "expected four numbers"),
        (["<bbox>"], [GUY | {"bbox": ["1", "2", "3", "4"]}], "expected four numbers"),
        (["<bbox>"], [GUY | {"bbox": [1, 2, float("nan"), 4]}], "expected four numbers"),
        (["<bbox>"], [GUY | {"bbox": [1, 2, float("inf"), 4]}], "expected four numbers"),
        (["<bbox>"], [GUY | {"bbox": [1, 2, 10**400, 4]}], "expected four numbers"),
        (["<bbox>"], [GUY | {"bbox": [True, 0, 1, 1]}], "expected four numbers"),
        (["<bbox>"], [GUY | {"bbox": [[1, 2, 3, 4], 5]}], "expected four numbers"),
        (["<bbox>"], [GUY | {"bbox": []}], "expected .x_min, y_min, x_max, y_max."),
        (["<bbox>"], [GUY | {"bbox": "1,2,3,4"}], "expected .x_min, y_min, x_max, y_max."),
        (["<bbox>"], [GUY | {"bbox": None}], "expected .x_min, y_min, x_max, y_max."),
        (["<bbox>"], [GUY | {"bbox": [0, 0, 700, 20]}], "reaches outside of 640 x 480"),
        (["<bbox>"], [GUY | {"bbox": [-5, 0, 70, 20]}], "reaches outside"),
        (["<bbox>"], [GUY | {"bbox_type": "norm_1"}], "reaches outside of 1 x 1"),
        (["<bbox>"], [GUY | {"bbox_type": "pixels"}], "bbox_type: expected one of real"),
        (["<bbox>"], [GUY | {"image": "0"}], "image: expected the index"),
        (["<ref-object>"], [GUY | {"caption": None}], "caption: expected a text"),
        (["<bbox>"], "[{", "not valid JSON"),
        (["<bbox>"], "[" * 100000, "not valid JSON"),
        (["<bbox>"], [1], "expected a list of objects"),
        (["<bbox>"], 7, "expected a list of objects"),
    ],
)
def test_errors(texts, objects, message):
    with pytest.raises(UserError, match=message):
        fill(texts, objects, size)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<ref>a cat</ref><box>[[1, 2, 3, 4]]</box>", [("a cat", [(1, 2, 3, 4)])]),
        ("<ref>a cat</ref> <box> [[1, 2, 3, 4]] </box>", [("a cat", [(1, 2, 3, 4)])]),
        ("a cat[[1, 2, 3, 4]]", [("a cat", [(1, 2, 3, 4)])]),
        ("<box> [[1, 2, 3, 4], [5, 6, 7, 8]] </box>", [(None, [(1, 2, 3, 4), (5, 6, 7, 8)])]),
        ("<box>[1, 2, 3, 4]</box>", [(None, [(1, 2, 3, 4)])]),
        ("[[561,660,695,1000]]", [(None, [(561, 660, 695, 1000)])]),
        (
            "<ref>a</ref><box>[[1, 2, 3, 4]]</box>, <ref>b</ref><box>[[5, 6, 7, 8]]</box>.",
            [("a", [(1, 2, 3, 4)]), ("b", [(5, 6, 7, 8)])],
        ),
        ("a[[1, 2, 3, 4]], b[[5, 6, 7, 8]].", [("a", [(1, 2, 3, 4)]), ("b", [(5, 6, 7, 8)])]),
        ("[[1.5, 2, 3, 4]]", [(None, [(1.5, 2, 3, 4)])]),
        ("[[3, 2, 1, 4]]", []),
        ("[[1, 2, 3, 1004]]", []),
        ("[[-1, 2, 3, 4]]", []),
        ("[[1, 2, 3]]", []),
        ("[[1, 2, 3, 4, 5]]", []),
        ("[[x1, y1, x2, y2]]", []),
        ("[[" + "9" * 400 + ", 1, 2, 3]]", []),
        ("", []),
    ],
)
def test_parse_boxes(text, expected):
    assert parse_boxes(text) == expected


@given(st.text(max_size=200) | st.text("[]0123456789,. <>boxref/-\n", max_size=200))
def test_the_parser_never_raises(text):
    for _, boxes in parse_boxes(text):
        assert all(0 <= x1 <= x2 <= 1000 and 0 <= y1 <= y2 <= 1000 for x1, y1, x2, y2 in boxes)


@st.composite
def pictures(draw):
    """A picture's size and boxes inside it, in pixels."""
    width, height = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    xs, ys = st.floats(0, width), st.floats(0, height)
    boxes = st.tuples(xs, ys, xs, ys).map(lambda b: [min(b[::2]), min(b[1::2]), max(b[::2]), max(b[1::2])])
    return (width, height), draw(st.lists(boxes, min_size=1, max_size=3))


@settings(deadline=None)
@given(pictures(), st.booleans())
def test_pixels_survive_the_round_trip(picture, compact):
    (width, height), boxes = picture
    (text,) = fill(["<bbox>"], [{"bbox": boxes}], lambda _: (width, height), compact)
    ((_, found),) = parse_boxes(text)
    for box, thousandths in zip(boxes, found, strict=True):
        again = to_pixels(thousandths, (width, height))
        for axis, length in enumerate((width, height, width, height)):
            assert abs(again[axis] - box[axis]) <= length / 2000 + 1e-6


@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 4).map(lambda b: (*sorted(b[::2]), *sorted(b[1::2])))
                .map(lambda b: (b[0], b[2], b[1], b[3])), min_size=1, max_size=4),
       st.text("abc é字", min_size=1, max_size=9).map(str.strip).filter(bool))  # fmt: skip
def test_both_spellings_with_and_without_tags_read_the_same(boxes, name):
    for compact in (True, False):
        tagged = f"<ref>{name}</ref>{write_boxes(boxes, compact)}"
        bare = f"{name}{boxes_alone(boxes)}"
        assert parse_boxes(tagged) == parse_boxes(bare) == [(name, [tuple(map(float, b)) for b in boxes])]


def boxes_alone(boxes):
    return str([list(box) for box in boxes])


def seconds(work, size):
    """Processor time of work of a size; the least of three tries."""
    found = []
    for _ in range(3):
        start = time.process_time()
        work(size)
        found.append(time.process_time() - start)
    return min(found)


def test_time_grows_with_the_number_of_boxes():
    def filled(size):
        objects = [{"caption": "c", "bbox": [1, 2, 3, 4]}] * size
        fill(["x"] * size + ["<ref-object><bbox>" * size], objects, lambda _: (10, 10))

    def parsed(size):
        parse_boxes("<ref>" * size + "[[1, 2, 3, 4]]")

    for work in (filled, parsed):
        assert seconds(work, 8_000) < 10 * seconds(work, 2_000) + 0.05


def test_a_header_is_read_once_for_all_boxes_of_an_image():
    read = []
    row = {"query": "<image>" + "<bbox>" * 50, "response": "r", "images": ["a.jpg"]}
    row["objects"] = {"ref": [], "bbox": [[1, 2, 3, 4]] * 50}
    parse(row, size=lambda source: read.append(source) or (10, 10))
    assert read == ["a.jpg"]


LISTS = [
    (
        {"ref": ["a", "b"], "bbox": [[10, 20, 30, 40], [50, 60, 70, 80]]},
        "<ref>a</ref> <box> [[100, 200, 300, 400]] </box>",
    ),
    ({"bbox": [[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]], "ref": ["a", "b"], "bbox_type": "norm1"}, "[[100, 200, 300, 400]]"),
    ({"ref": ["a", "b"], "bbox": [[1, 2], [30, 40, 50, 60]]}, "<box> [[10, 20]] </box>"),
    ({"ref": ["a", "b"], "bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "image_id": [1, 0]}, "[[5, 10, 15, 20]]"),
    ({"ref": ["a", "b"], "bbox": [[1, 2, 3, 4]] * 2, "bbox_type": "norm1000", "image_id": [9, 9]}, "[[1, 2, 3, 4]]"),
]


@pytest.mark.parametrize(("objects", "expected"), LISTS)
def test_lists_of_ms_swift_3(objects, expected):
    def size(image):
        return [(100, 100), (200, 200)][image]

    texts = ["<ref-object> <bbox>", "<ref-object> <bbox>"]
    for written in (objects, json.dumps(objects)):
        first, second = fill(texts, written, size)
        assert first.startswith("<ref>a</ref> ") and expected in first and second.startswith("<ref>b</ref> <box> [[")


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ({"ref": ["a"], "bbox": [[1, 2, 3, 4]] * 2}, "2 <ref-object> marks but 1 in objects.ref"),
        ({"ref": ["a", "b"], "bbox": [[1, 2, 3, 4]]}, "2 <bbox> marks but 1 in objects.bbox"),
        ({"ref": ["a", 2], "bbox": [[1, 2, 3, 4]] * 2}, r"objects.ref\[1\]: expected a text"),
        ({"ref": "a", "bbox": [[1, 2, 3, 4]] * 2}, "objects.ref: expected a list"),
        ({"ref": ["a", "b"], "bbox": [[1, 2, 3], [1, 2, 3, 4]]}, r"objects.bbox\[0\]: .*, or a point x, y, found"),
        ({"ref": ["a", "b"], "bbox": [[1, 2, 3, 4]] * 2, "image_id": [0]}, "image_id: .* each of 2 boxes, found 1"),
        ({"ref": ["a", "b"], "bbox": [[1, 2, 3, 4]] * 2, "image_id": [0, "x"]}, r"objects.image_id\[1\]: expected the"),
        ({"ref": ["a", "b"], "bbox": [[1, 2, 3, 4]] * 2, "bbox_type": "pixel"}, "objects.bbox_type: expected one of"),
        ({"ref": ["a", "b"], "bbox": [[300, 400], [1, 2, 3, 4]]}, "reaches outside of 100 x 100"),
    ],
)
def test_lists_with_mistakes(objects, words):
    with pytest.raises(UserError, match=words):
        fill(["<ref-object> <bbox>"] * 2, objects, lambda _: (100, 100))


def test_image_id_of_an_object():
    objects = [{"caption": "c", "bbox": [10, 10, 20, 20], "image_id": 1}]
    assert fill(["<bbox>"], objects, lambda image: [(100, 100), (200, 200)][image]) == [
        "<box> [[50, 50, 100, 100]] </box>"
    ]
