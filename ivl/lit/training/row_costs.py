"""Time of rows in training, by which the batches of a step are chosen so that no rank waits for another."""

from __future__ import annotations

from ivl.architecture.config import Config
from ivl.data.packing.sections import RowCosts
from ivl.estimate.flops import model_costs
from ivl.options import Tune


def row_costs(config: Config, tune: Tune, features_cached: bool = False) -> RowCosts:
    """Costs of a tile, a pair of tokens and a supervised token in units of that of a token, by operations.

    Attention skips the half of the pairs that the causal mask hides. Three digits: a batch's place does not hang on the
    last one.
    """
    costs = model_costs(config, tune)
    tile = 0.0 if features_cached else costs.tile
    values = (tile, costs.token, costs.pair / 2, costs.supervised)
    return RowCosts(*(float(f"{value / costs.token:.3g}") for value in values))
