"""Feature cache in training: features of the frozen vision encoder, from disk or stored."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from ivl.architecture.config import Config
from ivl.checkpoint.fingerprint import fingerprint
from ivl.data.index.index import Index
from ivl.data.media.feature_store import FeatureStore, bytes_needed
from ivl.data.processor import Processor
from ivl.data.sets.dataset import Mixture
from ivl.model.internvl import InternVL
from ivl.types import Batch, UserError


def open_store(folder: str, limit: int, model: InternVL, trainer: Trainer) -> FeatureStore:
    """Open the feature store of a model. Sets `model.features_projected`. Raises UserError if features would change."""
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


def read_features(mixture: Mixture, processor: Processor, store: FeatureStore) -> None:
    """Let the rows of a mixture read their features from the store, in place of pixels."""
    processor = copy(processor)
    processor.features = store
    for n, part in enumerate(mixture.parts):
        rows = part.rows.select(None)
        rows.processor = processor
        mixture.parts[n] = replace(part, rows=rows)


def bytes_needed_by(index: Index, config: Config, model: InternVL) -> int:
    """Size on disk of the features of all tiles of an index."""
    width = model.language_model.config.hidden_size if model.features_projected else config.projector_width
    return bytes_needed(config, int(index.tiles.sum()), width, model.dtype.itemsize)


@torch.no_grad()
def with_features(batch: Batch, model: InternVL, store: FeatureStore) -> Batch:
    """Replace the tiles of a batch by their features. Features computed here are stored."""
    if not batch.stored:
        return batch
    counts = {flag: [tiles for _, tiles, hit in batch.stored if hit == flag] for flag in (True, False)}
    parts: list[Tensor] = []
    cached = iter([] if batch.features is None else batch.features.split(counts[True]))
    computed = iter(_features(batch.tiles, model).split(counts[False]) if counts[False] else [])
    for key, _, hit in batch.stored:
        parts.append(next(cached if hit else computed))
        if key is not None and not hit:
            store.put(key, parts[-1])
    return replace(batch, features=torch.cat(parts), tiles=batch.tiles[:0], stored=[])


def _features(tiles: Tensor, model: InternVL) -> Tensor:
    """Compute features (N, P, C) in the form of the store."""
    features = model.tower_features(tiles)
    return model.mlp1(features.to(model.dtype)) if model.features_projected else features
