"""Types of Lightning's objects for annotations: what callbacks, strategies and the two modules use of one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer

from ivl.data.index.index import Index
from ivl.data.media.feature_store import FeatureStore
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.lit.prediction.prediction_rows import Row
from ivl.model.internvl import InternVL
from ivl.options import Batching, DataOptions, GenerationOptions, Tune


class IvlTrainer(Trainer):
    """Trainer with the attributes that Lightning sets and does not declare; for annotations, never instantiated."""

    callbacks: list[Callback]
    log_every_n_steps: int


class RunModule(Protocol):
    """`ivl.lit.module.LitInternVL`."""

    trainer: IvlTrainer
    model: InternVL
    pretrained: str
    tune: Tune
    adapter: str | None
    dtype_name: Any
    quantize: Any
    attention: Any
    checkpointing: Any
    efficient: bool
    compiled: bool
    loss_reduction: Any
    label_smoothing: float
    learns_pairs: bool
    make_optimizer: Callable
    generation: GenerationOptions
    batching: Batching
    metrics: list[Any]
    total_steps: int
    feature_store: FeatureStore | None
    answers: list[dict[str, Any]]
    """Answers of the last validation"""
    pairs: list[Any]
    """Pairs of the last validation, with the log-probabilities of their answers"""
    on_rows: Callable[[list[Row]], None] | None
    """Receiver of predicted rows as they end"""


@runtime_checkable
class RunData(Protocol):
    """`ivl.lit.datamodule.IvlData`."""

    processor: Processor
    options: DataOptions
    answered: set[int]
    """Indices of rows to predict whose answers are on disk already"""

    def rows(self, name: str) -> RowDataset: ...
    def rows_of(self, stage: str) -> list[RowDataset]: ...
    def training_index(self) -> Index: ...
    def total_steps(self) -> int: ...
    def batches_of_epoch(self) -> int: ...
    def predict_indices(self) -> range: ...
    def fingerprints(self) -> tuple[dict[str, str], dict[str, int]]: ...


def as_lit(module: LightningModule | None) -> RunModule:
    """Cast the module of a callback."""
    return cast("RunModule", module)


def data_of(trainer: Trainer) -> RunData | None:
    """Return the data module of a run; None where its rows come from loaders of the user's own."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, RunData) else None


def as_data(trainer: Trainer) -> RunData:
    """Cast the data module of a run by the command line."""
    return cast("RunData", getattr(trainer, "datamodule", None))
