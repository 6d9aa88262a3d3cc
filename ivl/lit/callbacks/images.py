"""Panel of answered rows: picture with boxes, question, expected and generated answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from ivl.data.rows.grounding import parse_boxes, to_pixels
from ivl.types import Conversation

SIDE, TEXT, MARGIN = 280, 90, 8
ANSWERED, EXPECTED = (220, 40, 40), (30, 150, 60)


def panel(cells: list[tuple[Image.Image, Conversation, str]], columns: int = 4) -> Image.Image:
    """Draw all cells on one picture. Boxes of the expected answer are green, those of the generated answer red."""
    return grid([_cell(*cell) for cell in cells], columns)


def grid(cells: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Arrange cells of one size on one picture, row by row."""
    columns = min(columns, len(cells))
    width, height = cells[0].width + 2 * MARGIN, cells[0].height + 2 * MARGIN
    sheet = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), "white")
    for n, cell in enumerate(cells):
        sheet.paste(cell, (n % columns * width + MARGIN, n // columns * height + MARGIN))
    return sheet


def _cell(image: Image.Image, row: Conversation, answer: str) -> Image.Image:
    cell = Image.new("RGB", (SIDE, SIDE + TEXT), "white")
    scale = min(SIDE / image.width, SIDE / image.height)
    picture = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    draw = ImageDraw.Draw(picture)
    last = row.messages[-1] if row.messages[-1].role == "user" else row.messages[-2]
    draw_boxes(draw, last.text, picture.size, EXPECTED, width=5)  # visible around an equal generated box
    draw_boxes(draw, row.reference or "", picture.size, EXPECTED, width=5)
    draw_boxes(draw, answer, picture.size, ANSWERED)
    cell.paste(picture, (0, 0))
    write = ImageDraw.Draw(cell)
    lines = [
        (f"Q: {last.text}", (0, 0, 0), 3),
        (f"expected: {row.reference}", EXPECTED, 2),
        (f"given: {answer}", ANSWERED if answer != row.reference else EXPECTED, 2),
    ]
    y = picture.height + 2
    for text, colour, most in lines:
        font, text = lettering(text, 12)
        for line in wrapped(text, font, SIDE, most):
            write.text((0, y), line, fill=colour, font=font)
            y += 13
    return cell


FONTS = (
    "DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf",
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "SourceHanSansSC-Regular.otf", "wqy-microhei.ttc",
    "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "PingFang.ttc", "msyh.ttc", "simsun.ttc",
)  # fmt: skip
"""Font files, searched for in the system's folders: Pillow's default has ASCII only. From the second line: Chinese"""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def lettering(text: str, size: int) -> tuple[Font, str]:
    """Choose a font for a text of one line; characters without a glyph are written as `[3 characters]`."""
    text = " ".join(text.split())
    fonts = [font for font in (_font("", size), *(_font(name, size) for name in FONTS)) if font is not None]
    font = min(fonts, key=lambda candidate: sum(_lacks(candidate, c) for c in text))  # the first of equals
    marked = "".join("\0" if _lacks(font, c) else c for c in text)
    return font, re.sub("\0+", lambda run: f"[{len(run[0])} character{'s' * (len(run[0]) > 1)}]", marked)


@cache
def _font(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


@cache
def _lacks(font: Font, character: str) -> bool:
    """Return true if a font has no glyph for a character, and draws its box for missing ones."""
    return not character.isspace() and bytes(font.getmask(character)) == bytes(font.getmask("\uffff"))


def wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """Break a text into at most `most` lines of `width` pixels, at blanks where possible."""
    lines, line = [], ""
    for character in text:
        if font.getlength(line + character) > width:
            cut = line.rfind(" ") + 1 or len(line)
            lines.append(line[:cut])
            line = line[cut:]
            if len(lines) == most:
                return lines
        line += character
    return [*lines, line]


def draw_boxes(
    draw: ImageDraw.ImageDraw, text: str, size: tuple[int, int], colour: tuple[int, int, int], width: int = 2
) -> None:
    """Draw the boxes of a text (coordinates 0 to 1000) onto a picture of `size` pixels."""
    for _, boxes in parse_boxes(text):
        for box in boxes:
            x1, y1, x2, y2 = to_pixels(box, size)
            if x1 <= x2 and y1 <= y2:
                draw.rectangle((x1, y1, x2, y2), outline=colour, width=width)
