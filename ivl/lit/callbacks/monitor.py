"""Monitoring of training: speed, rates, memory, loss per source, progress bar."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from ivl.estimate.flops import Work, model_costs
from ivl.estimate.hardware import Device, find_device
from ivl.finetune.param_groups import groups_table
from ivl.finetune.tune import adapted, table
from ivl.lit.callbacks.expert_load import ExpertLoad
from ivl.lit.training.preference import means
from ivl.lit.types import RunModule, as_lit
from ivl.storage.files import write_text
from ivl.types import Batch, Conversation


class SourceLosses:
    """Losses per source since the last reading; sums stay on the device until then."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._sums: Tensor | None = None
        """(sources, 2): negative log-likelihood and supervised tokens"""

    def add(self, rows: Sequence[Conversation], losses: Tensor, tokens: Tensor) -> None:
        """Add a batch. `losses`, `tokens`: (rows,)."""
        names = [row.source or "rows" for row in rows]
        self.names += [name for name in dict.fromkeys(names) if name not in self.names]
        values = torch.stack([losses, tokens], dim=1)
        grown = torch.zeros(len(self.names), 2, device=values.device)
        if self._sums is not None:
            grown[: len(self._sums)] = self._sums
        positions = torch.tensor([self.names.index(name) for name in names])
        self._sums = grown.index_add(0, positions.to(values.device, non_blocking=True), values)

    def read(self, ranks: int = 1) -> dict[str, float]:
        """Mean loss of each source, over all processes (each must call it); sums start again."""
        local = {} if self._sums is None else dict(zip(self.names, self._sums.tolist()))
        if self._sums is not None:
            self._sums.zero_()
        parts: list[Any] = [local]
        if ranks > 1:
            parts = [None] * ranks
            torch.distributed.all_gather_object(parts, local)
        sums: dict[str, tuple[float, float]] = {}
        for part in parts:
            for name, (loss, tokens) in part.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + loss, before[1] + tokens)
        return {name: loss / tokens for name, (loss, tokens) in sums.items() if tokens}


class Watch(Callback):
    """Logs, at the trainer's log interval, tokens/s and samples/s of all processes, the share of time spent waiting for
    data, model FLOP utilisation on devices whose peak is known, memory, the learning rate of every group, the loss of
    every source, and the load of a mixture's experts.

    Nothing here waits for the device between two log steps.
    """

    def __init__(self) -> None:
        self.shown: dict[str, float] = {}
        """Values of the progress bar, as of the last log step"""
        self._losses, self._experts = SourceLosses(), ExpertLoad()
        self._measures: Tensor | None = None
        """Sums of a preference run's measures"""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._step = trainer.global_step
        if 0 < as_lit(module).total_steps < as_lit(module).trainer.log_every_n_steps:
            as_lit(module).trainer.log_every_n_steps = 1  # nothing would be logged
        devices = {module.device, *(p.device for p in as_lit(module).model.parameters())}
        self._devices = sorted((device for device in devices if device.type == "cuda"), key=str)
        self._peak = device_row(module.device)
        self._costs = model_costs(as_lit(module).model.config, as_lit(module).tune) if self._peak else None
        self._start = self._end = time.perf_counter()
        self._reset()
        self._write_trained(trainer, as_lit(module))

    def _reset(self) -> None:
        self._rows = self._steps = 0
        self._work = Work()
        self._waited, self._start = 0.0, self._end

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._waited += time.perf_counter() - self._end

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if "row_losses" in outputs:
            self._losses.add(batch.rows, outputs["row_losses"], outputs["row_tokens"])
        mixture = as_lit(module).model.language_model.config.experts
        if mixture is not None and (load := outputs.get("router_load")) is not None:
            self._experts.add(load, mixture.per_token)
        if (measures := outputs.get("measures")) is not None:
            self._measures = measures if self._measures is None else self._measures + measures
        self._work = added(self._work, batch)
        self._rows += len(batch)
        self._end = time.perf_counter()
        step, before = trainer.global_step, self._step
        self._step = step
        if step == before:  # inside an accumulation window
            return
        self._steps += 1
        if step % as_lit(module).trainer.log_every_n_steps == 0:
            self._log(trainer, module)
            self._reset()

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        self.shown["loss"] = float(trainer.callback_metrics.get("train/loss", float("nan")))  # waits for the device
        self._end = time.perf_counter()
        seconds, ranks = self._end - self._start, trainer.world_size
        # Ranks are given equal work, so this rank's rate stands for all.
        values = {
            "speed/tokens_per_s": self._work.tokens * ranks / seconds,
            "speed/samples_per_s": self._rows * ranks / seconds,
            "speed/data_wait": self._waited / seconds,
        }
        if self._peak and self._costs:
            values["speed/mfu"] = self._costs.total(self._work) / seconds / self._peak.flops
        values |= {f"lr/{g.get('name', n)}": g["lr"] for n, g in enumerate(trainer.optimizers[0].param_groups)}
        values |= memory(self._devices)
        losses = self._losses.read(ranks)
        values |= {f"train/loss/{name}": loss for name, loss in losses.items()} if len(losses) > 1 else {}
        values |= (load := self._experts.read(ranks))
        if self._measures is not None:
            measures, self._measures = means(self._measures, ranks), None
            values |= {f"train/{name}": value for name, value in measures.items()}
            self.shown |= {name.rpartition("/")[2]: measures[name] for name in ("rewards/margin", "rewards/accuracy")}
        module.log_dict(values, batch_size=1)
        self.shown |= {"busiest": load["experts/busiest"]} if load else {}
        self.shown |= {"tokens/s": values["speed/tokens_per_s"], "s/step": seconds / self._steps}

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if hasattr(self, "_start"):  # a validation inside fit is not waiting for training data
            self._end = time.perf_counter()
            self._reset()

    def _write_trained(self, trainer: Trainer, module: RunModule) -> None:
        folder = trainer.log_dir  # asks all ranks
        if folder is None or not trainer.is_global_zero:
            return
        layers = adapted(module.model)
        parts = [table(module.model), groups_table(trainer.optimizers[0])]
        parts += ["\n".join([f"LoRA on {len(layers)} layers:", *layers])] if layers else []
        text = "\n\n".join(parts) + "\n"
        Path(folder).mkdir(parents=True, exist_ok=True)
        path, number = Path(folder) / "trained.txt", 0
        while path.exists() and path.read_text(encoding="utf-8") != text:  # a resumed run, changed
            number += 1
            path = path.with_name(f"trained-{number}.txt")
        write_text(path, text)


