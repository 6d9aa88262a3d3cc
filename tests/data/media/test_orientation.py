"""Boxes of `objects` follow their picture: all eight orientations, both directions, every unit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ivl.data.media.load import load_image
from ivl.data.media.orientation import stored_box, upright_box
from ivl.data.processor import Processor
from ivl.data.rows.grounding import parse_boxes, to_pixels
from ivl.options import MediaPolicy
from tests.tiny import write_checkpoint

BOX = (10, 5, 30, 45)
"""In pixels of a stored picture of 80 x 60, where it is white on black"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def picture(tmp_path):
    def write(orientation: int, kind: str = "png") -> str:
        image = Image.new("L", (80, 60))
        ImageDraw.Draw(image).rectangle((BOX[0], BOX[1], BOX[2] - 1, BOX[3] - 1), fill=255)
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{kind}"
        image.save(path, exif=exif)
        return str(path)

    return write


def white(image: Image.Image) -> tuple[int, int, int, int]:
    """Where a picture is white, in pixels."""
    box = Image.fromarray(np.asarray(image)[..., 0]).getbbox()
    assert box is not None
    return box


def row(path: str, bbox, kind: str = "real") -> dict:
    objects = [{"caption": "it", "bbox": list(bbox), "bbox_type": kind, "image": 0}]
    return {"query": "Find <ref-object>", "response": "<bbox>", "images": [path], "objects": objects}


def shown(processor: Processor, path: str, bbox, kind: str = "real") -> list[int]:
    """The box that a row gives, in pixels of the picture as the model sees it."""
    conversation = processor.parse(row(path, bbox, kind))
    ((_, (box,)),) = parse_boxes(conversation.messages[-1].text)
    size = load_image(path, processor.tiler.exif, processor.tiler.policy).size
    return [round(v) for v in to_pixels(box, size)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_a_box_stays_on_what_it_shows(checkpoint, picture, orientation, kind):
    """Pillow turns a TIFF whether asked or not."""
    path = picture(orientation, kind)
    for exif in (True, False):
        seen = load_image(path, exif)
        stored = Processor.from_pretrained(checkpoint, exif=exif)
        assert shown(stored, path, BOX) == pytest.approx(white(seen), abs=1)
        assert shown(stored, path, [v / side for v, side in zip(BOX, (80, 60) * 2)], "norm_1") == pytest.approx(
            white(seen), abs=1
        )
        upright = Processor.from_pretrained(checkpoint, exif=exif, policy=MediaPolicy(boxes="upright"))
        assert shown(upright, path, white(load_image(path))) == pytest.approx(white(seen), abs=1)
        turned = stored.parse(row(path, BOX)).turned_boxes
        assert turned == (orientation > 1 and (exif or kind == "tiff"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_both_directions_undo_each_other(orientation):
    box = (100.0, 50.0, 300.0, 800.0)
    assert stored_box(upright_box(box, orientation), orientation) == pytest.approx(box)
    x1, y1, x2, y2 = upright_box(box, orientation)
    assert 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000


def test_the_other_form_of_objects_and_points(checkpoint, picture):
    path = picture(6)
    objects = {"ref": ["it", "tip"], "bbox": [list(BOX), [10, 5]], "bbox_type": "real", "image_id": [0, 0]}
    line = {"query": "Find <ref-object> and <ref-object>", "response": "<bbox><bbox>", "images": [path]}
    text = Processor.from_pretrained(checkpoint).parse(line | {"objects": objects}).messages[-1].text
    assert text == "<box> [[250, 125, 917, 375]] </box><box> [[917, 125]] </box>"


def test_only_boxes_in_pixels_ask_for_a_picture_behind_a_url(checkpoint):
    processor = Processor.from_pretrained(checkpoint)
    found = processor.parse(row("http://not.fetched.invalid/a.jpg", [0.1, 0.2, 0.3, 0.4], "norm_1"))
    assert "[[100, 200, 300, 400]]" in found.messages[-1].text and not found.turned_boxes


def test_recorded_case(shared):
    folder = shared / "cases/data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    processor = Processor.from_pretrained(shared / "golden/checkpoints/internvl2_1b")
    line = json.loads((folder / "04_exif_box.jsonl").read_text())
    assert "[[500, 0, 1000, 500]]" in processor.parse(line, root=folder).messages[-1].text
