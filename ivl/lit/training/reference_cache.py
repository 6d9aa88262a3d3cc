"""Reference cache in training: log-probabilities of pairs by the untouched model, computed once before the first step.

They are kept on disk. So a run that trains more than a LoRA needs no second model, and no second pass at each step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import Dataset
from tqdm import tqdm

import ivl
from ivl.checkpoint.fingerprint import fingerprint
from ivl.data.index import index_build as indexing
from ivl.data.index.index import Index
from ivl.data.packing.packing import fill_packs
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.data.sets.reference_store import ReferenceStore, indexed
from ivl.data.worker_loader import WorkerLoader
from ivl.finetune.reference import evaluating
from ivl.lit.loaders import Pace, data_rank
from ivl.lit.strategies.deepspeed import is_zero
from ivl.lit.training.out_of_memory import memory_advice, out_of_memory
from ivl.lit.types import RunData, RunModule, data_of
from ivl.options import DataOptions
from ivl.types import Batch, Example, UserError

_FORMAT = 1
_SAVED_EVERY = 60.0
"""Seconds of work that an interruption costs at most"""


def store_references(lit: RunModule, is_fresh: bool) -> None:
    """Give each pair of a run's rows its log-probabilities by the model as it is, computed where the disk has none.

    All processes call it together, before anything trains. `is_fresh`: the adapter, if any, changes nothing yet.
    Raises UserError where they cannot be computed in advance.
    """
    check_strategy(lit.trainer.strategy)
    if (data := data_of(lit.trainer)) is None:
        return  # batches of a loader of the user's own bring them
    if data.options.video.sample == "random":
        raise UserError(
            "data.video.sample: random takes other frames in each epoch, but the reference's log-probabilities are "
            "computed once; expected middle, or a LoRA alone in model.tune"
        )
    store = ReferenceStore(_model_name(lit, data, is_fresh))
    for rows in data.rows_of(str(getattr(lit.trainer.state.fn, "value", "fit"))):
        rows.references = _references(lit, data, rows, store)


def check_strategy(strategy: Strategy) -> None:
    """Raise UserError for a strategy under which the model is not in its place before the optimizer is there."""
    placed = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy))
    if not placed or is_zero(strategy, 3):
        raise UserError(
            f"model.objective: {type(strategy).__name__} splits the model after the reference's log-probabilities are "
            "due; expected trainer.strategy ddp, fsdp2 (configs/strategy/fsdp2.yaml) or DeepSpeed's stage 2, or a LoRA "
            "alone in model.tune"
        )


def _model_name(lit: RunModule, data: RunData, is_fresh: bool) -> str:
    """Name of the model and of all settings that decide its log-probabilities."""
    settings = (_FORMAT, ivl.__version__, str(lit.trainer.precision), lit.quantize, lit.attention == "eager")
    named = [(name, tensor) for name, tensor in lit.model.state_dict().items() if not (is_fresh and "lora_" in name)]
    named = [(name.replace(".base_layer", ""), tensor) for name, tensor in named]
    rows = indexing.fingerprint(data.processor)
    return fingerprint([*named, (repr((settings, rows)), torch.zeros(0))])


def _references(lit: RunModule, data: RunData, rows: RowDataset, store: ReferenceStore) -> np.ndarray:
    """Numbers of all pairs, (rows, 2), equal in all processes."""
    keys, index = indexed(rows, data.options.probe_urls)
    numbers = _united(store.read(keys), lit)
    missing = np.flatnonzero(np.isnan(numbers).any(1))
    found = f"{len(rows) - len(missing)} of {len(rows)} pairs of {rows.source or rows.files[0].path.name}"
    rank_zero_info(f"reference: log-probabilities of {found} are in {store.folder}")
    if not len(missing):
        return numbers
    _compute(lit, data, rows, index, missing, numbers, lambda new: store.add(keys[new], numbers[new]))
    return _united(numbers, lit)


def _united(numbers: np.ndarray, lit: RunModule) -> np.ndarray:
    """Numbers that any process has; NaN where none has one."""
    if lit.trainer.world_size == 1:
        return numbers
    values = torch.from_numpy(np.where(np.isnan(numbers), -np.inf, numbers)).to(lit.model.device)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    united = values.cpu().numpy()
    return np.where(np.isneginf(united), np.nan, united).astype(np.float32)


def _compute(
    lit: RunModule,
    data: RunData,
    rows: RowDataset,
    index: Index,
    missing: np.ndarray,
    numbers: np.ndarray,
    save: Callable[[list[int]], None],
) -> None:
    """Fill in this process's share of the missing numbers; `save` is called with rows that have theirs."""
    trainer, model, options = lit.trainer, lit.model, data.options
    batches = share(_batches(index, missing, options), *data_rank(trainer))
    loader = WorkerLoader(
        _NumberedPairs(rows),
        batch_sampler=batches,
        collate_fn=partial(_numbered_batch, data.processor, options.is_packed),
        num_workers=Pace.of(options.num_workers, trainer.num_devices).workers,
        generator=torch.Generator(),
    )
    hidden = None if trainer.is_global_zero else True  # None: hidden where there is no terminal
    total, new, saved = sum(map(len, batches)), list[int](), time.monotonic()
    try:
        # On the CPU, where Lightning would let the loader's tensors begin on the device
        with torch.device("cpu"), _pass(lit), tqdm(total=total, desc="reference", unit="pair", disable=hidden) as bar:
            for group, batch in loader:
                with out_of_memory(batch, memory_advice(trainer), "the reference's pass"):
                    losses = model(**batch.to(model.device)).row_losses
                numbers[group] = losses.view(-1, 2).float().cpu().numpy()
                new += group
                bar.update(len(group))
                if time.monotonic() > saved + _SAVED_EVERY:
                    save(new)
                    new, saved = [], time.monotonic()
    finally:
        save(new)


