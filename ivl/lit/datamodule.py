"""Files of rows → DataLoaders: the same share of work for every rank, a position that can be saved."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from ivl.data.dataset import Rows
from ivl.data.processor import Processor
from ivl.types import Batch, Example, UserError


class RankBatches:
    """Index lists for one rank: as many batches on every rank.

    In order (validation, prediction): rank r takes rows r, r + ranks, …; ranks short of a row are filled up with
    -1 - row, a row that is computed and then left out. Shuffled (training): a new order per epoch from the seed; the
    rows left over after the last full round of all ranks are left out of that epoch.
    """

    def __init__(self, rows: int, batch_size: int, rank: int, ranks: int, shuffle: bool, seed: int):
        self.rows, self.batch_size = rows, batch_size
        self.rank, self.ranks = rank, ranks
        self.shuffle, self.seed = shuffle, seed
        self.epoch = 0
        self.done = 0
        """Batches of this epoch already used: where the next pass begins"""
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Another order of rows; called by Lightning before each epoch."""
        self.epoch = epoch

    def _mine(self) -> list[int]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.rows, generator=generator).tolist()
            full = self.rows // self.ranks if self.rows >= self.ranks else 1
            return [order[(self.rank + i * self.ranks) % self.rows] for i in range(full)]
        mine = list(range(self.rank, self.rows, self.ranks))
        return mine + [-1 - self.rank % self.rows] * (math.ceil(self.rows / self.ranks) - len(mine))

    def __len__(self) -> int:
        return math.ceil(len(self._mine()) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        mine = self._mine()
        start, self.done = self.done, 0
        for i in range(start * self.batch_size, len(mine), self.batch_size):
            yield mine[i : i + self.batch_size]


class ResumableLoader(DataLoader):
    """A DataLoader whose position is saved with the run and found again without reading what was used."""

    position: Callable[[], dict[str, int]] | None = None

    def state_dict(self) -> dict[str, int]:
        return self.position() if self.position else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.epoch = state["epoch"]
        self.batch_sampler.done = state["done"]


class IvlData(LightningDataModule):
    """Rows from files, made into batches by the checkpoint's own processor.

    Args:
        pretrained: Checkpoint whose tokenizer, template and tiling are used (linked to model.pretrained).
        train: Files of training rows (jsonl or json).
        val: Files of held-out rows: loss and answers.
        test: Files for `test`.
        predict: Files for `predict`; rows need no response.
        media_root: Where relative media paths start. Default: the folder of the file they stand in.
        batch_size: Rows per batch and process.
        eval_batch_size: Rows per batch and process in validation and prediction. Default: batch_size.
        packing: Rows of a batch follow one another in one sequence instead of being padded to the longest.
        max_length: Most tokens of a row, image tokens included.
        max_tiles: Most tiles of an image, thumbnail not counted. Default: the checkpoint's.
        on_too_long: What happens to a row above max_length.
        num_workers: Loader processes. Default: one less than there are cores, four at most.
        seed: Of the order of rows and of random choices inside them.
    """

    def __init__(
        self,
        pretrained: str,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        media_root: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        packing: bool = False,
        max_length: int = 4096,
        max_tiles: int | None = None,
        on_too_long: Literal["fit", "truncate_text", "drop", "error"] = "fit",
        num_workers: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.files = {"train": train, "val": val, "test": test, "predict": predict}
        self.media_root = media_root
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.packing = packing
        self.num_workers = max(0, min(4, (os.cpu_count() or 1) - 1)) if num_workers is None else num_workers
        self.seed = seed
        self.processor = Processor.from_pretrained(
            pretrained, max_tiles=max_tiles, max_length=max_length, on_too_long=on_too_long
        )
        self._rows: dict[str, Rows] = {}

    def rows(self, split: str) -> Rows:
        """The rows of train, val, test or predict. Raises UserError where no file is named."""
        if split not in self._rows:
            files = self.files[split]
            if not files:
                raise UserError(f"--data.{split}: not given; expected one or more files of rows (jsonl or json)")
            files = [files] if isinstance(files, str) else files
            self._rows[split] = Rows(files, self.processor, root=self.media_root)
        return self._rows[split]

    def setup(self, stage: str) -> None:
        # Files are read before the model is loaded, so that a mistake in them costs nothing.
        needed = {"fit": ["train"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}[stage]
        for split in needed + (["val"] if stage == "fit" and self.files["val"] else []):
            self.rows(split)

    def total_steps(self) -> int:
        """Optimizer steps of the whole run, for the schedule."""
        trainer = self.trainer
        if trainer.max_steps > 0:
            return trainer.max_steps
        batches = len(self._batches("train"))
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return math.ceil(batches / trainer.accumulate_grad_batches) * max(1, trainer.max_epochs or 1)

    def _batches(self, split: str) -> RankBatches:
        training = split == "train"
        size = self.batch_size if training else self.eval_batch_size
        trainer = self.trainer
        return RankBatches(
            len(self.rows(split)), size, trainer.global_rank, trainer.world_size, shuffle=training, seed=self.seed
        )

    def _loader(self, split: str, batches: RankBatches, collate: Any, as_prompt: bool) -> DataLoader:
        return ResumableLoader(
            _Indexed(self.rows(split), split, as_prompt),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader:
        collate = partial(_training, self.processor, self.packing)
        loader = self._loader("train", self._batches("train"), collate, False)
        loader.position = self._position
        return loader

    def _position(self) -> dict[str, int]:
        """Epoch and batches used so far, by the trainer's count: the loader's own runs ahead of it."""
        loop = self.trainer.fit_loop
        done = loop.epoch_loop.batch_progress.current.processed
        epoch = loop.epoch_progress.current.processed
        return {"epoch": epoch, "done": done} if done < loop.max_batches else {"epoch": epoch + 1, "done": 0}

    def val_dataloader(self) -> DataLoader | list:
        if not self.files["val"]:
            return []
        return self._loader("val", self._batches("val"), partial(_validation, self.processor), False)

    def test_dataloader(self) -> DataLoader:
        return self._loader("test", self._batches("test"), partial(_validation, self.processor), False)

    def predict_dataloader(self) -> DataLoader:
        return self._loader("predict", self._batches("predict"), partial(_prediction, self.processor), True)

    def predict_indices(self) -> range:
        """The rows a complete prediction has."""
        return range(len(self.rows("predict")))


class _Indexed(Dataset):
    """Rows with their index; validation rows come twice: with their answer for the loss, without it to be answered."""

    def __init__(self, rows: Rows, split: str, as_prompt: bool):
        self.rows, self.split, self.as_prompt = rows, split, as_prompt

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Example, Example | None]:
        position = index if index >= 0 else -1 - index
        conversation = self.rows.conversation(position)
        process = self.rows.processor
        if self.split == "predict":
            return index, process(conversation.as_prompt()), None
        prompt = process(conversation.as_prompt()) if self.split != "train" else None
        return index, process(conversation), prompt


def _training(processor: Processor, packed: bool, items: list) -> Batch:
    return processor.collate([example for _, example, _ in items], packed=packed)


def _validation(processor: Processor, items: list) -> tuple[list[int], Batch, Batch]:
    indices, examples, prompts = zip(*items)
    batch = processor.collate(list(examples))
    for row, index in enumerate(indices):
        if index < 0:  # filled up: not counted in the loss
            batch.labels[row] = -100
    return list(indices), batch, processor.collate(list(prompts))


def _prediction(processor: Processor, items: list) -> tuple[list[int], Batch]:
    indices, prompts, _ = zip(*items)
    return list(indices), processor.collate(list(prompts))
