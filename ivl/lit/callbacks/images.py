"""Panel of pairs of answers; what it shares with the panel of answers: lettering, boxes, a grid of pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

from ivl.data.rows.grounding import parse_boxes, to_pixels
from ivl.finetune.objectives import PairOfAnswers

Colour = tuple[int, int, int]
Line = tuple[str, Colour, int]

SIDE, TEXT, PAIR_TEXT, MARGIN = 280, 90, 132, 16
ANSWERED, EXPECTED, BLACK = (220, 40, 40), (30, 150, 60), (0, 0, 0)


def grid(cells: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Arrange cells of one size on one picture, row by row."""
    return to_pil_image(make_grid([pil_to_tensor(cell) for cell in cells], columns, MARGIN, pad_value=255))


def pair_panel(cells: list[tuple[Image.Image, PairOfAnswers]], columns: int = 4) -> Image.Image:
    """Draw pairs of answers on one picture. The chosen answer and its boxes are green, the rejected one's red."""
    return grid([_pair_cell(*cell) for cell in cells], columns)


def _pair_cell(image: Image.Image, pair: PairOfAnswers) -> Image.Image:
    question, chosen, rejected = pair.row.messages[-2].text, pair.row.messages[-1].text, pair.rejected.messages[-1].text
    numbers = [reward_text(before, now, reward) for before, now, reward in zip(pair.before, pair.now, pair.rewards)]
    margin = pair.rewards[0] - pair.rewards[1]
    lines: list[Line] = [
        (f"Q: {question}", BLACK, 3),
        (f"chosen: {chosen}", EXPECTED, 2),
        (numbers[0], BLACK, 1),
        (f"rejected: {rejected}", ANSWERED, 2),
        (numbers[1], BLACK, 1),
        (f"margin {margin:+.3g}", EXPECTED if margin > 0 else ANSWERED, 1),
    ]
    return _written(image, [(question, EXPECTED, 5), (chosen, EXPECTED, 5), (rejected, ANSWERED, 2)], lines, PAIR_TEXT)


def reward_text(before: float, now: float, reward: float) -> str:
    """Log-probability of an answer by the reference and now, and its reward."""
    return f"log p {before:.2f} → {now:.2f}, reward {reward:+.3g}"


def _written(
    image: Image.Image, boxes: Sequence[tuple[str, Colour, int]], lines: Sequence[Line], height: int
) -> Image.Image:
    """Draw a picture with the boxes of texts, and lines below it: text, colour, and most lines that it takes."""
    cell = Image.new("RGB", (SIDE, SIDE + height), "white")
    picture = scaled(image, SIDE, SIDE)
    for text, colour, width in boxes:
        picture = with_boxes(picture, text, colour, width)
    cell.paste(picture, (0, 0))
    write = ImageDraw.Draw(cell)
    y = picture.height + 2
    for text, colour, most in lines:
        font, text = lettering(text, 12)
        for line in wrapped(text, font, SIDE, most):
            write.text((0, y), line, fill=colour, font=font)
            y += 13
    return cell


def scaled(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scale a picture to fit a rectangle."""
    scale = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BILINEAR if scale > 1 else Image.Resampling.LANCZOS)


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


def with_boxes(picture: Image.Image, text: str, colour: Colour, width: int = 2) -> Image.Image:
    """Draw the boxes of a text (coordinates 0 to 1000) onto a copy of a picture."""
    boxes = [to_pixels(box, picture.size) for _, group in parse_boxes(text) for box in group]
    if not boxes:
        return picture
    return to_pil_image(draw_bounding_boxes(pil_to_tensor(picture), torch.tensor(boxes), colors=colour, width=width))
