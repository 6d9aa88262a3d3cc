"""Panel of answered rows: pictures or frames with boxes, question, expected and given answer, and shares over all rows.

Two columns of large letters, since TensorBoard shows a picture some 330 pixels wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from ivl.data.media.load import load_image, load_video
from ivl.lit.callbacks.images import ANSWERED, EXPECTED, grid, lettering, scaled, with_boxes, wrapped
from ivl.options import Sampling
from ivl.types import Conversation, Media, UserError

WIDTH, PICTURE, COLUMNS, MARGIN = 300, 300, 2, 16
SIZE, LINE, LINES = 18, 22, 10
"""Height of letters, distance of lines, and number of lines below a picture"""
MOST = 4
"""Pictures, or frames of a video, of one row"""
BLACK, GREY = (0, 0, 0), (110, 110, 110)

Answer = dict[str, Any]
"""Entry of `LitInternVL.answers`: row, answer, reasoning and scores"""


def is_right(answer: Answer) -> bool:
    """True for boxes with a mean IoU of a half or more, and for other answers that are exact."""
    if "iou" in answer:
        return answer["iou"] >= 0.5
    text, reference = answer["answer"].strip().lower(), (answer["row"].reference or "").strip().lower()
    return bool(answer.get("exact", text == reference))


def in_true_share(answers: Sequence[Answer], most: int) -> list[Answer]:
    """Pick rows evenly, right and wrong ones in the share that they have of all, in their order."""
    kinds = [[n for n, answer in enumerate(answers) if is_right(answer) == right] for right in (True, False)]
    shown = min(most, len(answers))
    right = round(shown * len(kinds[0]) / max(1, len(answers)))
    picked = [kind[n * len(kind) // count] for kind, count in zip(kinds, (right, shown - right)) for n in range(count)]
    return [answers[n] for n in sorted(picked)]


def answer_panel(answers: Sequence[Answer], most: int) -> Image.Image | None:
    """Draw some of the answers on one picture; None without any. Expected boxes are green, given ones red."""
    if not answers:
        return None
    cells = _rows([_cell(answer) for answer in in_true_share(answers, most)])
    right = sum(map(is_right, answers))
    head = Image.new("RGB", (cells.width, 2 * LINE + 6), "white")
    write = ImageDraw.Draw(head)
    font, text = lettering(f"{right} of {len(answers)} right ({right / len(answers):.0%})", SIZE)
    write.text((MARGIN, 2), text, fill=BLACK, font=font)
    x = float(MARGIN)
    for name, colour in (("expected", EXPECTED), ("given", ANSWERED)):
        write.rectangle((x, LINE + 8, x + 14, LINE + 22), outline=colour, width=3)
        write.text((x + 22, LINE + 2), name, fill=colour, font=font)
        x += 44 + font.getlength(name)
    panel = Image.new("RGB", (cells.width, head.height + cells.height), "white")
    panel.paste(head, (0, 0))
    panel.paste(cells, (0, head.height))
    return panel


def _rows(cells: list[Image.Image]) -> Image.Image:
    """Arrange cells of equal width in rows, each as high as its highest cell."""
    rows: list[Image.Image] = []
    for start in range(0, len(cells), COLUMNS):
        beside = cells[start : start + COLUMNS]
        size = WIDTH, max(cell.height for cell in beside)
        rows.append(grid([ImageOps.pad(cell, size, color="white", centering=(0, 0)) for cell in beside], COLUMNS))
    panel = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        panel.paste(row, (0, top))
        top += row.height
    return panel


def _cell(answer: Answer) -> Image.Image:
    row, right = answer["row"], is_right(answer)
    cell = Image.new("RGB", (WIDTH, PICTURE + LINE * LINES), "white")
    write = ImageDraw.Draw(cell)
    write.rectangle((0, 0, WIDTH, 3), fill=EXPECTED if right else ANSWERED)
    bottom = _paste_media(cell, row, answer["answer"])
    thought = f"({answer['reasoning']}) " if answer.get("reasoning") else ""
    room = LINES + (PICTURE - bottom) // LINE
    texts = [
        (f"Q: {row.question}", BLACK, max(4, room - 6)),
        (f"expected: {row.reference}", EXPECTED, 3),
        (f"given: {thought}{answer['answer']}", EXPECTED if right else ANSWERED, 3),
    ]
    y = bottom + 2
    for text, colour, count in texts:
        font, text = lettering(text, SIZE)
        lines = wrapped(text, font, WIDTH - 12, count + 1)
        for n, line in enumerate(lines[:count]):
            ending = "…" if n == count - 1 and len(lines) > count else ""
            write.text((0, y), line + ending, fill=colour, font=font)
            y += LINE
    return cell.crop((0, 0, WIDTH, y + 4))


def _paste_media(cell: Image.Image, row: Conversation, answer: str) -> int:
    """Paste the pictures of a row, the last ones of many, or frames of a video. Returns the height that they take."""
    pictures = [(medium, picture) for medium in row.media[-MOST:] for picture in _pictures(medium)][-MOST:]
    if not pictures:
        return 6
    across = 1 if len(pictures) == 1 else 2
    down, bottom = -(-len(pictures) // across), 0
    last = max((n for n, (medium, _) in enumerate(pictures) if medium.kind == "image"), default=-1)
    for n, (_, picture) in enumerate(pictures):
        picture = scaled(picture, WIDTH // across - 2 * (across - 1), PICTURE // down - 4)
        if n == last:  # a box does not say which picture it belongs to: most often the last
            for text in (row.question, row.reference or ""):
                picture = with_boxes(picture, text, EXPECTED, width=6)  # visible around an equal given box
            picture = with_boxes(picture, answer, ANSWERED, width=3)
        place = n % across * (WIDTH // across + 2), 6 + n // across * PICTURE // down
        cell.paste(picture, place)
        bottom = max(bottom, place[1] + picture.height)
    return bottom


def _pictures(medium: Media) -> list[Image.Image]:
    """Picture, or frames of a video; an empty grey one where it can no longer be read."""
    try:
        if medium.kind == "image":
            return [load_image(medium.source)]
        return load_video(medium.source, Sampling(MOST), medium.start, medium.end)
    except UserError:
        return [Image.new("RGB", (WIDTH, PICTURE), GREY)]
