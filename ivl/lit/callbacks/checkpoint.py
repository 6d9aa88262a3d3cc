"""Checkpoint callback: atomic files, and exact resume.

A checkpoint is one file, the same under every strategy that keeps tensors in torch (one device, DDP, FSDP2): what
trains, optimizer, schedule, loops, the state of every random generator of every process, and the data position. It is
written under a temporary name, flushed to the disk and renamed, so a file named `*.ckpt` was complete when written; its
zip checksums detect later damage. A resumed run goes on as if it had not stopped.

Positions are ends of accumulation windows: inside one, gradients would have to be saved as well. A checkpoint that is
due inside a window waits for its end. Only one that belongs to a validation inside a window cannot wait: it holds the
position where that window began, whose micro-batches are then computed again, with the same random numbers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from ivl.checkpoint.ckpt_file import read_ckpt, trained_state
from ivl.finetune import tune as tuning
from ivl.finetune.adapter import peft_adapter as adapting
from ivl.lit.run.monitored_metric import best_mode, check_monitors, check_open_monitors
from ivl.lit.run.position import (
    VALIDATION_DUE,
    Position,
    begin_with_validation,
    is_cut_short,
    micro_batches_pending,
    validation_due,
)
from ivl.lit.run.random_state import random_state, set_random_state, state_of_rank
from ivl.lit.run.signals import STOP, Stopped
from ivl.lit.strategies import deepspeed as zero
from ivl.lit.types import as_lit, data_of
from ivl.run import WEIGHTS
from ivl.types import UserError

PARTIAL = ".part"
"""Suffix of a checkpoint that is being written"""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are complete or absent, whenever the machine stops; damaged ones are not read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}{PARTIAL}")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:  # such as a full disk
            partial.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too, is on the disk
        finally:
            os.close(folder)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: Any = True) -> dict[str, Any]:
        """Load a checkpoint, mapped into memory, without unpickling (`weights_only` is ignored).

        Raises UserError where the file is missing or damaged.
        """
        if Path(path).is_dir():
            raise UserError(f"{path}: a folder of DeepSpeed's, for its `fit` alone; take {zero.weights_beside(path)}")
        return read_ckpt(path, map_location, needed=("pytorch-lightning_version", "state_dict", "global_step"))


class Checkpoints(ModelCheckpoint):
    """Lightning's checkpoint callback: exact, on a schedule, on SIGTERM, SIGINT and SIGHUP, and after an error.

    At the first signal the optimizer step (or the batch of a validation) that is under way is finished, the state is
    saved in `last.ckpt`, and the process exits with 128 + the signal's number. At the second it exits at once, and
    saves nothing. After an error the state of the last optimizer step is saved before the program ends.
    A LoRA is also written as a PEFT adapter folder at the end of fit: the last step's (`adapter/`), and with a
    `monitor` the best one's (`adapter-best/`).

    Args:
        monitor: A logged number, such as val/loss, whose best checkpoints are kept. Unset: the newest are.
        mode: Best values of the monitor: min or max. Unset: max of a score, min of a loss.
        save_top_k: Number of checkpoints kept, besides last.ckpt; -1: all.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        save_top_k: int = 1,
        **kwargs: Any,
    ) -> None:
        if monitor is None and save_top_k > 1:  # Lightning keeps several by a number only
            monitor, mode = "step", "max"
        super().__init__(monitor=monitor, mode=mode or best_mode(monitor), save_top_k=save_top_k, **kwargs)

    _keeps: bool = True
    """False where the weights are of no use"""
    _saves: bool = True
    _resumes_in_place: bool = False
    """True if a run is resumed in its folder"""
    _training: bool = False
    """True if there is a state to save"""
    _updating: bool = False
    """True while the optimizer changes the weights"""
    _step_end: Position | None = None
    """Position after the last optimizer step of this process"""
    _saved: Position | None = None
    """Position of the checkpoint that is being written, unless it is the present one"""
    _took_signals: bool = False
    _random: list[dict[str, Any]] | None = None
    """Random states of each process, from a checkpoint, until the first step"""

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        super().setup(trainer, module, stage)
        self._saves = stage == "fit"
        if self._saves:
            check_monitors(trainer, module)

    def keep_nothing(self) -> None:
        """Write no checkpoint and no adapter from now on, unless the run is stopped by a signal."""
        self.save_last, self.save_top_k, self.monitor, self._keeps = False, 0, None, False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._saves:  # the other commands keep no checkpoints, and Lightning would warn of their other folder
            super().load_state_dict(move_paths(state_dict, str(self.dirpath)) if self._resumes_in_place else state_dict)

    # -- signals -------------------------------------------------------------------------------------------------

    def _take_signals(self, trainer: Trainer) -> None:
        """Install the signal handlers, after Lightning has installed its own."""
        self._took_signals = self._took_signals or not STOP.active
        STOP.take()
        STOP.processes = getattr(trainer.strategy.launcher, "kill", None)
        STOP.working = True

    def on_sanity_check_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._take_signals(trainer)

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._take_signals(trainer)

    def on_predict_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        STOP.check()

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._take_signals(trainer)

    def on_test_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        STOP.check()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        check_open_monitors(trainer)
        super().on_train_start(trainer, module)
        if self._resumes_in_place and (last := self._last()).exists():
            self.last_model_path = str(last)  # written again, in place of a second one beside it
        if trainer.is_global_zero and self.dirpath:
            for partial in Path(self.dirpath).glob(f".*.ckpt{PARTIAL}"):
                partial.unlink()
        self._take_signals(trainer)
        STOP.check()
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, Optimizer):  # DeepSpeed's is none
                optimizer.register_step_post_hook(lambda *_: setattr(self, "_updating", False))
        self._training = True

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._end()
        super().teardown(trainer, module, stage)

    def _end(self) -> None:
        self._training = STOP.working = False
        if self._took_signals:  # a Trainer outside the command line
            STOP.leave()

    def _stop_on_signal(self, trainer: Trainer, position: Position | None = None) -> None:
        """Save and stop if any process has a signal; all processes stop at the same step."""
        if not trainer.strategy.reduce_boolean_decision(bool(STOP.number), all=False):
            return
        number = STOP.number or signal.SIGTERM
        self._saved = position
        trainer.save_checkpoint(path := self._last())
        rank_zero_info(f"stopped at step {trainer.global_step}; go on with the same command and --ckpt_path {path}")
        # Lightning kills the first process where one that it started ends with another status than 0.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        is_free = trainer.is_global_zero or environment is None or environment.creates_processes_externally
        raise Stopped(128 + number if is_free else 0)

    def _last(self) -> Path:
        assert self.dirpath is not None, "set before the first step"
        return Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"

    # -- errors --------------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        try:
            if self._training and not isinstance(exception, Stopped):
                self._save_after_error(trainer, module)
        except Exception as error:  # noqa: BLE001  (the first error is reported)
            rank_zero_info(f"the state could not be saved ({type(error).__name__}: {error})")
        finally:
            self._end()

    def _save_after_error(self, trainer: Trainer, module: LightningModule) -> None:
        """Save the state of the last optimizer step, without the other processes, which may have failed."""
        step, position = trainer.global_step, self._step_end
        if not trainer.is_global_zero or position is None:
            return
        if self._last_global_step_saved == step:
            path = Path(self._last_checkpoint_saved)
        elif problem := self._cannot_save(trainer, module, position):
            rank_zero_info(f"the state of step {step} is not saved: {problem}")
            return
        else:
            path, self._saved = self._last(), position if position.step == step else None
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
            trainer.strategy.save_checkpoint(checkpoint, path)
        rank_zero_info(f"the state of step {step} is saved; go on with the same command and --ckpt_path {path}")
        if step >= as_lit(module).total_steps:
            self._write_adapter(trainer, module)

    def _cannot_save(self, trainer: Trainer, module: LightningModule, position: Position) -> str | None:
        """Return the reason why the state in memory is not that of the end of a step; None if it is."""
        counts: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        between = position.step == trainer.global_step or counts.processed == counts.ready
        if self._updating or not between:
            return "the error came while the optimizer changed the weights"
        if trainer.world_size > 1 and (zero.is_zero(trainer.strategy) or not isinstance(trainer.strategy, DDPStrategy)):
            return "each process holds a part of it"
        return None

    # -- when ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._random is not None:
            set_random_state(self._random, trainer.global_rank)
            self._random = None
            # Resumed at the end of an epoch, Lightning does not count the next one as begun; what is saved in it would
            # then be read as the end of that epoch.
            epochs: Any = trainer.fit_loop.epoch_progress
            for counts in (epochs.current, epochs.total):
                counts.ready = counts.started = counts.processed + 1
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._window_start = random_state()

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self._updating = True  # the last callback: the optimizer follows

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._updating = False
        if micro_batches_pending(trainer):
            return
        self._step_end = Position.of(trainer, random_state())
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        self._stop_on_signal(trainer)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._take_signals(trainer)
        elif self._random is not None and not trainer.sanity_checking:  # resumed before a validation
            set_random_state(self._random, trainer.global_rank)
            self._random = None

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            STOP.check()
        elif self._step_end and not trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch:
            self._stop_on_signal(trainer, self._step_end)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        step_ended = trainer.state.fn == "fit" and not trainer.sanity_checking and not micro_batches_pending(trainer)
        if step_ended:
            self._step_end = Position.of(trainer, random_state())
        super().on_validation_end(trainer, module)
        if step_ended:
            self._stop_on_signal(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        with self._position_in_epoch(trainer):
            super().on_train_epoch_end(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.save_last and self._last_global_step_saved != trainer.global_step:  # steps after the last validation
            with self._position_in_epoch(trainer):
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    @contextmanager
    def _position_in_epoch(self, trainer: Trainer) -> Iterator[None]:
        """Save the position of the last step where the epoch was cut short."""
        self._saved = self._step_end if is_cut_short(trainer, self._step_end) else None
        yield
        self._saved = None

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._write_adapter(trainer, module)

    def _write_adapter(self, trainer: Trainer, module: LightningModule) -> None:
        model, tune, base = as_lit(module).model, as_lit(module).tune, str(as_lit(module).pretrained)
        split, adapted = zero.is_zero(trainer.strategy), adapting.has_adapter(model)
        if not self.dirpath or not self._keeps or not (adapted or split):
            return
        # Both ask all processes where each has a shard.
        state = zero.trained(model) if split else trainer.strategy.lightning_module_state_dict()
        if split and trainer.is_global_zero:
            AtomicCheckpointIO().save_checkpoint(zero.weights(trainer, state, base), Path(self.dirpath) / WEIGHTS)
            rank_zero_info(f"weights in {Path(self.dirpath) / WEIGHTS}")
        if adapted and trainer.is_global_zero:
            state = {name: state[f"model.{name}"] for name in tuning.trainable_state(model)}
            folder = Path(self.dirpath).parent / "adapter"
            adapting.save_adapter(model, tune, folder, base=base, state=state)
            rank_zero_info(f"adapter in {folder} (step {trainer.global_step}, the last)")
            if best := self._best():
                file, step = best
                folder = folder.with_name("adapter-best")
                adapting.save_adapter(model, tune, folder, base=base, state=trained_state(file))
                rank_zero_info(f"adapter in {folder} (step {step}, the best by {self.monitor})")

    def next_checkpoints(self, trainer: Trainer) -> list[tuple[str, str]]:
        """Checkpoints to use next, with a description of each: the best by the monitor, and the last."""
        step = trainer.global_step
        last = self.last_model_path or (str(self._last()) if self._last().exists() else self.best_model_path)
        checkpoints = [(last, f"step {step}, the last")] if last else []
        if best := self._best():
            path, best_step = best
            name = f"step {best_step}, the best by {self.monitor}"
            both = best_step == step
            checkpoints = [(path, f"{name}, and the last")] if both else [(path, name), *checkpoints]
        return checkpoints

    def _best(self) -> tuple[str, int] | None:
        """Best checkpoint by the monitor, and its step."""
        path = self.best_model_path
        if self.monitor in (None, "step", "epoch") or not Path(path).is_file():
            return None
        return path, int(read_ckpt(path)["global_step"])

    # -- what ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        pending, position = micro_batches_pending(trainer), self._saved
        if position is not None:
            pending, state = 0, position.random
        elif self._random is not None:  # resumed at the end of an epoch, saved before a step: the state still waits
            state = state_of_rank(self._random, trainer.global_rank)
        else:
            state = self._window_start if pending else random_state()
        states: list[Any] = [state]
        if trainer.world_size > 1 and trainer.state.status != TrainerStatus.INTERRUPTED:  # after an error all are apart
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, state)
        checkpoint["random"] = states
        checkpoint[VALIDATION_DUE] = position.validation_due if position else validation_due(trainer)
        if position is not None:
            position.put(checkpoint)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            for name in counts:
                counts[name] -= pending

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._random = checkpoint.get("random")
        self._resumes_in_place = (
            bool(self.dirpath) and self._last().parent.resolve() == Path(str(trainer.ckpt_path)).resolve().parent
        )
        loops = checkpoint["loops"]["fit_loop"]
        loader = loops["state_dict"].get("combined_loader")
        counts = loops["epoch_loop.batch_progress"]["current"]
        data = data_of(trainer)
        if trainer.state.fn == "fit" and data and loader and not loader[0]["done"] and counts["ready"]:
            # An epoch has ended. Lightning sees it by the number of batches, which follows from that of processes.
            missing = data.batches_of_epoch() - counts["ready"]
            for name in counts:
                counts[name] += missing
        if trainer.state.fn == "fit" and checkpoint.get(VALIDATION_DUE):
            begin_with_validation(loops)


def move_paths(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """Point the paths of a callback's state to `folder`, as the run's folder may have been moved."""
    names = ("best_model_path", "kth_best_model_path")
    paths = {name: str(Path(folder) / Path(state[name]).name) if state.get(name) else "" for name in names}
    best = {str(Path(folder) / Path(path).name): value for path, value in (state.get("best_k_models") or {}).items()}
    return state | paths | {"dirpath": folder, "best_k_models": {p: v for p, v in best.items() if Path(p).exists()}}
