"""EXIF orientation 1..8: turning stored pictures, and their boxes, upright."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from ivl.data.rows.grounding import Box

_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INVERSE = {6: 8, 8: 6}
"""The other orientations undo themselves"""


class StoredImage(NamedTuple):
    """Size and orientation of an image as its file stores it."""

    size: tuple[int, int]
    """(width, height)"""
    orientation: int
    turned: bool = False
    """True if the decoder turns it in any case"""


def stored_image(image: Image.Image) -> StoredImage:
    """Size and orientation from the header. Pillow turns a TIFF by itself, and its header shows the turned size."""
    if image.format != "TIFF":
        return StoredImage(image.size, orientation_of(image))
    value = image.getexif().get(_TAG, 1)
    orientation = value if value in range(1, 9) else 1
    return StoredImage(upright_size(image.size, orientation), orientation, turned=True)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation from the header; 1 where there is none that can be read."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, and gives the turned size from the header
    try:
        # Not the method of PNG images, which decodes the pixels in search of a late chunk
        value = Image.Image.getexif(image).get(_TAG, 1)
    except Exception:  # noqa: BLE001  (a damaged block counts as none, as in browsers)
        return 1
    return value if value in range(1, 9) else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn a stored picture upright."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(width, height) of a stored picture once it is upright."""
    return (size[1], size[0]) if orientation >= 5 else size


def upright_box(box: Box, orientation: int) -> Box:
    """Convert a box of the stored picture, in thousandths, to the same box of the upright one."""
    x1, y1, x2, y2 = box
    if orientation >= 5:  # rows become columns
        x1, y1, x2, y2 = y1, x1, y2, x2
    if orientation in (2, 3, 6, 7):
        x1, x2 = 1000 - x2, 1000 - x1
    if orientation in (3, 4, 7, 8):
        y1, y2 = 1000 - y2, 1000 - y1
    return x1, y1, x2, y2


def stored_box(box: Box, orientation: int) -> Box:
    """Convert a box of the upright picture, in thousandths, to the same box of the stored one."""
    return upright_box(box, _INVERSE.get(orientation, orientation))
