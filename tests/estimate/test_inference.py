"""Memory of answering, against the allocations of the model's own code."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ivl.architecture.config import Config
from ivl.architecture.families import config_for, find_model
from ivl.estimate.hardware import TILES, TOKENS
from ivl.estimate.inference import cache_bytes, tower_bytes
from ivl.estimate.training_step import MemTracker, faked
from ivl.inference.kv_cache import KVCache
from ivl.model.internvl import InternVL


@pytest.mark.parametrize("name", ["internvl2-2b", "internvl2-26b"])
def test_tiles_in_the_tower_take_what_is_estimated(name):
    """At most, and no tenth less: 2 blocks of either tower, in bfloat16."""
    config = Config.from_dict(config_for(find_model(name)))
    vision = replace(config.vision, num_hidden_layers=2)
    config = replace(config, vision=vision, llm=config.llm | {"num_hidden_layers": 1}, select_layer=-1)
    model = InternVL.from_config(config, "bfloat16", "meta", "sdpa")
    with FakeTensorMode(), faked(model), torch.no_grad(), MemTracker(model) as tracker:
        model.tile_features(torch.zeros(TILES, 3, 448, 448, dtype=torch.uint8))
    estimate = tower_bytes(vision, config.image_size, 2)
    assert 0.9 * estimate < tracker.peak < estimate


def test_a_layers_cache_takes_what_is_estimated():
    cache = KVCache()
    cache.reserve(1, TOKENS)
    cache.allocate(0, torch.empty(1, 8, 1, 128, dtype=torch.bfloat16))
    assert cache_bytes(8, 128, 2) == cache.keys[0].nbytes + cache.values[0].nbytes
