"""An image becomes tiles: choose the grid, resize once, cut.

Shapes: N tiles, S pixels a side of a tile. Source of the rules: `dynamic_preprocess` and `build_transform` of
OpenGVLab/InternVL, internvl_chat/internvl/train/dataset.py. Tiles stay uint8; the model normalises them on its device.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ivl.types import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Colour that `single` pads with, scaled to 0..255 and rounded down"""


@lru_cache(maxsize=256)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with `min_tiles <= columns * rows <= max_tiles`, fewest tiles first.

    Grids of equal product keep the iteration order of a set of int pairs, because the released models were trained
    with it and ties are decided by it. Raises UserError where no grid fits.
    """
    if not 1 <= min_tiles <= max_tiles:
        raise UserError(f"tiles: expected 1 <= min_tiles <= max_tiles, found {min_tiles} and {max_tiles}")
    grids = {
        (columns, rows)
        for n in range(min_tiles, max_tiles + 1)
        for columns in range(1, n + 1)
        for rows in range(1, n + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


@lru_cache(maxsize=65536)
def choose_grid(width: int, height: int, min_tiles: int, max_tiles: int, image_size: int) -> tuple[int, int]:
    """(columns, rows) of the grid whose aspect ratio is nearest to the image's, in pixels `width` and `height`.

    Of grids equally near, a later one (more tiles) wins only where the image has more than half its pixels.
    """
    if width < 1 or height < 1:
        raise UserError(f"tiles: an image of {width} x {height} pixels cannot be cut; expected at least 1 x 1")
    aspect = width / height
    area = width * height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in candidate_grids(min_tiles, max_tiles):
        distance = abs(aspect - columns / rows)
        if distance < best_distance:
            best, best_distance = (columns, rows), distance
        elif distance == best_distance and area > 0.5 * image_size * image_size * columns * rows:
            best = (columns, rows)
    return best


def tile_count(
    width: int, height: int, image_size: int, min_tiles: int = 1, max_tiles: int = 12, thumbnail: bool = True
) -> int:
    """N that `cut` returns for an image of this size, thumbnail included."""
    columns, rows = choose_grid(width, height, min_tiles, max_tiles, image_size)
    n = columns * rows
    return n + 1 if thumbnail and n > 1 else n


def cut(image: Image.Image, image_size: int, min_tiles: int = 1, max_tiles: int = 12, thumbnail: bool = True) -> Tensor:
    """(N, 3, S, S) uint8, contiguous: the tiles row by row, then the whole image as one tile where N would exceed 1.

    `image` is RGB. It is stretched to the grid by one bicubic resize; the thumbnail is resized from the original.
    """
    S = image_size
    columns, rows = choose_grid(image.width, image.height, min_tiles, max_tiles, S)
    n = columns * rows
    grid = _pixels(image, columns * S, rows * S).view(rows, S, columns, S, 3).permute(0, 2, 4, 1, 3)
    if n == 1 or not thumbnail:
        return grid.reshape(n, 3, S, S).contiguous()
    out = torch.empty((n + 1, 3, S, S), dtype=torch.uint8)
    out[:n].view(rows, columns, 3, S, S).copy_(grid)
    out[n].copy_(_pixels(image, S, S).permute(2, 0, 1))
    return out


def single(image: Image.Image, image_size: int, pad2square: bool = False) -> Tensor:
    """(1, 3, S, S) uint8: the whole RGB image as one tile, stretched, or padded to a square first."""
    if pad2square:
        image = _pad_to_square(image)
    return _pixels(image, image_size, image_size).permute(2, 0, 1)[None].contiguous()


def _pixels(image: Image.Image, width: int, height: int) -> Tensor:
    """(height, width, 3) uint8 of the image resized."""
    if image.mode != "RGB":
        raise UserError(f"tiles: expected an RGB image, found mode {image.mode}; open it with load_image")
    # Rows first, then columns, as Pillow up to 12 always did: Pillow 13 swaps them for tall images, which rounds the
    # picture between the passes at another place and moves pixels by a level or more.
    if image.width != width:
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    if image.height != height:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def _pad_to_square(image: Image.Image) -> Image.Image:
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(c * 255) for c in IMAGENET_MEAN))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
