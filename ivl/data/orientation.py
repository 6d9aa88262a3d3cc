"""EXIF orientation 1..8: how a stored picture is turned upright."""

from __future__ import annotations

from PIL import Image

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
    """A stored picture, turned upright."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(width, height) of a stored picture once it is upright."""
    return (size[1], size[0]) if orientation >= 5 else size
