"""LightningDataModule: files of rows → DataLoaders of fit, validate, test and predict.

Lengths are read first; every rank then gets the same work, and the position among the rows can be saved.
Long: __init__, since each option of the command line is an argument with its type and default.
Long: datamodule, since their help stands here as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from ivl.data.media.feature_store import FeatureStore, bytes_needed
from ivl.data.media.load import MediaPolicy
from ivl.data.media.tiler import VideoOptions
from ivl.data.processor import Processor
from ivl.data.rows.row_file import FileLimits
from ivl.data.sets.dataset import Mixture, RowDataset, split
from ivl.data.sets.holdout import held_out, remember
from ivl.data.sets.index import Index, answers_needed, concat, drop_unusable, write_report
from ivl.data.sets.samplers import GroupedBatches, PackedBatches
from ivl.data.sets.sources import Source, open_sources
from ivl.lit.benchmark import rows_file
from ivl.lit.callbacks.row_report import index_rows, report_changed, report_left_out, report_unread
from ivl.lit.feature_cache import open_store
from ivl.lit.loaders import (
    Pace,
    PacedLoader,
    RankRows,
    ResumableLoader,
    ValidationRows,
    WorkerLoader,
    data_rank,
    validation_batch,
)
from ivl.lit.prompts import PromptGroups, Prompts, processor_of_prompts, report_prompts
from ivl.lit.run.position import micro_batches_pending
from ivl.lit.types import as_lit
from ivl.types import UserError


class IvlData(LightningDataModule):
    """Rows from files, made into batches by the checkpoint's own processor.

    Args:
        pretrained: Checkpoint whose tokenizer, template and tiling are used (linked to model.pretrained).
        train: Training rows: files, folders, OpenGVLab meta files, or names of data sets; NAME#N takes N rows.
        mixture: Several sources of training rows, each with its share of an epoch, instead of `train`.
        val: Files of held-out rows: loss and answers.
        val_fraction: Hold out this share of the training rows where `val` is not given.
        test: Files for `test`.
        predict: Files for `predict`; rows need no response.
        split: Rows for `predict` instead of files: `run-validation` takes those that the run of `--ckpt_path` held out
            (its `val`, or its share by `val_fraction`); a run's folder takes that run's.
        task: A benchmark to answer instead (`score` has the list). Its tiles, lengths and greedy decoding come with it,
            save what is typed on the command line.
        task_root: Folder of the benchmark's official files.
        media_root: Where relative media paths start. Default: the folder of the file they stand in.
        batch_size: Rows per batch and process, where rows are not packed. Default: 8.
        eval_batch_size: Rows per batch and process in validation. Default: batch_size.
        packing: Rows follow one another in sequences of at most pack_tokens, instead of being padded to the longest of
            a batch. Default: yes, unless batch_size or group_by_length says how to pad.
        pack_tokens: Most tokens of a pack. Default: max_length.
        pack_tiles: Most tiles of a pack. Default: no limit.
        group_by_length: Batches that are padded hold rows of like length.
        max_length: Most tokens of a row, image tokens included; of fit, validate and test.
        max_prompt_length: Most tokens of a prompt in predict, where a typed --data.max_length means it too. Default:
            the model's context.
        max_tiles: Most tiles of an image, thumbnail not counted. Default: the checkpoint's.
        share_tiles: Divide max_tiles by the number of images of a row, as the official trainer does; `chat` does not.
        dynamic_image_size: false makes one tile of each image. Default: as the checkpoint says.
        pad2square: Pad an image of one tile to a square, instead of stretching it. Default: as the checkpoint says.
        on_too_long: Treatment of a row above its limit: fit lowers tiles, largest image first, then drops the
            oldest turns; truncate_text cuts the end; drop leaves the row out; error stops.
        on_error: A row that cannot be used stops the run, or is skipped: in training it is left out and listed in
            `report`; in prediction its line says the error instead of an answer.
        max_bad: Largest share of rows that may be skipped.
        report: File that lists the training rows that were left out, and why.
        video: Sampling of frames from videos.
        media: Limits of what is opened and fetched: pixels, frames, times, sizes, addresses.
        file_limits: Limits of files of rows: bytes of a row, and what a compressed file may become.
        probe_urls: Fetch media behind URLs before training, so that their sizes are known; otherwise they count with
            the most tiles they can have, and are fetched when their turn comes.
        resize: exact makes the reference's pixels; fast takes about half the time, and a pixel in some hundreds is a
            level off.
        exif: Turn pictures upright as their EXIF block says; false: as stored, like the reference.
        compact_boxes: Write boxes as `<box>[[...]]</box>`, not as `<box> [[...]] </box>`.
        system_message: For rows without one, instead of the checkpoint's: a text, `none` for no system turn, or `r1`
            for the thinking prompt of InternVL3.5.
        thinking: true begins each answer to a prompt with a thought, false with an empty one. Default: as the
            checkpoint says.
        shuffle: A new order of the training rows in each epoch; false: as they stand, for a curriculum.
        feature_cache: Folder that keeps what a frozen vision encoder makes of each image, for later epochs and runs.
        feature_cache_gb: Most disk of that folder, in gigabytes.
        num_workers: Loader processes. Default: at most four, and in training more where rows are waited for, up to one
            less than a process has cores.
        seed: Seed of the order of rows and of random choices inside them.
    """

    trainer: Trainer

    def __init__(
        self,
        pretrained: str,
        train: str | list[str] | None = None,
        mixture: list[Source] | None = None,
        val: str | list[str] | None = None,
        val_fraction: float | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        split: str | None = None,
        task: str | None = None,
        task_root: str = "data",
        media_root: str | None = None,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
        packing: bool | None = None,
        pack_tokens: int | None = None,
        pack_tiles: int | None = None,
        group_by_length: bool = False,
        max_length: int = 4096,
        max_prompt_length: int | None = None,
        max_tiles: int | None = None,
        share_tiles: bool = False,
        dynamic_image_size: bool | None = None,
        pad2square: bool | None = None,
        on_too_long: Literal["fit", "truncate_text", "drop", "error"] = "fit",
        on_error: Literal["error", "skip"] = "error",
        max_bad: float = 0.05,
        report: str | None = None,
        video: VideoOptions = VideoOptions(),
        media: MediaPolicy = MediaPolicy(),
        file_limits: FileLimits = FileLimits(),
        probe_urls: bool = False,
        resize: Literal["exact", "fast"] = "exact",
        exif: bool = True,
        compact_boxes: bool = False,
        system_message: str | None = None,
        thinking: bool | None = None,
        shuffle: bool = True,
        feature_cache: str | None = None,
        feature_cache_gb: float = 100.0,
        num_workers: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.files = {"train": train, "val": val, "test": test, "predict": predict}
        self.mixture, self.val_fraction = mixture, val_fraction
        self.split, self.task, self.task_root = split, task, task_root
        self.media_root, self.max_prompt_length, self.file_limits = media_root, max_prompt_length, file_limits
        self.packing = is_packed(packing, batch_size, group_by_length)
        self.batch_size = batch_size or 8
        self.eval_batch_size = eval_batch_size or self.batch_size
        self.group_by_length = group_by_length
        self.pack_tokens, self.pack_tiles = pack_tokens or max_length, pack_tiles
        self.probe_urls = probe_urls
        self.on_error, self.max_bad, self.report = on_error, max_bad, report
        self.num_workers = num_workers
        self.shuffle, self.seed = shuffle, seed
        self.processor = Processor.from_pretrained(
            pretrained,
            max_tiles=max_tiles,
            share_tiles=share_tiles,
            dynamic_image_size=dynamic_image_size,
            pad2square=pad2square,
            max_length=max_length,
            on_too_long=on_too_long,
            video=video,
            exif=exif,
            resize=resize,
            policy=media,
            compact_boxes=compact_boxes,
            system_message=system_message,
            thinking=thinking,
        )
        self._rows: dict[str, RowDataset] = {}
        self._train: tuple[Mixture, Index] | None = None
        self.feature_cache, self.feature_cache_gb = feature_cache, feature_cache_gb
        self.feature_store: FeatureStore | None = None
        self.answered: set[int] = set()
        """Indices of rows to predict whose answers are on disk already"""

    # -- rows ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        # Files are read before the model is loaded, so that a mistake in them costs nothing.
        if stage == "fit":
            self._set_up_training()
            folder = self.trainer.log_dir  # asks all ranks
            if self.val_fraction and not self.files["val"] and folder and self.trainer.is_global_zero:
                remember(folder, self._rows["val"], self.seed)
        elif stage == "predict":
            self._set_up_prediction()
        else:
            self.rows({"validate": "val"}.get(stage, stage))

    def rows(self, name: str) -> RowDataset:
        """Return the rows of val, test or predict, in order. Raises UserError without a file."""
        if name not in self._rows:
            if name == "val" and self.val_fraction and not self.files["val"]:
                self._set_up_training()
                return self._rows["val"]
            files, processor = self.files[name], self.processor
            if name == "predict":
                generation = as_lit(self.trainer.lightning_module).generation
                processor = processor_of_prompts(processor, self.max_prompt_length, generation.max_new_tokens)
                options = {"predict": files, "split": self.split, "task": self.task}
                typed = [f"--data.{option}" for option, value in options.items() if value]
                if len(typed) > 1:
                    raise UserError(f"{' and '.join(typed)}: expected one of them, found both; set the other to null")
                files = str(rows_file(self.task, self.task_root)) if self.task else files
            if name == "predict" and self.split:
                self._rows[name] = held_out(self.split, processor, self.media_root, self.file_limits)
                return self._rows[name]
            if not files:
                raise UserError(f"--data.{name}: not given; expected one or more files of rows (jsonl or json)")
            limits = self.file_limits
            self._rows[name] = RowDataset(files, processor, root=self.media_root, seed=self.seed, limits=limits)
        return self._rows[name]

    def _set_up_training(self) -> None:
        if self._train is not None:
            return
        sources = [value for value in (self.files["train"], self.mixture) if value]
        if len(sources) != 1:
            count = "both" if sources else "neither"
            raise UserError(f"--data.train: expected files of rows here or sources in --data.mixture, found {count}")
        options = {"on_error": self.on_error, "seed": self.seed, "limits": self.file_limits}
        parts = open_sources(sources[0], self.processor, self.media_root, **options)
        if self.val_fraction and not self.files["val"]:
            if len(parts) > 1:
                raise UserError("--data.val_fraction: works with one training file; give files to --data.val instead")
            train_rows, self._rows["val"] = split(parts[0].rows, self.val_fraction, self.seed)
            parts = [replace(parts[0], rows=train_rows)]
        elif self.files["val"]:
            self.rows("val")
        read = [index_rows(part.rows, part.name, self.probe_urls) for part in parts]
        checked, indexes = [answers_needed(part.rows, index) for part, index in zip(parts, read)], []
        full_index = concat(checked)
        if self.report and self.trainer.is_global_zero:
            write_report(self.report, full_index)
        for n, part in enumerate(parts):
            rows, index = drop_unusable(part.rows, checked[n], self.max_bad, self.report, written=True)
            parts[n] = replace(part, rows=rows)
            indexes.append(index)
        mixture, index = Mixture(parts, self.seed), concat(indexes)
        report_left_out(full_index, self.report)
        report_changed(full_index)
        report_unread(index, mixture.where)
        if len(parts) > 1:
            rank_zero_info(mixture.describe())
        self._train = mixture, index

    def _set_up_prediction(self) -> None:
        rows = self.rows("predict")
        rows = self._rows["predict"] = rows.select(np.arange(len(rows)))
        rows.as_prompt = True
        index = index_rows(rows, "questions")
        report_prompts(index, keep_errors=self.on_error == "skip")
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

    def fingerprints(self) -> dict[str, str]:
        """Map each file of training and held-out rows to a digest of its contents."""
        parts = [part.rows for part in self._train[0].parts] if self._train else []
        return {str(file.path): file.digest for rows in (*parts, *self._rows.values()) for file in rows.files}

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
        order = mixture.order if self.shuffle else lambda epoch: np.arange(len(mixture))
        common: dict[str, Any] = {"order": order, "seed": self.seed, "rank": rank, "ranks": ranks}
        if self.packing:
            packs = partial(PackedBatches, index.tokens, index.tiles, self.pack_tokens, self.pack_tiles, **common)
            epochs = self._epochs()
            if self.trainer.max_steps > 0:  # whichever of the two limits comes first
                needed = math.ceil(self.trainer.max_steps / max(1, self._steps(self._limited(len(packs())))))
                epochs = needed if epochs == 1 else min(epochs, needed)
            return packs(epochs=epochs)
        window = 64 if self.group_by_length else 1
        return GroupedBatches(index.tokens, index.tiles, self.batch_size, window=window, **common)

    def _open_feature_store(self, folder: str) -> None:
        """Open the feature cache for training rows. Held-out rows are few, and are answered from their pixels."""
        lit, (mixture, index) = as_lit(self.trainer.lightning_module), self.training
        model = lit.model
        limit = int(self.feature_cache_gb * 1e9)
        self.feature_store = lit.feature_store = open_store(folder, limit, model, self.trainer)
        processor = copy(self.processor)
        processor.features = self.feature_store
        for n, part in enumerate(mixture.parts):
            rows = part.rows.select(np.arange(len(part.rows)))
            rows.processor = processor
            mixture.parts[n] = replace(part, rows=rows)
        config = self.processor.config
        width = model.language_model.config.hidden_size if model.features_projected else config.projector_width
        need = bytes_needed(config, int(index.tiles.sum()), width, model.dtype.itemsize)
        rank_zero_info(
            f"feature cache: at most {need / 1e9:.3g} GB for {index.tiles.sum()} tiles in {folder}, "
            f"limit {self.feature_cache_gb:g} GB"
        )

    def train_dataloader(self) -> DataLoader:
        if self.feature_cache and self.feature_store is None:
            self._open_feature_store(self.feature_cache)
        collate = partial(self.processor.collate, packed=self.packing)
        batches = self._train_batches()
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        batches.set_epoch(epochs.processed)  # a resumed run begins here
        loader = self._loader(self.training[0], batches, collate, paced=True)
        loader.used = self._used
        return loader

    def _used(self) -> tuple[int, int]:
        """Epoch and number of its batches whose optimizer steps are done."""
        loop: Any = self.trainer.fit_loop
        done, epoch = loop.epoch_loop.batch_progress.current.processed, loop.epoch_progress.current.processed
        done -= micro_batches_pending(self.trainer)
        return (epoch, done) if done < loop.max_batches else (epoch + 1, 0)

    def val_dataloader(self) -> DataLoader | list:
        if not self.files["val"] and not self.val_fraction:
            return []
        return self._eval_loader("val", validation_batch)

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader("test", validation_batch)

    def predict_dataloader(self) -> PromptGroups:
        """Prompts of this process that are not answered yet."""
        todo = [int(n) for n in self._order if n not in self.answered]
        indices = todo[self.trainer.global_rank :: self.trainer.world_size]
        prompts = Prompts(self.rows("predict"), keep_errors=self.on_error == "skip")
        loader = WorkerLoader(prompts, batch_size=None, sampler=indices, num_workers=self._pace().workers)
        return PromptGroups(loader, len(indices))

    def predict_indices(self) -> range:
        """Indices of all rows of a complete prediction."""
        return range(len(self.rows("predict")))

    def _eval_loader(self, name: str, collate: Callable) -> DataLoader:
        rows = self.rows(name)
        batches = RankRows(len(rows), self.eval_batch_size, *data_rank(self.trainer))
        return self._loader(ValidationRows(rows), batches, partial(collate, self.processor))

    def _pace(self) -> Pace:
        return Pace.of(self.num_workers, self.trainer.num_devices)

    def _loader(self, dataset: Dataset, batches: Any, collate: Callable, paced: bool = False) -> ResumableLoader:
        pace = self._pace()
        options: dict[str, Any] = {
            "batch_sampler": batches,
            "collate_fn": collate,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": pace.workers > 0,
            "generator": torch.Generator(),  # what a loader draws for its workers is not taken from the run's numbers
        }
        if paced and pace.workers < pace.most:
            return PacedLoader(dataset, pace, **options)
        return ResumableLoader(dataset, num_workers=pace.workers, **options)


def is_packed(packing: bool | None, batch_size: int | None, group_by_length: bool) -> bool:
    """Return true if rows are packed: `packing`, or by default unless another option asks for padding."""
    return packing if packing is not None else batch_size is None and not group_by_length
