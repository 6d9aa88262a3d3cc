"""LightningDataModule: files of rows → DataLoaders of fit, validate, test and predict.

Lengths are read first; every rank then gets the same work, and the position among the rows can be saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from ivl.data.cache import default_cache
from ivl.data.index.index import Index, answers_needed, concat, drop_unusable, write_report
from ivl.data.learnt_turns import check_pairs
from ivl.data.media.feature_store import FeatureStore
from ivl.data.packing.samplers import GroupedBatches, PackedBatches
from ivl.data.packing.sections import SECTION, RowCosts
from ivl.data.process_group import all_processes
from ivl.data.processor import Processor
from ivl.data.sets.dataset import Mixture, RowDataset, split
from ivl.data.sets.holdout import open_split, remember
from ivl.data.sets.sources import open_rows, open_sources
from ivl.lit.callbacks.row_report import index_rows, report_changed, report_left_out, report_unread
from ivl.lit.loaders import (
    Pace,
    RankRows,
    ResumableLoader,
    ValidationRows,
    WorkerLoader,
    data_rank,
    make_loader,
    validation_batch,
)
from ivl.lit.prediction.benchmark import rows_file
from ivl.lit.prediction.prompts import PromptGroups, Prompts, processor_of_prompts, report_prompts
from ivl.lit.run.position import micro_batches_pending
from ivl.lit.training.feature_cache import bytes_needed_by, open_store, read_features
from ivl.lit.training.row_costs import row_costs
from ivl.lit.types import as_lit
from ivl.options import DataOptions, Tune
from ivl.run import Run
from ivl.types import UserError


class IvlData(LightningDataModule):
    """Rows from files, made into batches by the checkpoint's own processor.

    Args:
        pretrained: Checkpoint whose tokenizer, template and tiling are used (linked to model.pretrained).
    """

    trainer: Trainer

    def __init__(self, pretrained: str, **options: Any) -> None:
        """`options`: those of `ivl.options.DataOptions`."""
        super().__init__()
        self.options = DataOptions(**options)
        self.processor = Processor.load(pretrained, self.options)
        self._rows: dict[str, RowDataset] = {}
        self._train: tuple[Mixture, Index] | None = None
        self._packs: dict[tuple, PackedBatches] = {}
        self.feature_store: FeatureStore | None = None
        self.answered: set[int] = set()
        """Indices of rows to predict whose answers are on disk already"""

    # -- rows ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage != "predict" and getattr(getattr(self.trainer, "lightning_module", None), "learns_pairs", False):
            self.learn_pairs()
        else:
            self.processor.pairs = False
        # Files are read before the model is loaded, so that a mistake in them costs nothing.
        if stage == "fit":
            self._set_up_training()
            folder = self.trainer.log_dir  # asks all ranks
            if "val" in self._rows and not self.options.val and folder and self.trainer.is_global_zero:
                remember(folder, self._rows["val"], self.options.seed)
        elif stage == "predict":
            self._set_up_prediction()
        else:
            self.rows({"validate": "val"}.get(stage, stage))

    def learn_pairs(self) -> None:
        """Take rows for pairs of answers, and give packs room for both."""
        check_pairs(self.options.learn)
        self.processor.pairs = True
        if self.options.pack_tokens is None and self.options.max_length:
            self.options = replace(self.options, pack_tokens=2 * self.options.max_length)

    def rows(self, name: str) -> RowDataset:
        """Return the rows of val, test or predict, in order. Raises UserError without a file."""
        options = self.options
        if name not in self._rows:
            if name == "val" and options.val_fraction and not options.val:
                self._set_up_training()
                return self._rows["val"]
            files, processor = getattr(options, name), self.processor
            if name == "predict":
                generation = as_lit(self.trainer.lightning_module).generation
                processor = processor_of_prompts(processor, options.max_prompt_length, generation.max_new_tokens)
                typed = [f"--data.{option}" for option in ("predict", "split", "task") if getattr(options, option)]
                if len(typed) > 1:
                    raise UserError(f"{' and '.join(typed)}: expected one of them, found both; set the other to null")
                files = str(rows_file(options.task, options.task_root)) if options.task else files
            if name == "predict" and options.split:
                run = Run(Path(options.split))
                if split_file := run.split_file:
                    self._rows[name] = open_split(split_file, processor, options.media_root, options.file_limits)
                    return self._rows[name]
                files = run.validation_files
            if not files:
                raise UserError(f"--data.{name}: not given; expected one or more files of rows (jsonl or json)")
            places: dict[str, Any] = {"root": options.media_root, "seed": options.seed, "limits": options.file_limits}
            self._rows[name] = open_rows(files, processor, columns=options.columns, **places)
        return self._rows[name]

    def rows_of(self, stage: str) -> list[RowDataset]:
        """Rows that fit, validate or test reads: of fit those of each source, and the held-out ones."""
        if stage != "fit":
            return [self.rows({"validate": "val"}.get(stage, stage))]
        held_out = [self.rows("val")] if self.options.holds_out and self.trainer.limit_val_batches else []
        return [*(part.rows for part in self.training[0].parts), *held_out]

    def _set_up_training(self) -> None:
        if self._train is not None:
            return
        data = self.options
        sources = [value for value in (data.train, data.mixture) if value]
        if len(sources) != 1:
            count = "both" if sources else "neither"
            raise UserError(f"--data.train: expected files of rows here or sources in --data.mixture, found {count}")
        options = {
            "on_error": data.on_error,
            "seed": data.seed,
            "limits": data.file_limits,
            "columns": data.columns,
        }
        parts = open_sources(sources[0], self.processor, data.media_root, **options)
        if data.val_fraction and not data.val:
            if len(parts) > 1:
                raise UserError("--data.val_fraction: works with one training file; give files to --data.val instead")
            train_rows, self._rows["val"] = split(parts[0].rows, data.val_fraction, data.seed)
            parts = [replace(parts[0], rows=train_rows)]
        elif data.val:
            self.rows("val")
        with all_processes() as group:
            read = [index_rows(part.rows, part.name, group, data.probe_urls) for part in parts]
        checked, indexes = [answers_needed(part.rows, index) for part, index in zip(parts, read)], []
        full_index = concat(checked)
        if data.report and self.trainer.is_global_zero:
            write_report(data.report, full_index)
        for n, part in enumerate(parts):
            cache = default_cache()
            rows, index = drop_unusable(part.rows, checked[n], data.max_bad, data.report, written=True, cache=cache)
            parts[n] = replace(part, rows=rows)
            indexes.append(index)
        mixture, index = Mixture(parts, data.seed), concat(indexes)
        index.share(default_cache())
        report_left_out(full_index, data.report)
        report_changed(full_index)
        report_unread(index, mixture.where)
        if len(parts) > 1:
            rank_zero_info(mixture.describe())
        self._train = mixture, index

    def _set_up_prediction(self) -> None:
        rows = self.rows("predict")
        rows = self._rows["predict"] = rows.select(None)
        rows.as_prompt = True
        with all_processes() as group:
            index = index_rows(rows, "questions", group)
        report_prompts(index, keep_errors=self.options.on_error == "skip")
        report_unread(index, rows.where)
        # Long rows first: rows of like length are answered together, and none is left over at the end.
        self._order = np.argsort(-index.tokens, kind="stable")

    @property
    def training(self) -> tuple[Mixture, Index]:
        """Training rows and their index, after `setup`."""
        assert self._train is not None, "setup comes first"
        return self._train

    def training_index(self) -> Index:
        """Lengths of the training rows."""
        self._set_up_training()
        return self.training[1]

    def fingerprints(self) -> tuple[dict[str, str], dict[str, int]]:
        """Map each file of training and held-out rows to a digest of its contents, and to its number of rows."""
        parts = [part.rows for part in self._train[0].parts] if self._train else []
        files = {file.name: file for rows in (*parts, *self._rows.values()) for file in rows.files}
        return {path: file.digest for path, file in files.items()}, {path: len(file) for path, file in files.items()}

    # -- batches -------------------------------------------------------------------------------------------------

    def total_steps(self) -> int:
        """Optimizer steps of the whole run, for the schedule."""
        trainer = self.trainer
        if trainer.max_steps > 0:
            return trainer.max_steps
        return self._epochs() * self._steps(self.batches_of_epoch())

    def batches_of_epoch(self) -> int:
        """Number of batches of this process in a training epoch."""
        return self._limited(len(self._train_batches()))

    def _limited(self, batches: int) -> int:
        limit = self.trainer.limit_train_batches
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    def _steps(self, batches: int) -> int:
        return math.ceil(batches / self.trainer.accumulate_grad_batches)

    def _epochs(self) -> int:
        """Most epochs of the run; 1 where the trainer has no limit."""
        return max(1, self.trainer.max_epochs or 1)

    def _train_batches(self) -> PackedBatches | GroupedBatches:
        mixture, index = self.training
        rank, ranks = data_rank(self.trainer)
        data = self.options
        order = mixture.order if data.shuffle else lambda epoch: np.arange(len(mixture))
        common: dict[str, Any] = {"order": order, "seed": data.seed, "rank": rank, "ranks": ranks}
        common |= {"costs": self._row_costs(ranks), "supervised": index.supervised}
        common["cache"] = default_cache()
        # Parts of an unshuffled epoch say nothing of the others: it is planned as a whole.
        common |= {"section": SECTION if data.shuffle else len(mixture)}
        if data.is_packed:
            key = rank, ranks, common["costs"]
            if key not in self._packs:
                most = data.tokens_per_pack, data.pack_tiles
                self._packs[key] = PackedBatches(
                    index.tokens, index.tiles, *most, same_rows=mixture.same_rows, **common
                )
            packs, epochs = self._packs[key], self._epochs()
            if self.trainer.max_steps > 0:  # whichever of the two limits comes first
                needed = math.ceil(self.trainer.max_steps / max(1, self._steps(self._limited(len(packs)))))
                epochs = needed if epochs == 1 else min(epochs, needed)
            longer = self._packs.setdefault((*key, epochs), packs.fresh(epochs))
            len(longer)  # counted once
            return longer.fresh()
        window = 64 if data.group_by_length else 1
        return GroupedBatches(index.tokens, index.tiles, data.rows_per_batch, window=window, **common)

    def _row_costs(self, ranks: int) -> RowCosts | None:
        """Costs of rows by which the batches of a step are chosen; one rank waits for none."""
        tune = getattr(getattr(self.trainer, "lightning_module", None), "tune", None)
        if ranks == 1 or not isinstance(tune, Tune):
            return None
        return row_costs(self.processor.config, tune, bool(self.options.feature_cache))

    def _open_feature_store(self, folder: str) -> None:
        """Open the feature cache for training rows. Held-out rows are few, and are answered from their pixels."""
        lit, (mixture, index) = as_lit(self.trainer.lightning_module), self.training
        model = lit.model
        limit = int(self.options.feature_cache_gb * 1e9)
        self.feature_store = lit.feature_store = open_store(folder, limit, model, self.trainer)
        read_features(mixture, self.processor, self.feature_store)
        need = bytes_needed_by(index, self.processor.config, model)
        rank_zero_info(
            f"feature cache: at most {need / 1e9:.3g} GB for {index.tiles.sum()} tiles in {folder}, "
            f"limit {self.options.feature_cache_gb:g} GB"
        )

    def train_dataloader(self) -> DataLoader:
        if self.options.feature_cache and self.feature_store is None:
            self._open_feature_store(self.options.feature_cache)
        collate = partial(self.processor.collate, packed=self.options.is_packed)
        batches = self._train_batches()
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        batches.set_epoch(epochs.processed)  # a resumed run begins here
        loader = self._loader(self.training[0], batches, collate, paced=True)
        batches.background = loader.num_workers > 0
        loader.used = self._used
        return loader

    def _used(self) -> tuple[int, int]:
        """Epoch and number of its batches whose optimizer steps are done."""
        loop: Any = self.trainer.fit_loop
        done, epoch = loop.epoch_loop.batch_progress.current.processed, loop.epoch_progress.current.processed
        done -= micro_batches_pending(self.trainer)
        return (epoch, done) if done < loop.max_batches else (epoch + 1, 0)

    def val_dataloader(self) -> DataLoader | list:
        if not self.options.holds_out:
            return []
        return self._eval_loader("val", validation_batch)

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader("test", validation_batch)

    def predict_dataloader(self) -> PromptGroups:
        """Prompts of this process that are not answered yet."""
        todo = [int(n) for n in self._order if n not in self.answered]
        indices = todo[self.trainer.global_rank :: self.trainer.world_size]
        prompts = Prompts(self.rows("predict"), keep_errors=self.options.on_error == "skip")
        loader = WorkerLoader(prompts, batch_size=None, sampler=indices, num_workers=self._pace().workers)
        return PromptGroups(loader, len(indices))

    def predict_indices(self) -> range:
        """Indices of all rows of a complete prediction."""
        return range(len(self.rows("predict")))

    def _eval_loader(self, name: str, collate: Callable) -> DataLoader:
        rows = self.rows(name)
        batches = RankRows(len(rows), self.options.eval_rows_per_batch, *data_rank(self.trainer))
        return self._loader(ValidationRows(rows), batches, partial(collate, self.processor))

    def _pace(self) -> Pace:
        return Pace.of(self.options.num_workers, self.trainer.num_devices)

    def _loader(self, dataset: Dataset, batches: Any, collate: Callable, paced: bool = False) -> ResumableLoader:
        return make_loader(dataset, batches, collate, self._pace(), paced)
