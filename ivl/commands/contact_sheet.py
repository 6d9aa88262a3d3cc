"""Contact sheet of rows: their media with boxes, questions and answers."""

from __future__ import annotations

from PIL import Image, ImageDraw

from ivl.data.media import load as media
from ivl.data.processor import Processor
from ivl.lit.callbacks.images import ANSWERED, EXPECTED, lettering, scaled, with_boxes, wrapped
from ivl.options import Sampling
from ivl.types import Conversation, Media, Message

WIDTH, HEIGHT, LINE, LINES = 320, 240, 13, 7
MOST = 4
"""Pictures of one row (frames of a video) that are shown"""


def cell(row: Conversation, about: str, processor: Processor) -> Image.Image:
    """Draw the picture of a row: its media, a line `about` it, its turns. Boxes of questions are red, of answers green.

    Boxes are drawn where a row has one image: a box does not say which of several it belongs to. Raises UserError
    where a medium cannot be read.
    """
    drawn = Image.new("RGB", (WIDTH, HEIGHT + LINE * (LINES + 1)), "white")
    write, bottom = ImageDraw.Draw(drawn), 0
    shown = [picture for medium in row.media[:MOST] for picture in _pictures(medium, processor)][:MOST]
    across = 1 if len(shown) < 2 else 2
    for n, picture in enumerate(shown):
        picture = scaled(picture, WIDTH // across, HEIGHT if len(shown) < 3 else HEIGHT // 2)
        if len(row.media) == 1 and row.media[0].kind == "image":
            for message in row.messages:
                picture = with_boxes(picture, message.text, EXPECTED if message.role == "assistant" else ANSWERED)
        place = n % across * WIDTH // across, n // across * HEIGHT // 2
        drawn.paste(picture, place)
        bottom = max(bottom, place[1] + picture.height)
    lines = []
    for text, colour in ((about, (120, 120, 120)), *(_turn_text(message) for message in row.messages)):
        font, text = lettering(text, 11)
        lines += [(line, colour, font) for line in wrapped(text, font, WIDTH, 5)]
    for n, (line, colour, font) in enumerate(lines[: LINES + (HEIGHT - bottom) // LINE]):
        write.text((0, bottom + 2 + n * LINE), line, fill=colour, font=font)
    return drawn


def _turn_text(message: Message) -> tuple[str, tuple[int, int, int]]:
    name, colour = ("A", EXPECTED) if message.role == "assistant" else ("Q", (0, 0, 0))
    return f"{name}: {message.text}", colour


def _pictures(medium: Media, processor: Processor) -> list[Image.Image]:
    exif, policy = processor.tiler.exif, processor.tiler.policy
    if medium.kind == "image":
        return [media.load_image(medium.source, exif, policy)]
    return media.load_video(medium.source, Sampling(MOST), medium.start, medium.end, policy=policy)
