"""Training on features that the frozen tower computed before, where they are on disk; computed and kept where not."""

from __future__ import annotations

from dataclasses import replace

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from ivl.checkpoint.fingerprint import fingerprint
from ivl.data.media.feature_store import FeatureStore
from ivl.model.internvl import InternVL
from ivl.types import Batch, UserError


def open_store(folder: str, limit: int, model: InternVL, trainer: Trainer) -> FeatureStore:
    """The store of a run's model. Sets `model.features_projected`. Raises UserError where features would change."""
    if any(p.requires_grad for p in model.vision_model.parameters()):
        raise UserError(
            "--data.feature_cache: the vision encoder trains, so its features change at every step; "
            "expected model.tune.vision_model frozen, or no feature_cache"
        )
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise UserError(
            f"--data.feature_cache: {type(trainer.strategy).__name__} splits the vision encoder, which every process "
            "must then run at every step; use ddp, or no feature_cache"
        )
    model.features_projected = not any(p.requires_grad for p in model.mlp1.parameters())
    parts = [("vision_model", model.vision_model)] + [("mlp1", model.mlp1)] * model.features_projected
    tensors = [(f"{name}.{key}", value) for name, part in parts for key, value in part.state_dict().items()]
    config = model.config
    settings = (config.select_layer, config.ps_version, config.downsample_ratio, trainer.precision)
    name = fingerprint([*tensors, (repr(settings), torch.zeros(0))])
    return FeatureStore(folder, name, limit)


@torch.no_grad()
def with_features(batch: Batch, model: InternVL, store: FeatureStore) -> Batch:
    """The batch with the features of all its tiles and none of the tiles; those computed here are kept."""
    if not batch.stored:
        return batch
    counts = {known: [tiles for _, tiles, found in batch.stored if found == known] for known in (True, False)}
    parts: list[Tensor] = []
    there = iter([] if batch.features is None else batch.features.split(counts[True]))
    made = iter(_made(batch.tiles, model).split(counts[False]) if counts[False] else [])
    for key, _, found in batch.stored:
        parts.append(next(there if found else made))
        if key is not None and not found:
            store.put(key, parts[-1])
    return replace(batch, features=torch.cat(parts), tiles=batch.tiles[:0], stored=[])


def _made(tiles: Tensor, model: InternVL) -> Tensor:
    """(N, P, C) as the store keeps them."""
    found = model.tower_features(tiles)
    return model.mlp1(found.to(model.dtype)) if model.features_projected else found
