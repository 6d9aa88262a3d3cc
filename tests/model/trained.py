"""Inputs for a tiny model, and one whose trainable parameters have moved."""

from __future__ import annotations

import torch

from ivl.model.internvl import InternVL


def inputs(model: InternVL) -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 200, (2, 24), generator=generator)
    ids[:, 5:9] = model.image_token_id
    tiles = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8, generator=generator)
    return {"input_ids": ids, "tiles": tiles}


def stirred(model: InternVL) -> InternVL:
    """Everything that trains moved, so that an adapter that is not applied shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()