@contextmanager
def _pass(lit: RunModule) -> Iterator[None]:
    """Context of the reference's pass: as in training, without gradients, dropout and noise."""
    trainer: Trainer = lit.trainer
    with evaluating(lit.model), torch.no_grad(), trainer.precision_plugin.forward_context():
        yield
    if isinstance(trainer.strategy, ModelParallelStrategy):
        from ivl.parallel.fsdp import reshard  # peft takes seconds to import

        reshard(lit.model)


def _batches(index: Index, missing: np.ndarray, options: DataOptions) -> list[list[int]]:
    """Batches of rows of like length, largest first: what does not fit into memory shows at once."""
    tokens, tiles = index.tokens[missing].astype(int), index.tiles[missing].astype(int)
    order = np.argsort(-tokens, kind="stable")
    size = options.rows_per_batch
    groups = [order[start : start + size].tolist() for start in range(0, len(order), size)]
    if options.is_packed:
        most, most_tiles = options.tokens_per_pack, options.pack_tiles
        clipped = tiles if most_tiles is None else tiles.clip(max=most_tiles)  # held-out rows may be longer than a pack
        groups = fill_packs(tokens.clip(max=most), clipped, most, most_tiles)
        groups.sort(key=lambda group: -int(tokens[group].sum()))
    return [missing[group].tolist() for group in groups]


def share(batches: list[list[int]], rank: int, ranks: int) -> list[list[int]]:
    """Batches of a rank. All have equally many: under a strategy that splits the model all compute together."""
    own = batches[rank::ranks]
    return own + batches[:1] * (math.ceil(len(batches) / ranks) - len(own))


class _NumberedPairs(Dataset):
    """Pairs with their numbers; a pair that cannot be read is left out where the rows' `on_error` is skip."""

    def __init__(self, rows: RowDataset) -> None:
        self.rows = rows

    def __getitems__(self, numbers: list[int]) -> list[tuple[int, Example]]:
        pairs, reason = [], ""
        for number in numbers:
            try:
                example = self.rows[number]
                if example.rejected is None:
                    raise UserError(f"{self.rows.where(number)}: the row has no answers to compare")
                pairs.append((number, example))
            except UserError as error:
                if self.rows.on_error == "error":
                    raise
                reason = reason or str(error)
        if not pairs:
            raise UserError(f"{reason} (no row of this batch of {len(numbers)} could be made)")
        return pairs


def _numbered_batch(processor: Processor, packed: bool, pairs: list[tuple[int, Example]]) -> tuple[list[int], Batch]:
    numbers, examples = zip(*pairs)
    return list(numbers), processor.collate(examples, packed=packed)
