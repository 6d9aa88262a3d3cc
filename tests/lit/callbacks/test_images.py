"""What is written below pictures: characters that a font lacks are counted, lines fit their width."""

import pytest
from PIL import ImageFont

from ivl.lit.callbacks import images as pictures
from ivl.lit.callbacks.images import lettering, wrapped


@pytest.fixture
def no_fonts(monkeypatch):
    """A system without fonts."""
    monkeypatch.setattr(pictures, "FONTS", ())


def test_text_that_the_font_has_is_written_on_one_line(no_fonts):
    assert lettering("a  cat,\n10 %", 12)[1] == "a cat, 10 %"


def test_what_no_font_here_has_is_counted(no_fonts):
    assert lettering("a 猫 on 桌子上", 12)[1] == "a [1 character] on [3 characters]"


def test_a_font_of_the_system_is_taken_where_it_has_more(no_fonts, monkeypatch):
    class Wide:
        """Draws everything."""

        def getmask(self, character: str) -> bytes:
            return character.encode()

    own, wide = ImageFont.load_default(12), Wide()
    monkeypatch.setattr(pictures, "FONTS", ("missing.ttc", "wide.ttc"))
    monkeypatch.setattr(pictures, "_font", lambda name, size: {"": own, "wide.ttc": wide}.get(name))
    assert lettering("a 猫", 12) == (wide, "a 猫")
    assert lettering("a cat", 12) == (own, "a cat")


def test_lines_fit_and_break_at_blanks():
    font = ImageFont.load_default(12)
    text = "the quick brown fox jumps over the lazy dog " * 3
    lines = wrapped(text, font, 120, 50)
    assert "".join(lines) == text and all(font.getlength(line) <= 120 for line in lines)
    assert all(line.endswith(" ") for line in lines)
    assert wrapped(text, font, 120, 2) == lines[:2]
    assert all(font.getlength(line) <= 50 for line in wrapped("x" * 100, font, 50, 50))
