"""Conversion of pixels of any mode to 8-bit RGB."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from ivl.options.media import Transparency
from ivl.types import UserError


def to_rgb(image: Image.Image, where: str, transparency: Transparency = "drop") -> Image.Image:
    """Convert as `convert("RGB")` does, except that 16-bit grey is scaled (Pillow clips at 255) and "white" blends."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in (None, "PNG", "PPM")):
        return Image.fromarray(scaled(np.asarray(image).astype(np.int64).clip(0, 65535))).convert("RGB")
    if image.mode in ("I", "F"):
        raise UserError(
            f"{where}: pixels of mode {image.mode} (32 bits) have no known range; expected 8 or 16 bits a channel"
        )
    if transparency == "white" and image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def scaled(values: np.ndarray) -> np.ndarray:
    """Scale 16-bit values to 8 bits: from 16, 12 or 8 bits, the fewest that hold the largest value.

    Cameras and scanners store 12 bits in 16; by the upper 8 bits alone such a picture is black.
    """
    largest = int(values.max(initial=0))
    shift = next(bits - 8 for bits in (8, 12, 16) if largest < 1 << bits)
    return (values >> shift).astype(np.uint8)


def deep_png(image: Image.Image, opened: BinaryIO) -> Image.Image | None:
    """Decode a PNG of 16 bits a colour whose upper 8 bits are nearly black, scaled; None for any other picture.

    Pillow keeps the upper 8 bits only, so such a file is decoded again.
    """
    if image.format != "PNG" or image.mode not in ("RGB", "RGBA", "LA"):
        return None
    opened.seek(24)
    if opened.read(1) != b"\x10" or max(high for _, high in _extrema(image)) > 15:
        return None
    from torchvision.io import ImageReadMode, decode_image

    opened.seek(0)
    data = torch.frombuffer(bytearray(opened.read()), dtype=torch.uint8)
    values = decode_image(data, ImageReadMode.RGB).permute(1, 2, 0).numpy()
    deep = Image.fromarray(scaled(values))
    if "A" in image.getbands():
        deep.putalpha(image.getchannel("A"))
    return deep


def _extrema(image: Image.Image) -> list[tuple[int, int]]:
    """Least and largest value of each colour, alpha left out."""
    return [image.getchannel(band).getextrema() for band in image.getbands() if band != "A"]  # type: ignore[misc]
