"""Predictions on disk: appended, resumable after a crash, in input order at the end.

answers.jsonl.settings.json   model and options of the answers; a file never mixes answers of two settings
answers.jsonl.part0, …        one per process, a line per row, as rows are answered
answers.jsonl                 all rows in order, once there are all; the others are then removed
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from ivl.data.index.index_build import fingerprint
from ivl.data.object_store import absolute
from ivl.eval.predictions import NAME
from ivl.hub import resolve_adapter
from ivl.lit.prediction.prediction_rows import Row
from ivl.lit.run.signals import STOP, Stopped
from ivl.lit.types import RunModule, as_data, as_lit, data_of
from ivl.storage.files import atomic_file, write_json
from ivl.types import UserError

if sys.platform != "win32":  # where two programs that write the same file are not told apart
    import fcntl

SYNC_SECONDS = 1.0
"""Longest time between two flushes to the disk; answers are handed to the system at once"""


class PredictionShards:
    """Shards of an unfinished file of predictions, one per process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path.with_name(f"{path.name}.settings.json")
        self._file: BinaryIO | None = None
        self._synced = 0.0

    def _shard_path(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.part{rank}")

    def existing(self) -> list[Path]:
        """Paths of the shards on disk."""
        start = f"{self.path.name}.part"
        paths = [p for p in self.path.parent.glob("*.part*") if p.name.startswith(start)]
        return sorted(p for p in paths if p.name[len(start) :].isdigit())

    def begin(self, settings: dict[str, Any]) -> None:
        """Begin a file, or mend the shards of a crashed run. One process calls it, before any opens its shard.

        Raises UserError where the file is finished, is being written, or was begun with other settings.
        """
        if self.path.exists():
            raise UserError(f"{self.path}: exists already; name another file with --predictions.file or remove it")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = self.existing()
        if not self.settings.exists():
            if parts:
                raise UserError(f"{parts[0]}: exists, but {self.settings.name} beside it does not; remove it")
            write_json(self.settings, settings, indent=1)
            return
        changes = _differences(json.loads(self.settings.read_text(encoding="utf-8")), settings)
        if changes:
            raise UserError(
                f"{self.path}: was begun with other settings ({'; '.join(changes)}); give those to finish it, name "
                f"another file with --predictions.file, or remove {self.settings.name} and {self.path.name}.part*"
            )
        for part in parts:
            with part.open("r+b") as file:
                _lock(file, part)
                _mend(file)

    def answered(self) -> set[int]:
        """Indices of the rows that are answered."""
        return {index for index, *_ in self._lines()}

    def _lines(self) -> Iterable[tuple[int, Path, int]]:
        """Yield row, shard and offset of each line."""
        for part in self.existing():
            with part.open("rb") as file:
                offset = 0
                for number, line in enumerate(file, 1):
                    try:
                        yield json.loads(line)["index"], part, offset
                    except (ValueError, KeyError, TypeError):
                        raise UserError(
                            f"{part}:{number}: is damaged; remove this line to answer its row again"
                        ) from None
                    offset += len(line)

    def open(self, rank: int) -> None:
        """Open the shard of a process to append rows."""
        self._file = self._shard_path(rank).open("ab")
        _lock(self._file, self._shard_path(rank))

    def append(self, rows: Iterable[Row]) -> None:
        """Append rows; a crash of this process does not lose them."""
        assert self._file is not None, "opened before a row is answered"
        self._file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        self._file.flush()
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def join(self, count: int) -> Counter[str]:
        """Write `count` rows in order to the file, and remove the shards.

        Returns the numbers of rows by finish reason, of `error` rows, and of `shortened` rows.

        Raises UserError where rows are missing, and leaves the shards.
        """
        places: dict[int, tuple[Path, int]] = {}
        for index, part, offset in self._lines():
            assert index not in places, f"row {index} was answered twice, in {places[index][0]} and {part}"
            places[index] = part, offset
        if len(places) != count:
            raise UserError(
                f"{self.path}: {len(places)} of {count} rows are answered; the same command goes on with the others"
            )
        kinds: Counter[str] = Counter()
        files = {part: part.open("rb") for part in self.existing()}
        with atomic_file(self.path) as out:
            for index in sorted(places):
                part, offset = places[index]
                files[part].seek(offset)
                row = json.loads(files[part].readline())
                kinds["error" if "error" in row else row.get("finish_reason", "stop")] += 1
                kinds["shortened"] += bool(row.get("notes"))
                # `of` tells a file that was cut off from one of fewer rows (ivl.eval.predictions)
                out.write(json.dumps(row | {"of": count}, ensure_ascii=False).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
        for part, file in files.items():
            file.close()
            part.unlink()
        self.settings.unlink()
        return kinds


def _lock(file: BinaryIO, path: Path) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another program is writing it; wait for it, or name another file") from None
    except OSError:  # a file system without locks
        pass


def _mend(file: BinaryIO) -> None:
    """Cut off an incomplete last line."""
    size = end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        end = start + at + 1 if at >= 0 else start
        if at >= 0:
            break
    if end < size:
        file.truncate(end)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


class PredictionWriter(Callback):
    """Writes one JSON line per row, in input order, complete also after a crash and under several processes.

    Rows are appended to a part for each process as they are answered, and joined at the end. The same command goes on
    with an unfinished file.

    Args:
        file: Where to write. Default: `predictions.jsonl` in the run's folder, or an unfinished one beside it in
            `runs/` that was begun with the same settings. An existing file is not overwritten; one that was begun with
            the same settings is gone on with.
    """

    def __init__(self, file: str | None = None):
        self.file = file
        self.checkpoint: str | None = None
        """Checkpoint of the trained weights; part of the settings of the answers"""
        self._shards: PredictionShards | None = None
        self._bar: tqdm[Any] | None = None
        self._unanswered = 0

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        if data_of(trainer) is None:
            raise UserError(
                "PredictionWriter: expected trainer.predict(module, datamodule=IvlData(...)), found a loader"
            )
        path = Path(self.file or Path(trainer.log_dir or trainer.default_root_dir) / NAME)  # log_dir asks all ranks
        settings = self._settings(as_lit(module)) if trainer.is_global_zero else {}
        if self.file is None and trainer.is_global_zero:
            path = _unfinished_file(trainer, settings) or path
        self._shards = PredictionShards(Path(trainer.strategy.broadcast(str(path))))
        path = self._shards.path
        problem = None
        if trainer.is_global_zero:
            try:
                self._shards.begin(settings)
            except UserError as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            raise UserError(problem)
        data = as_data(trainer)
        data.answered = self._shards.answered()
        trainer.strategy.barrier("what is answered is known")
        self._shards.open(trainer.global_rank)
        done, count = len(data.answered), len(data.predict_indices())
        self._unanswered = count - done
        rank_zero_info(f"{done} of {count} rows are in {path}.part*" if done else f"{count} rows → {path}")
        if bar := trainer.progress_bar_callback:
            bar.disable()  # it counts rows as they are read, not as they are answered

    @property
    def path(self) -> Path:
        """Path of the predictions, after `setup`"""
        return self._open_shards.path

    @property
    def _open_shards(self) -> PredictionShards:
        assert self._shards is not None, "the run is set up"
        return self._shards

    def _settings(self, module: RunModule) -> dict[str, Any]:
        """Settings that determine the answers. Files of weights are recorded by size and time."""
        rows = as_data(module.trainer).rows("predict")
        weights: list[str | Path | None] = [self.checkpoint]
        weights += [f"{resolve_adapter(module.adapter)}/{name}" for name in _ADAPTER if module.adapter]
        weights += sorted(Path(module.pretrained).glob("*.safetensors"))  # none where it is a model's name
        return {
            "rows": [[absolute(file.name), file.digest] for file in rows.files],
            "chosen": None if len(rows.numbers) == sum(map(len, rows.files)) else rows.numbers.tolist(),
            "media_root": rows.root and str(rows.root),
            "processor": fingerprint(rows.processor),
            "model": module.pretrained,
            "weights": [_stamp(Path(path).absolute()) for path in weights if path],
            "tune": repr(module.tune) if self.checkpoint else None,
            "dtype": module.dtype_name,
            "quantize": repr(module.quantize),
            "precision": str(module.trainer.precision),
            **{f"generation.{name}": value for name, value in json.loads(json.dumps(vars(module.generation))).items()},
        }

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        total = len(range(trainer.global_rank, self._unanswered, trainer.world_size))
        ranks = f", process 1 of {trainer.world_size}" if trainer.world_size > 1 else ""
        off = trainer.progress_bar_callback is None or not trainer.is_global_zero
        self._bar = tqdm(total=total, desc=f"answers{ranks}", unit="row", disable=off, dynamic_ncols=True)
        as_lit(module).on_rows = self._write

    def _write(self, rows: list[Row]) -> None:
        if rows and self._bar is not None:
            self._open_shards.append(rows)
            self._bar.update(len(rows))
        STOP.check()

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        count = len(as_data(trainer).predict_indices())
        kinds = self._open_shards.join(count)
        longest = as_lit(module).generation.max_new_tokens
        descriptions = {
            "error": "errors",
            "length": f"cut off at model.generation.max_new_tokens {longest}",
            "context": "cut off at the end of the model's context",
            "shortened": "to prompts that were shortened",
        }
        summary = "".join(f", {kinds[kind]} of them {text}" for kind, text in descriptions.items() if kinds[kind])
        rank_zero_info(f"{count} answers in {self.path}{summary}")

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._close()
        if isinstance(exception, Stopped) and self._shards is not None and trainer.is_global_zero:
            done, count = len(self._shards.answered()), len(as_data(trainer).predict_indices())
            rank_zero_info(f"{done} of {count} rows are in {self.path}.part*; the same command goes on with the others")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._shards is not None:
            self._shards.close()


def _unfinished_file(trainer: Trainer, settings: dict[str, Any]) -> Path | None:
    """Return an unfinished file of these settings in the folder of an earlier run."""
    runs = getattr(trainer.logger, "root_dir", None)
    for file in sorted(Path(runs).glob(f"*/{NAME}.settings.json")) if runs else ():
        path = file.with_name(NAME)
        if not path.exists() and not _differences(json.loads(file.read_text(encoding="utf-8")), settings):
            return path
    return None


_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")


def _stamp(path: Path) -> list[Any]:
    with suppress(OSError):
        status = path.stat()
        return [str(path), status.st_size, status.st_mtime_ns]
    return [str(path)]
