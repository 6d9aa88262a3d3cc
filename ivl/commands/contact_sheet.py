"""Contact sheet of rows: their media with tiles and boxes, questions, answers, and what of them is learnt."""

from __future__ import annotations

from PIL import Image, ImageDraw

from ivl.data.media import load as media
from ivl.data.media.tiling import choose_grid
from ivl.data.processor import Processor
from ivl.lit.callbacks.images import ANSWERED, EXPECTED, lettering, scaled, with_boxes, wrapped
from ivl.options import Sampling
from ivl.types import Conversation, Media, Message

WIDTH, HEIGHT, LINE, LINES = 320, 240, 13, 7
MOST = 4
"""Pictures of one row (frames of a video) that are shown"""
Colour = tuple[int, int, int]
TILES, LEARNT = (255, 200, 0), (205, 240, 205)


def cell(row: Conversation, about: str, processor: Processor, max_tiles: int | None = None) -> Image.Image:
    """Draw the picture of a row: its media with their tiles, a line `about` it, its turns.

    Yellow lines are the borders of tiles. Boxes of questions are red, of answers green, and what is learnt stands on
    green. Boxes are drawn where a row has one image: a box does not say which of several it belongs to. `max_tiles`: as
    of the row's data set. Raises UserError where a medium cannot be read.
    """
    drawn = Image.new("RGB", (WIDTH, HEIGHT + LINE * (LINES + 1)), "white")
    write, bottom = ImageDraw.Draw(drawn), 0
    counts = processor(row, max_tiles=max_tiles).tiles_per_image if row.media else []
    shown = [picture for medium in row.media[:MOST] for picture in _pictures(medium, processor)][:MOST]
    across = 1 if len(shown) < 2 else 2
    images_alone = all(medium.kind == "image" for medium in row.media)
    for n, picture in enumerate(shown):
        tiles = grid_of(picture, counts[n], processor) if images_alone and n < len(counts) else (1, 1)
        picture = scaled(picture, WIDTH // across, HEIGHT if len(shown) < 3 else HEIGHT // 2)
        if len(row.media) == 1 and images_alone:
            for message in row.messages:
                picture = with_boxes(picture, message.text, EXPECTED if message.role == "assistant" else ANSWERED)
        picture = with_tiles(picture, *tiles)
        place = n % across * WIDTH // across, n // across * HEIGHT // 2
        drawn.paste(picture, place)
        bottom = max(bottom, place[1] + picture.height)
    lines = []
    for text, colour, back in ((about, (120, 120, 120), None), *(_turn_text(message) for message in row.messages)):
        font, text = lettering(text, 11)
        lines += [(line, colour, back, font) for line in wrapped(text, font, WIDTH - 2, 5 if row.media else 12)]
    for n, (line, colour, back, font) in enumerate(lines[: LINES + (HEIGHT - bottom) // LINE]):
        y = bottom + 2 + n * LINE
        if back is not None:
            write.rectangle((0, y, 1 + font.getlength(line), y + LINE - 1), fill=back)
        write.text((1, y), line, fill=colour, font=font)
    return drawn


def grid_of(picture: Image.Image, count: int, processor: Processor) -> tuple[int, int]:
    """Columns and rows of tiles of a picture that has `count` of them, a thumbnail included."""
    config = processor.config
    if not config.dynamic_image_size or count < 2:
        return 1, 1
    most = count - config.use_thumbnail
    return choose_grid(*picture.size, min(config.min_dynamic_patch, most), most, config.image_size)


def with_tiles(picture: Image.Image, columns: int, rows: int) -> Image.Image:
    """Draw the borders between tiles."""
    write, (width, height) = ImageDraw.Draw(picture), picture.size
    for n in range(1, columns):
        write.line((n * width // columns, 0, n * width // columns, height), fill=TILES)
    for n in range(1, rows):
        write.line((0, n * height // rows, width, n * height // rows), fill=TILES)
    return picture


def _turn_text(message: Message) -> tuple[str, Colour, Colour | None]:
    """Text of a turn, its colour, and that of the background: green where the turn is learnt."""
    if message.role == "user":
        return f"Q: {message.text}", (0, 0, 0), None
    thought = f"<think>{message.reasoning}</think> " if message.reasoning else ""
    if not message.trained:
        return f"A (not learnt): {thought}{message.text}", (120, 120, 120), None
    return f"A: {thought}{message.text}", (0, 70, 20), LEARNT


def _pictures(medium: Media, processor: Processor) -> list[Image.Image]:
    exif, policy = processor.tiler.exif, processor.tiler.policy
    if medium.kind == "image":
        return [media.load_image(medium.source, exif, policy)]
    return media.load_video(medium.source, Sampling(MOST), medium.start, medium.end, policy=policy)
