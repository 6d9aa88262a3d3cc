"""FLOPs of a training step, counted by torch in the model's own code, before a weight is read.

`torch.utils.flop_counter` counts matrix products (linear layers, attention, the convolution that makes patches), a
multiplication with its addition as two; norms, activations and the optimizer are left out. Attention counts every pair
of positions of a row, also those that the causal mask hides: a kernel that skips them does up to half of it.

The figures of a batch of any size come from a few steps of shallow copies on tensors without numbers: an operation is
in proportion to one of the counts of `Work`, and each block of a stack adds the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from ivl.architecture.config import Config
from ivl.estimate.training_step import BatchShape, TrainSetup, batch_of, faked, shallow_copy, used_depth
from ivl.model.internvl import InternVL
from ivl.model.loss import CHUNK
from ivl.options import Blocks, Tune


@dataclass(frozen=True)
class Work:
    """Counts that operations follow from: of one batch, of a step, of an epoch."""

    tiles: int = 0
    tokens: int = 0
    """Positions of the language model, image tokens (and padding, where there is any) included"""
    pairs: int = 0
    """Sum of the squares of the rows' lengths, which attention costs"""
    supervised: int = 0


@dataclass(frozen=True)
class Costs:
    """Operations of forward and backward for one of each count of `Work`."""

    tile: float
    token: float
    pair: float
    supervised: float

    def total(self, work: Work) -> float:
        """Operations of this work."""
        counts = work.tiles, work.tokens, work.pairs, work.supervised
        return sum(cost * count for cost, count in zip(vars(self).values(), counts))

    def plus(self, times: int, other: Costs, base: Costs) -> Costs:
        """Add `times` the difference between two other costs."""
        triples = zip(vars(self).values(), vars(other).values(), vars(base).values())
        return Costs(*(cost + times * (a - b) for cost, a, b in triples))


def model_costs(config: Config, tune: Tune) -> Costs:
    """Operations of the model itself, nothing computed twice or left out by an implementation: the basis of MFU."""
    return costs(config, TrainSetup(tune, attention="eager", efficient=False), chunk=2**30)


def forward_costs(config: Config, setup: TrainSetup) -> Costs:
    """Operations of a forward of the plain model alone: of the reference in preference tuning."""
    plain = Tune(vision_model="frozen", mlp1="full", language_model="frozen")  # without a LoRA; something has to train
    return costs(config, replace(setup, tune=plain), backward=False)


def costs(
    config: Config, setup: TrainSetup, supervised: int = CHUNK, chunk: int = CHUNK, backward: bool = True
) -> Costs:
    """Operations of this program's step, with those that backward computes again.

    `supervised`: supervised tokens of a micro-batch; above `chunk` most of their logits are computed again.
    `backward`: False for a forward alone.
    """
    what_computes = ("tune", "attention", "efficient", "vision_checkpointing", "language_checkpointing")
    setup = TrainSetup(**{name: getattr(setup, name) for name in what_computes})
    key = repr((config, setup, supervised, chunk, backward))
    if key not in _COUNTED:
        _COUNTED[key] = _costs(config, setup, supervised, partial(counted, chunk=chunk, backward=backward))
    return _COUNTED[key]


_COUNTED: dict[str, Costs] = {}
"""Costs that were counted in this process, by what they were asked for: a plan asks several times"""


def _costs(config: Config, setup: TrainSetup, supervised: int, count: Callable[..., list[int]]) -> Costs:
    def shallow(tower: int, llm: int, last: int | None = None) -> InternVL:
        tune = setup.tune if last is None else replace(setup.tune, vision_model=Blocks(last))
        return shallow_copy(config, replace(setup, tune=tune), (tower, llm))

    tower, llm, mode = used_depth(config), config.llm["num_hidden_layers"], setup.tune.vision_model
    few = min(2, llm)
    if isinstance(mode, Blocks):
        base = shallow(2, few, 1)  # a block that is frozen, and one that trains
        deeper = [(mode.last - 1, shallow(3, few, 2)), (tower - mode.last - 1, shallow(3, few, 1))]
        deeper.append((llm - few, shallow(2, few + 1, 1)))
    else:
        first = min(2, tower)
        base = shallow(first, few)
        deeper = [(tower - first, shallow(first + 1, few)), (llm - few, shallow(first, few + 1))]
    targets = count(base, BatchShape(1, TOKENS, 1, supervised))
    fixed = count(base, BatchShape(1, TOKENS, 1, 0))
    total = replace(_by_unit(fixed), supervised=(sum(targets) - sum(fixed)) / supervised)
    for blocks, model in deeper:
        if blocks:
            total = total.plus(blocks, _by_unit(count(model, BatchShape(1, TOKENS, 1, 0))), _by_unit(fixed))
    return total


TOKENS = 1_000_003
"""Tokens of the row that is counted: a prime, which divides no width of a layer, so a product that it divides is one of
tokens, and one that its square divides is one of pairs"""


def _by_unit(products: list[int]) -> Costs:
    """Costs by the operations of each product of a row of one tile, nothing supervised."""
    pairs = [n for n in products if n % TOKENS**2 == 0]
    tokens = [n for n in products if n % TOKENS == 0 and n % TOKENS**2]
    tiles = [n for n in products if n % TOKENS]
    return Costs(sum(tiles), sum(tokens) / TOKENS, sum(pairs) / TOKENS**2, 0)


def counted(model: InternVL, micro: BatchShape, chunk: int = CHUNK, backward: bool = True) -> list[int]:
    """Operations of each matrix product in a forward and a backward of a model on the meta device."""
    products: list[int] = []

    def recorded(formula: Any) -> Any:
        def record(*args: Any, **kwargs: Any) -> int:
            products.append(formula(*args, **kwargs))
            return products[-1]

        record._get_raw = True  # type: ignore[attr-defined]  # as torch marks formulas that are given tensors
        return record

    known = flop_registry | {operator: shape_wrapper(formula) for operator, formula in FORMULAS.items()}
    formulas = {operator: recorded(formula) for operator, formula in known.items()}
    with _without_numbers(model), FlopCounterMode(display=False, custom_mapping=formulas):
        with torch.set_grad_enabled(backward):
            loss = model(**batch_of(model, micro), loss_chunk=chunk).loss_sum
        assert loss is not None, "the batch has labels"
        if backward:
            loss.backward()
    return products


@contextmanager
def _without_numbers(model: InternVL) -> Iterator[None]:
    """Context of tensors that have shapes alone: of a CPU, whose fused attention is a product of its own, or meta."""
    if model.language_model.config.attention == "eager":
        with torch.device("meta"):
            yield
    else:
        with FakeTensorMode(), faked(model):
            yield


# -- kernels that torch's counter does not know ---------------------------------------------------------------------


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, *_by_head(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, *_by_head(query, key, value))


def _by_head(query: Any, *groups: Any) -> list[Any]:
    """Shapes of keys and values once for each head of queries: before torch 2.13 its formulas know no groups."""
    return [(shape[0], query[1], *shape[2:]) for shape in groups]


def _product(added: Any, left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


aten = torch.ops.aten
FORMULAS = {
    aten.addmm_: _product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""The fused attention of a CPU, and products added in place; by torch's own formulas"""
