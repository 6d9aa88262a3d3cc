"""Random rows for a tiny model, and the two forms of a batch, made without the data half."""

import torch

from ivl.model.internvl import InternVL
from ivl.types import IGNORE, Batch


def rows(model: InternVL, lengths=(9, 17, 12), tiles=(0, 2, 1), seed=0) -> list[dict[str, torch.Tensor]]:
    """Random rows: `tiles` images each, the second half supervised."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length, count in zip(lengths, tiles):
        ids = torch.randint(0, 200, (length,), generator=generator)
        ids[1 : 1 + count * model.config.tokens_per_tile] = model.image_token_id
        labels = ids.clone()
        labels[: length // 2 + 1] = IGNORE
        labels[ids == model.image_token_id] = IGNORE
        pixels = torch.randint(0, 256, (count, 3, 56, 56), dtype=torch.uint8, generator=generator)
        made.append({"input_ids": ids, "labels": labels, "tiles": pixels})
    return made


def padded(made: list[dict[str, torch.Tensor]], extra: int = 0) -> Batch:
    longest = max(len(row["input_ids"]) for row in made) + extra
    batch = Batch(
        input_ids=torch.zeros(len(made), longest, dtype=torch.long),
        attention_mask=torch.zeros(len(made), longest, dtype=torch.bool),
        position_ids=torch.zeros(len(made), longest, dtype=torch.long),
        labels=torch.full((len(made), longest), IGNORE),
        tiles=torch.cat([row["tiles"] for row in made]),
        tiles_per_row=torch.tensor([len(row["tiles"]) for row in made]),
    )
    for number, row in enumerate(made):
        length = len(row["input_ids"])
        batch.input_ids[number, :length] = row["input_ids"]
        batch.labels[number, :length] = row["labels"]
        batch.attention_mask[number, :length] = True
        batch.position_ids[number, :length] = torch.arange(length)
    return batch


def packed(made: list[dict[str, torch.Tensor]], extra: int = 0) -> Batch:
    lengths = [len(row["input_ids"]) for row in made]
    filler = torch.zeros(extra, dtype=torch.long)
    return Batch(
        input_ids=torch.cat([*(row["input_ids"] for row in made), filler])[None],
        attention_mask=torch.arange(sum(lengths) + extra)[None] < sum(lengths),
        position_ids=torch.cat([*(torch.arange(n) for n in lengths), filler])[None],
        labels=torch.cat([*(row["labels"] for row in made), filler + IGNORE])[None],
        tiles=torch.cat([row["tiles"] for row in made]),
        tiles_per_row=torch.tensor([len(row["tiles"]) for row in made]),
        row_ids=torch.cat([*(torch.full((n,), i) for i, n in enumerate(lengths)), filler - 1])[None],
    )
