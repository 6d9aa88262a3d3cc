"""Predictions on disk: appended as they are made, gone on with after a crash, put in input order at the end.

answers.jsonl.settings.json   what the answers are made with, so that a file never holds two kinds of them
answers.jsonl.part0, …        one per process, a line per row, as rows are answered
answers.jsonl                 all rows in order, once there are all; the others are then removed
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from ivl.data.processor import Processor
from ivl.data.rows.grounding import parse_boxes
from ivl.data.sets.index import fingerprint
from ivl.files import whole_file, write_text
from ivl.lit.benchmark import scored_by
from ivl.lit.run.signals import STOP, Stopped
from ivl.lit.types import own
from ivl.reasoning import split_reasoning
from ivl.types import Conversation, UserError

if TYPE_CHECKING:
    from ivl.lit.module import LitInternVL

if sys.platform != "win32":  # where two programs that write the same file are not told apart
    import fcntl

Row = dict[str, Any]
NAME = "predictions.jsonl"
SYNC_SECONDS = 1.0
"""Answers are handed to the system at once, and to the disk at least this often"""


def answered(
    index: int,
    row: Conversation,
    answer: str,
    processor: Processor,
    finish_reason: str,
    notes: Sequence[str] = (),
) -> Row:
    """A row's line: what was asked, what was answered, and what it is compared with.

    `notes`: what was left out of the prompt to make it fit.
    """
    reasoning, said = split_reasoning(answer)
    return {
        "index": index,
        "id": row.id,
        "where": row.where,
        "source": row.source or None,
        "prompt": processor.prompt_text(row),
        "response": said,
        "reasoning": reasoning,
        "finish_reason": finish_reason,
        "notes": list(notes),
        "reference": row.reference,
        "boxes": [{"ref": ref, "boxes": boxes} for ref, boxes in parse_boxes(said)],
        **scored_by(row),
    }


def failed(index: int, row: Conversation | None, where: str, error: str) -> Row:
    """The line of a row that could not be answered; `row` None: it was not even understood."""
    known = {"id": row.id, "where": row.where, "source": row.source or None} if row else {"id": None, "where": where}
    return {"index": index, **known, "error": error}


class Parts:
    """The parts of an unfinished file of predictions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path.with_name(f"{path.name}.settings.json")
        self._file: BinaryIO | None = None
        self._synced = 0.0

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.part{rank}")

    def existing(self) -> list[Path]:
        """The parts there are."""
        start = f"{self.path.name}.part"
        found = [p for p in self.path.parent.glob("*.part*") if p.name.startswith(start)]
        return sorted(p for p in found if p.name[len(start) :].isdigit())

    def begin(self, settings: dict[str, Any]) -> None:
        """Called by one process before any opens its part: begin anew, or mend what a crash has left.

        Raises UserError where the file is finished, is being written, or was begun with other settings.
        """
        if self.path.exists():
            raise UserError(f"{self.path}: exists already; name another file with --predictions.file or remove it")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = self.existing()
        if not self.settings.exists():
            if parts:
                raise UserError(f"{parts[0]}: exists, but {self.settings.name} beside it does not; remove it")
            write_text(self.settings, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
            return
        other = _differences(json.loads(self.settings.read_text(encoding="utf-8")), settings)
        if other:
            raise UserError(
                f"{self.path}: was begun with other settings ({'; '.join(other)}); give those to finish it, name "
                f"another file with --predictions.file, or remove {self.settings.name} and {self.path.name}.part*"
            )
        for part in parts:
            with part.open("r+b") as file:
                _lock(file, part)
                _mend(file)

    def answered(self) -> set[int]:
        """The rows that are done."""
        return {index for index, *_ in self._lines()}

    def _lines(self) -> Iterable[tuple[int, Path, int]]:
        """Row, part, and offset of each line."""
        for part in self.existing():
            with part.open("rb") as file:
                at = 0
                for number, line in enumerate(file, 1):
                    try:
                        yield json.loads(line)["index"], part, at
                    except (ValueError, KeyError, TypeError):
                        raise UserError(
                            f"{part}:{number}: is damaged; remove this line to answer its row again"
                        ) from None
                    at += len(line)

    def open(self, rank: int) -> None:
        """Begin to append to a process's part."""
        self._file = self._part(rank).open("ab")
        _lock(self._file, self._part(rank))

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows; a crash of this process does not lose them."""
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
        """Put `count` rows in order into the file and remove the parts.

        Returns how many of them are `error`, by the reason they ended for, and `shortened`.

        Raises UserError where not all are there, and leaves the parts.
        """
        found: dict[int, tuple[Path, int]] = {}
        for index, part, at in self._lines():
            assert index not in found, f"row {index} was answered twice, in {found[index][0]} and {part}"
            found[index] = part, at
        if len(found) != count:
            raise UserError(
                f"{self.path}: {len(found)} of {count} rows are answered; the same command goes on with the others"
            )
        kinds: Counter[str] = Counter()
        files = {part: part.open("rb") for part in self.existing()}
        with whole_file(self.path) as out:
            for index in sorted(found):
                part, at = found[index]
                files[part].seek(at)
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
    """Cut off a last line that was not written to its end."""
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
        """What the run's trained weights are read from, which says what the answers are made with"""
        self._parts: Parts | None = None
        self._bar: tqdm[Any] | None = None

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        path = Path(self.file or Path(trainer.log_dir or trainer.default_root_dir) / NAME)  # log_dir asks all ranks
        settings = self._settings(own(module)) if trainer.is_global_zero else {}
        if self.file is None and trainer.is_global_zero:
            path = _begun_before(trainer, settings) or path
        self._parts = Parts(Path(trainer.strategy.broadcast(str(path))))
        path = self._parts.path
        problem = None
        if trainer.is_global_zero:
            try:
                self._parts.begin(settings)
            except UserError as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            raise UserError(problem)
        data = own(module).trainer.datamodule
        data.answered = self._parts.answered()
        trainer.strategy.barrier("what is answered is known")
        self._parts.open(trainer.global_rank)
        done, count = len(data.answered), len(data.predict_indices())
        rank_zero_info(f"{done} of {count} rows are in {path}.part*" if done else f"{count} rows → {path}")
        if bar := trainer.progress_bar_callback:
            bar.disable()  # it counts rows as they are read, not as they are answered

    @property
    def path(self) -> Path:
        """The file, once the run is set up"""
        return self._begun.path

    @property
    def _begun(self) -> Parts:
        assert self._parts is not None, "the run is set up"
        return self._parts

    def _settings(self, module: LitInternVL) -> dict[str, Any]:
        """What decides the answers. Files of weights are named with size and time, which change with them."""
        rows = module.trainer.datamodule.rows("predict")
        weights: list[str | Path | None] = [self.checkpoint]
        weights += [f"{module.adapter}/{name}" for name in _ADAPTER if module.adapter]
        weights += sorted(Path(module.pretrained).glob("*.safetensors"))  # none where it is a model's name
        return {
            "rows": [[str(file.path.absolute()), file.digest] for file in rows.files],
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
        mine = sum(trainer.num_predict_batches) - 1  # the last says that there are no more
        ranks = f", process 1 of {trainer.world_size}" if trainer.world_size > 1 else ""
        off = trainer.progress_bar_callback is None or not trainer.is_global_zero
        self._bar = tqdm(total=mine, desc=f"answers{ranks}", unit="row", disable=off, dynamic_ncols=True)

    def on_predict_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: list[Row], batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._write(outputs)

    def on_predict_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        for rows in own(module).remaining_answers():
            self._write(rows)
            STOP.check()

    def _write(self, rows: list[Row]) -> None:
        if rows and self._bar is not None:
            self._begun.append(rows)
            self._bar.update(len(rows))

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        count = len(own(module).trainer.datamodule.predict_indices())
        kinds = self._begun.join(count)
        longest = own(module).generation.max_new_tokens
        said = {
            "error": "errors",
            "length": f"cut off at model.generation.max_new_tokens {longest}",
            "context": "cut off at the end of the model's context",
            "shortened": "to prompts that were shortened",
        }
        more = "".join(f", {kinds[kind]} of them {what}" for kind, what in said.items() if kinds[kind])
        rank_zero_info(f"{count} answers in {self.path}{more}")

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._close()
        if isinstance(exception, Stopped) and self._parts is not None and trainer.is_global_zero:
            done, count = len(self._parts.answered()), len(own(module).trainer.datamodule.predict_indices())
            rank_zero_info(f"{done} of {count} rows are in {self.path}.part*; the same command goes on with the others")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._parts is not None:
            self._parts.close()


def _begun_before(trainer: Trainer, settings: dict[str, Any]) -> Path | None:
    """An unfinished file of these settings in the folder of an earlier run: each run has one of its own."""
    runs = getattr(trainer.logger, "root_dir", None)
    for found in sorted(Path(runs).glob(f"*/{NAME}.settings.json")) if runs else ():
        begun = found.with_name(NAME)
        if not begun.exists() and not _differences(json.loads(found.read_text(encoding="utf-8")), settings):
            return begun
    return None


_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")


def _stamp(path: Path) -> list[Any]:
    with suppress(OSError):
        found = path.stat()
        return [str(path), found.st_size, found.st_mtime_ns]
    return [str(path)]