def added(work: Work, batch: Batch) -> Work:
    """Add the work of a batch; padding does not count, and a prompt that rows share counts once."""
    assert batch.layout is not None, "the collator's batches have one"
    return Work(
        tiles=work.tiles + len(batch.tiles),
        tokens=work.tokens + sum(batch.layout.lengths),
        pairs=work.pairs + batch.layout.num_pairs,
        supervised=work.supervised + sum(batch.supervised),
    )


def device_row(device: torch.device) -> Device | None:
    """Return the data sheet of a device; None where it is unknown."""
    return find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def memory(devices: Sequence[torch.device]) -> dict[str, float]:
    """Peak memory in GiB: of each GPU since the last call, and of this process."""
    values = {}
    for device in devices:
        name = "device" if len(devices) == 1 else f"device{device.index}"
        values[f"memory/{name}_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    if sys.platform != "win32":
        import resource

        unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
        values["memory/process_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return values


class Progress(TQDMProgressBar):
    """Progress bar of an epoch, with time left of the run, loss and tokens/s, as of the last log step.

    The time left comes first, as what does not fit into the terminal's width is cut off at the end. Where the output is
    no terminal, a line now and then takes the place of the bar.
    """

    TRAINING = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
    SECONDS = 30.0
    """Seconds between two lines, at least, where the output is no terminal"""

    _time_of_line = -math.inf

    @property
    def is_disabled(self) -> bool:
        """True where no bar is drawn: in a file, such as a batch job's log, each refresh would stay."""
        return super().is_disabled or not sys.stdout.isatty()

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        if self.is_enabled and self.is_disabled:
            print(*args, sep=sep, flush=True, **kwargs)
        else:
            super().print(*args, sep=sep, **kwargs)

    def _print_line(self, name: str, done: int, total: float, items: Callable[[], dict[str, Any]] = dict) -> None:
        """Print a line in place of a bar, where none is drawn, at most one in `SECONDS`.

        `items` is called for a line alone: its metrics may have to be fetched from a device.
        """
        now = time.monotonic()
        if not (self.is_enabled and self.is_disabled) or now - self._time_of_line < self.SECONDS:
            return
        self._time_of_line = now
        count = f"{done}" if math.isinf(total) else f"{done}/{total:.0f}"
        self.print(", ".join([f"{name}: {count}", *(f"{key}={value}" for key, value in items().items())]))

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        name, done, total = f"Epoch {trainer.current_epoch}", batch_idx + 1, self.total_train_batches
        if done == total:  # an epoch has a line at its end
            self._time_of_line = -math.inf
        self._print_line(name, done, total, lambda: self.get_metrics(trainer, module))

    def on_validation_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *loader: int
    ) -> None:
        super().on_validation_batch_end(trainer, module, outputs, batch, batch_idx, *loader)
        if not trainer.sanity_checking:
            self._print_line(self.validation_description, batch_idx + 1, self.total_val_batches_current_dataloader)

    def on_test_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *loader: int
    ) -> None:
        super().on_test_batch_end(trainer, module, outputs, batch, batch_idx, *loader)
        self._print_line(self.test_description, batch_idx + 1, self.total_test_batches_current_dataloader)

    def on_predict_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *loader: int
    ) -> None:
        super().on_predict_batch_end(trainer, module, outputs, batch, batch_idx, *loader)
        self._print_line(self.predict_description, batch_idx + 1, self.total_predict_batches_current_dataloader)

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.bar_format = self.TRAINING
        return bar

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, int | str | float | dict]:
        watch = next((callback for callback in as_lit(module).trainer.callbacks if isinstance(callback, Watch)), None)
        shown, total = watch.shown if watch else {}, as_lit(module).total_steps
        items: dict[str, int | str | float | dict] = {}
        if "loss" in shown:
            items["left"] = clock((total - trainer.global_step) * shown["s/step"])
            items["loss"] = f"{shown['loss']:.4g}"
            items["tokens/s"] = f"{shown['tokens/s']:,.0f}"
            if "busiest" in shown:
                items["busiest expert"] = f"{100 * shown['busiest']:.0f} %"
            for name in ("margin", "accuracy"):
                items |= {name: f"{shown[name]:.3g}"} if name in shown else {}
        for name, value in super().get_metrics(trainer, module).items():
            if name != "v_num":  # texts: tqdm fills up numbers with zeros
                items[name] = value if isinstance(value, str) else f"{value:.4g}"
        return items


def clock(seconds: float) -> str:
    """Format seconds as 1:02:03, or as 1 d 02:03 from a day on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02}:{minutes:02}" if days else f"{hours}:{minutes:02}:{rest:02}"
