"""Draws a panel of answered rows: picture with boxes, question, expected and given answer."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ivl.data.grounding import parse_boxes, to_pixels
from ivl.types import Conversation

SIDE, TEXT, MARGIN = 280, 90, 8
GIVEN, EXPECTED = (220, 40, 40), (30, 150, 60)


def panel(cells: list[tuple[Image.Image, Conversation, str]], columns: int = 4) -> Image.Image:
    """One picture of all cells. Boxes of the expected answer are green, those of the given answer red."""
    return grid([_cell(*cell) for cell in cells], columns)


def grid(cells: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Cells of one size on one sheet, row by row."""
    columns = min(columns, len(cells))
    width, height = cells[0].width + 2 * MARGIN, cells[0].height + 2 * MARGIN
    sheet = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), "white")
    for n, one in enumerate(cells):
        sheet.paste(one, (n % columns * width + MARGIN, n // columns * height + MARGIN))
    return sheet


def _cell(image: Image.Image, row: Conversation, answer: str) -> Image.Image:
    cell = Image.new("RGB", (SIDE, SIDE + TEXT), "white")
    scale = min(SIDE / image.width, SIDE / image.height)
    picture = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    draw = ImageDraw.Draw(picture)
    last = row.messages[-1] if row.messages[-1].role == "user" else row.messages[-2]
    draw_boxes(draw, last.text, picture.size, EXPECTED, width=5)  # to be seen around an equal box given
    draw_boxes(draw, row.reference or "", picture.size, EXPECTED, width=5)
    draw_boxes(draw, answer, picture.size, GIVEN)
    cell.paste(picture, (0, 0))
    font = ImageFont.load_default(12)
    write = ImageDraw.Draw(cell)
    lines = [
        (f"Q: {last.text}", (0, 0, 0), 3),
        (f"expected: {row.reference}", EXPECTED, 2),
        (f"given: {answer}", GIVEN if answer != row.reference else EXPECTED, 2),
    ]
    y = picture.height + 2
    for text, colour, most in lines:
        for line in textwrap.wrap(text.replace("\n", " "), 44)[:most]:
            write.text((0, y), line, fill=colour, font=font)
            y += 13
    return cell


def draw_boxes(
    draw: ImageDraw.ImageDraw, text: str, size: tuple[int, int], colour: tuple[int, int, int], width: int = 2
) -> None:
    """Draw every box a text names (0 to 1000) onto a picture of this size."""
    for _, boxes in parse_boxes(text):
        for box in boxes:
            x1, y1, x2, y2 = to_pixels(box, size)
            if x1 <= x2 and y1 <= y2:
                draw.rectangle((x1, y1, x2, y2), outline=colour, width=width)
