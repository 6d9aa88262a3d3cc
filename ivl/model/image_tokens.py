"""Check of a batch that was built by hand: image tokens and tiles agree, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from ivl.types import UserError


def check_image_tokens(
    image_BT: Tensor, count: int, per_tile: int, tiles_per_row: Tensor | None, row_ids_BT: Tensor | None
) -> None:
    """Raise UserError where the image tokens of a row are not those of its tiles, `per_tile` each, `count` in all.

    On the CPU only: elsewhere each step would wait for the answer.
    """
    if not image_BT.is_cpu:
        return
    if tiles_per_row is None:
        tiles, tokens = [count], [int(image_BT.sum())]
    else:
        tiles = tiles_per_row.tolist()
        if row_ids_BT is None:
            tokens = image_BT.sum(1).tolist()
        else:
            of_row = torch.zeros(len(tiles), dtype=torch.long, device=image_BT.device)
            tokens = of_row.index_add(0, row_ids_BT.clamp(min=0).flatten(), image_BT.flatten().long()).tolist()
    if sum(tiles) != count:
        raise UserError(f"batch: tiles_per_row adds up to {sum(tiles)} tiles, but there are {count}")
    for row, (have, need) in enumerate(zip(tokens, tiles, strict=True)):
        if have != need * per_tile:
            where = "batch" if tiles_per_row is None else f"row {row} of the batch"
            raise UserError(
                f"{where}: {have} image tokens (<IMG_CONTEXT>) but {need} tiles of {per_tile} tokens each, which "
                f"need {need * per_tile}; give every tile its tokens, and do not cut a row inside an image"
            )
