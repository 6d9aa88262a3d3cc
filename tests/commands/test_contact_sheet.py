"""Contact sheet: tiles, rows without pictures, and what is learnt."""

import numpy as np
import pytest
from PIL import Image

from ivl.commands.contact_sheet import LEARNT, TILES, cell, grid_of
from ivl.data.processor import Processor
from ivl.types import Conversation, Media, Message
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny") / "model")
    return Processor.from_pretrained(folder, max_tiles=6, max_length=4096)


def colours(picture: Image.Image) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(picture).reshape(-1, 3)))


def test_borders_of_tiles_are_drawn(processor, tmp_path):
    Image.new("RGB", (300, 100), "blue").save(tmp_path / "wide.png")
    question = Message("user", (Media("image", str(tmp_path / "wide.png")), "?"))
    row = Conversation((question, Message("assistant", ("a",))))
    picture = np.asarray(cell(row, "about", processor))
    columns = np.flatnonzero((picture[20] == TILES).all(-1))
    assert columns.tolist() == [106, 213], "three tiles side by side, of 320 pixels"
    assert TILES not in colours(cell(row, "about", processor, max_tiles=1))


def test_the_grid_is_that_of_the_number_of_tiles(processor):
    assert grid_of(Image.new("RGB", (200, 100)), 3, processor) == (2, 1)
    assert grid_of(Image.new("RGB", (100, 100)), 1, processor) == (1, 1)


def test_what_is_learnt_stands_on_green_and_rows_of_text_are_shown(processor):
    turns = (Message("user", ("?",)), Message("assistant", ("no",), trained=False), Message("user", ("sure?",)))
    assert LEARNT not in colours(cell(Conversation(turns), "about", processor))
    answered = Conversation((*turns, Message("assistant", ("yes",), reasoning="so")))
    assert LEARNT in colours(cell(answered, "about", processor))
