"""Image tiling: choose the grid, resize once, cut into tiles.

Shapes: N tiles, S pixels a side of a tile. Source of the rules: `dynamic_preprocess` and `build_transform` of
OpenGVLab/InternVL, internvl_chat/internvl/train/dataset.py. Tiles stay uint8; the model normalises them on its device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ivl.types import IMAGENET_MEAN, UserError


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


_NOISE = 4
"""Levels by which the pixels of a picture of one colour may differ, as a JPEG's do"""


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


def cut(
    image: Image.Image,
    image_size: int,
    min_tiles: int = 1,
    max_tiles: int = 12,
    thumbnail: bool = True,
    exact: bool = True,
) -> Tensor:
    """(N, 3, S, S) uint8, contiguous: the tiles row by row, then the whole image as one tile where N would exceed 1.

    `image` is RGB. It is stretched to the grid by one bicubic resize; the thumbnail is resized from the original.
    `exact` False resizes with torch instead of Pillow: several times as fast, a pixel in some hundreds a level off.

        image, 900 x 600        grid of 3 x 2: one resize to 3 S x 2 S, cut        thumbnail

        +--------------+        +-----+-----+-----+                                +-----+
        |              |        |  0  |  1  |  2  |                                |     |
        |              |  -->   +-----+-----+-----+                          and   |  6  |    N = 7
        |              |        |  3  |  4  |  5  |                                |     |
        +--------------+        +-----+-----+-----+                                +-----+
    """
    S = image_size
    columns, rows = choose_grid(image.width, image.height, min_tiles, max_tiles, S)
    n = columns * rows
    resize = _resizer(image, exact)
    out = torch.empty((tile_count(*image.size, S, min_tiles, max_tiles, thumbnail), 3, S, S), dtype=torch.uint8)
    tiles = out.numpy()
    grid = tiles[:n].reshape(rows, columns, 3, S, S)
    for colour, plane in enumerate(resize(columns * S, rows * S)):
        grid[:, :, colour] = plane.reshape(rows, S, columns, S).swapaxes(1, 2)
    if len(out) > n:
        for colour, plane in enumerate(resize(S, S)):
            tiles[n, colour] = plane
    return out


def single(image: Image.Image, image_size: int, pad2square: bool = False, exact: bool = True) -> Tensor:
    """(1, 3, S, S) uint8: the whole RGB image as one tile, stretched, or padded to a square first.

    `exact`: as in `cut`.
    """
    if pad2square:
        image = _pad_to_square(image)
    return torch.from_numpy(np.stack(list(_resizer(image, exact)(image_size, image_size)))[None])


def _resizer(image: Image.Image, exact: bool) -> Callable[[int, int], Iterable[np.ndarray]]:
    """Resize function: width, height → for each colour the resized plane, (height, width) uint8."""
    if image.mode != "RGB":
        raise UserError(f"tiles: expected an RGB image, found mode {image.mode}; open it with load_image")
    if exact:
        return partial(_by_pillow, image)
    return partial(_by_torch, torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])


def _by_pillow(image: Image.Image, width: int, height: int) -> Iterable[np.ndarray]:
    # Rows first, then columns, as Pillow up to 12 always did: Pillow 13 swaps them for tall images, which rounds the
    # picture between the passes at another place and moves pixels by a level or more.
    if image.width != width:
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    if image.height != height:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return map(np.asarray, image.split())  # Pillow takes colours apart several times as fast as a strided copy


def _by_torch(image_13HW: Tensor, width: int, height: int) -> Iterable[np.ndarray]:
    # As in Pillow, minification is smoothed; the weights have 15 bits here and 22 there
    return functional.interpolate(image_13HW, size=(height, width), mode="bicubic", antialias=True)[0].numpy()


def _pad_to_square(image: Image.Image) -> Image.Image:
    width, height = image.size
    side = max(width, height)
    # The mean colour, scaled to 0..255 and rounded down
    square = Image.new("RGB", (side, side), tuple(int(c * 255) for c in IMAGENET_MEAN))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def plain_pictures(tiles: Tensor, tiles_per_image: list[int]) -> int:
    """Number of pictures and frames of one colour among (N, 3, S, S) tiles: black or empty ones, for example."""
    colours = tiles.flatten(2)
    spread = (colours.amax(2).int(), colours.amin(2).int())
    ranges = zip(*(part.split(tiles_per_image) for part in spread), strict=True)
    return sum(int((high.amax(0) - low.amin(0)).max()) <= _NOISE for high, low in ranges if len(high))
