"""Costs of rows follow from the model and what trains of it."""

import numpy as np
import pytest

from ivl.architecture.config import Config
from ivl.architecture.families import config_for, find_model
from ivl.lit.training.row_costs import row_costs
from ivl.options import Tune

FULL = Tune("full", "full", "full")


def config(name):
    model = find_model(name)
    assert model is not None
    return Config.from_dict(config_for(model))


def test_by_hand():
    """InternVL3.5-1B: 1025 positions of 24 layers of 1024 and 4096 in the tower, 28 of 1024 and 3072 in the decoder."""
    costs = row_costs(config("internvl3_5-1b"), FULL)
    tower = 1025 * 24 * (4 * 1024**2 + 2 * 1024 * 4096 + 2 * 1025 * 1024)
    token = 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072)
    assert costs.token == 1.0 and costs.tile == pytest.approx(tower / token, rel=0.05)
    assert costs.pair == pytest.approx(28 * 2048 / token, rel=0.05), "two products, of half of the pairs"
    assert costs.supervised == pytest.approx(151_674 * 1024 / token, rel=0.1)


def test_what_is_frozen_or_cached_costs_less():
    small = config("internvl3_5-1b")
    full, frozen = row_costs(small, FULL), row_costs(small, Tune("frozen", "full", "full"))
    assert frozen.tile == pytest.approx(full.tile / 3, rel=0.05)
    assert row_costs(small, FULL, features_cached=True).tile == 0


def test_a_row_costs_what_its_parts_cost():
    costs = row_costs(config("internvl3_5-1b"), FULL)
    tokens, tiles, supervised = np.array([100, 5000]), np.array([0, 13]), np.array([50, 10])
    expected = [
        100 + costs.pair * 100**2 + costs.supervised * 50,
        5000 + costs.pair * 5000**2 + costs.supervised * 10 + 13 * costs.tile,
    ]
    assert costs.of(tokens, tiles, supervised) == pytest.approx(expected)
