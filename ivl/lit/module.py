"""LightningModule of InternVL: steps of fit, validate, test, predict; the loss's denominator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ivl.finetune import peft_adapter as adapting
from ivl.finetune import tune as tuning
from ivl.finetune.adapter_training import continue_adapter
from ivl.finetune.param_groups import Rates, param_groups, scale_rates, vectors
from ivl.finetune.tune import Tune
from ivl.inference.request import Batching
from ivl.lit.answering import Answering, Generation, answers, name_rows
from ivl.lit.callbacks.monitor import SourceLosses
from ivl.lit.callbacks.prediction_writer import Row
from ivl.lit.feature_cache import with_features
from ivl.lit.metrics import Metric, Scores, check_metrics
from ivl.lit.nonfinite import FiniteLoss, clip, memory_advice, out_of_memory, scale, total_norm
from ivl.lit.prompts import Prompt
from ivl.lit.run.experiment import Experiment
from ivl.lit.run.optimizer_settings import apply_settings, build, check_schedule, rate_settings
from ivl.lit.run.resume import check_tensors
from ivl.lit.schedule import Warmup
from ivl.lit.strategies import deepspeed as zero
from ivl.lit.strategies.layer_split import LayerSplit
from ivl.lit.types import IvlTrainer
from ivl.model.efficient.compile import compile_layers
from ivl.model.internvl import InternVL
from ivl.model.loss import Reduction, loss_weights
from ivl.parallel.device_map import DeviceMap
from ivl.reasoning import split_reasoning
from ivl.types import Batch, UserError, some

ScheduleCallable = Callable[[Optimizer, int], LRScheduler]

LOSS_UNIT = 1024.0
"""Backward runs on the sum of token losses divided by this (a power of two, so it costs no rounding); the gradients
are divided by the weight of all supervised tokens of the optimizer step once that is known."""


@dataclass(frozen=True)
class Checkpointing:
    """Activation checkpointing: less memory, about a third more time in the part it is on for."""

    vision_model: bool = False
    """In the vision encoder."""
    language_model: bool = False
    """In the language model."""


class LitInternVL(LightningModule):
    """InternVL for fit, validate, test and predict.

    Args:
        pretrained: Checkpoint: a folder in the released layout, or a model's name.
        tune: What trains, per part.
        adapter: PEFT adapter folder to put on the model first. A fit goes on training it: `tune` follows from it.
        dtype: Type of frozen weights; `auto` follows trainer.precision. What trains is float32.
        quantize: Keep the linear layers of the language model's blocks in 8 or 4 bits (needs bitsandbytes): for
            inference, and as the frozen base of a LoRA (QLoRA). The vision encoder, projector and head stay whole.
        attention: Attention kernel; `auto` takes the fastest that is installed and runs here.
        checkpointing: Activation checkpointing per part.
        efficient: Train in less memory and time (`ivl.model.efficient`); false: the same by plain layers.
        compile: torch.compile the layers in training, and the decoding step in prediction: the first steps take
            minutes, the others less time, most of all on a GPU. Needs a C++ compiler.
        loss_reduction: Rows count in a step by their supervised tokens, alike, or by the root (token, sample, square).
        label_smoothing: Share of each target that is spread evenly over the vocabulary, in training.
        neftune: Noise on the embeddings of text in training, alpha of NEFTune (5 is usual); 0: none.
        optimizer: Made with the parameter groups of what trains.
        rates: Learning rate and weight decay per part, where they differ from the optimizer's.
        schedule: Made with the optimizer and the number of optimizer steps; stepped once per optimizer step.
        generation: Sampling of the answers in validation and prediction.
        batching: Number of rows answered at the same time in prediction; answers do not depend on it.
        metrics: Scores of the answers in validation, val/NAME (of `test`: test/NAME), over all rows and per source.
        answer_rows: At most this many rows per validation are answered in words; the loss is of all. Unset: all.
        stop_after_bad: Stop after this many optimizer steps in a row with no finite loss or gradients; each is skipped.
    """

    trainer: IvlTrainer  # type: ignore[override]  # Lightning sets no other
    model: InternVL
    """Set by `configure_model`"""

    def __init__(
        self,
        pretrained: str,
        tune: Tune = Tune(),
        adapter: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        quantize: Literal["int8", "nf4"] | None = None,
        attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto",
        checkpointing: Checkpointing = Checkpointing(),
        efficient: bool = True,
        compile: bool = False,  # noqa: A002  (the option's name)
        loss_reduction: Reduction = "token",
        label_smoothing: float = 0.0,
        neftune: float = 0.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4),
        rates: Rates = Rates(),
        schedule: ScheduleCallable = lambda o, total_steps: Warmup(o, total_steps),
        generation: Generation = Generation(),
        batching: Batching = Batching(),
        metrics: list[Metric] = ["exact", "iou"],  # noqa: B006  (never changed)
        answer_rows: int | None = None,
        stop_after_bad: int = 5,
    ):
        super().__init__()
        self.pretrained = pretrained
        self.tune, self.adapter = tune, adapter
        self.dtype_name, self.quantize, self.attention = dtype, quantize, attention
        self.checkpointing, self.compiled, self.efficient = checkpointing, compile, efficient
        self.loss_reduction, self.label_smoothing, self.neftune = loss_reduction, label_smoothing, neftune
        self.make_optimizer, self.make_schedule, self.rates = optimizer, schedule, rates
        self.generation, self.batching = generation, batching
        self.answer_rows = answer_rows
        # A checkpoint holds only what trains; on_load_checkpoint is strict about that part.
        self.strict_loading = False
        self._vectors: set[str] | None = None
        self.scores: dict[str, dict[str, float]] = {}
        self.scored_at = 0  # the optimizer step that the scores belong to
        self.answers: list[dict[str, Any]] = []
        check_metrics(metrics)
        self.metrics = metrics
        self._scores = Scores(metrics)
        self.stop_after_bad = stop_after_bad
        self.source_losses = SourceLosses()
        self.shown: dict[str, float] = {}
        """Values of the progress bar, as of the last log step"""
        self.experiment: Experiment | None = None  # kept in checkpoints; set by the command line
        self.changed_options: tuple[str, ...] = ()
        """Options that differ from those of the run that is resumed, for the message"""
        self._batch: Batch | None = None  # the current batch, for messages
        self.updating = False  # true while the optimizer changes the weights

    # -- building ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        _ = self.generation.sampling_params  # raises before the model is read
        # DeepSpeed's and classic FSDP's plugins convert every field of a batch, its rows too, and fail on those.
        plugin: Any = self.trainer.precision_plugin
        plugin.convert_input = lambda batch: batch

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        with zero.unpartitioned_init(self.trainer.strategy):
            model = self._model(self.trainer.strategy)
        model.set_checkpointing(self.checkpointing.vision_model, self.checkpointing.language_model)
        model.neftune_alpha = self.neftune
        self.model, self._vectors = model, vectors(model)
        if (device_map := getattr(model, "hf_device_map", None)) is not None:
            rank_zero_info(f"layers over devices: {DeviceMap(device_map)}")
        if self.trainer.training:
            rank_zero_info(f"{self.pretrained}\n{tuning.table(model)}")
            if self.compiled:
                compile_layers(model)

    def _model(self, strategy: Strategy) -> InternVL:
        """Return the model, its trainable parts set up, distributed as the strategy needs it."""
        dtype, attention = self._weight_dtype(), self.attention
        mesh = strategy.device_mesh if isinstance(strategy, ModelParallelStrategy) else None
        if mesh is not None:
            from ivl.parallel.fsdp import build_sharded, parallelize  # peft takes seconds to import
        if mesh is not None and not self.adapter and not self.quantize:
            settings = strategy.root_device, dtype, attention, self.efficient
            return build_sharded(self.pretrained, self.tune, mesh, *settings)
        # A model that each process holds in full is read straight onto its device; a sharded one onto the host first.
        replicated = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not zero.is_zero(strategy, 3)
        options: dict[str, Any] = {"efficient": self.efficient, "device": strategy.root_device if replicated else "cpu"}
        options = strategy.load_options(self) if isinstance(strategy, LayerSplit) else options
        model = InternVL.from_pretrained(self.pretrained, dtype, attention=attention, quantize=self.quantize, **options)
        if self.adapter and self.trainer.training:
            self.tune = continue_adapter(model, self.adapter, self.pretrained, self.tune)
        elif self.adapter:
            adapting.load_adapter(model, self.adapter)
            if note := adapting.other_base(self.adapter, self.pretrained):
                rank_zero_info(note)
        else:
            tuning.apply(model, self.tune)
        if mesh is not None:
            parallelize(model, mesh)
        elif not replicated:  # Lightning shards it, or DeepSpeed does
            model.always_run_vision = True
        return model

    def _weight_dtype(self) -> str:
        if self.dtype_name != "auto":
            return self.dtype_name
        precision = str(self.trainer.precision)
        return "bfloat16" if "bf16" in precision else "float16" if precision.startswith("16") else "float32"

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build("model.optimizer", self.make_optimizer, param_groups(self.model, self.rates, self._vectors))
        scale_rates(optimizer)
        if optimizer.defaults.get("fused") and getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise UserError(
                "model.optimizer: fused and trainer.precision 16-mixed do not go together (a fused optimizer unscales "
                "gradients too late for the loss's denominator); leave fused out, or train in bf16-mixed"
            )
        self.total_steps = self.trainer.datamodule.total_steps()
        schedule = build("model.schedule", self.make_schedule, optimizer, self.total_steps)
        check_schedule(schedule)
        self.rate_settings = rate_settings(optimizer, schedule, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- fit -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        dtypes = {p.dtype for p in self.model.parameters() if p.requires_grad} - {torch.float32}
        # DeepSpeed, which is a DDPStrategy to Lightning, keeps the float32 weights itself.
        torch_states = isinstance(self.trainer.strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy))
        if dtypes and torch_states and not zero.is_zero(self.trainer.strategy):
            raise UserError(
                f"trainer.precision {self.trainer.precision}: it rounded what trains to {dtypes.pop()}, not float32. "
                "Choose bf16-mixed: frozen weights are kept in 16 bits there as well"
            )
        self._window_loss = torch.zeros((), device=self.device)
        self._window_weight = torch.zeros((), device=self.device)
        self._norm: Tensor | None = None
        self._finite = FiniteLoss(self.stop_after_bad, self.trainer.log_every_n_steps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._batch = batch
        with self._memory("forward"):
            if (store := self.trainer.datamodule.feature_store) is not None:
                batch = with_features(batch, self.model, store)
            weights = loss_weights(batch.labels, batch.row_ids, len(batch), self.loss_reduction)
            out = self.model(**batch, loss_weights=weights, label_smoothing=self.label_smoothing)
        self._window_loss += out.loss_sum.detach()
        self._window_weight += out.weight_sum
        self._finite.add(batch.rows, out.loss_sum)
        self.source_losses.add(batch.rows, out.row_losses, out.row_tokens)
        if zero.is_zero(self.trainer.strategy):
            # It keeps gradients to itself, so each micro-batch is a mean over what all ranks learn from in it.
            weight = self.trainer.strategy.reduce(out.weight_sum.clone(), reduce_op="sum")
            return out.loss_sum * self.trainer.world_size / weight.clamp(min=1)
        # Lightning divides by the number of micro-batches; the right denominator follows in on_before_optimizer_step.
        return out.loss_sum * (self.trainer.accumulate_grad_batches / LOSS_UNIT)

    def backward(self, loss: Tensor) -> None:
        with self._memory("backward"):
            loss.backward()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the weight of all supervised tokens of the step, over all ranks and micro-batches."""
        totals = torch.stack([self._window_loss, self._window_weight])
        ranks = self.trainer.world_size
        if ranks > 1:
            torch.distributed.all_reduce(totals)
        loss, weight = totals
        weight = weight.clamp(min=1)  # no row weighs less, so this is where nothing is supervised
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if zero.is_zero(self.trainer.strategy):
            gradients = []
        self._norm = None
        bad = ~torch.isfinite(loss)
        if gradients:
            scale(gradients, LOSS_UNIT * ranks / weight)
            strategy: Any = self.trainer.strategy
            classic = isinstance(strategy, FSDPStrategy)  # its shards do not give the total norm
            norm = strategy.model.clip_grad_norm_(float("inf")) if classic else total_norm(gradients)
            self._norm = norm.to(loss.device)
            self.log("train/grad_norm", self._norm, batch_size=1)
            if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # which looks for overflow itself
                bad |= ~torch.isfinite(self._norm)
        self.log("train/loss", loss / weight, batch_size=1)
        self._window_loss.zero_()
        self._window_weight.zero_()
        self._finite.close(self.trainer.global_step, bad, optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that is known already; this also works for fused optimizers (Lightning refuses those)."""
        supported = (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy)
        if not isinstance(self.trainer.strategy, supported) or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val and self._norm is not None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            clip(gradients, float(gradient_clip_val), self._norm)
        self.updating = True  # the optimizer follows

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        with self._memory("the optimizer's step"):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.updating = False
        FiniteLoss.release(getattr(optimizer, "optimizer", optimizer))

    def on_fit_end(self) -> None:
        self._finite.read()

    def _memory(self, doing: str) -> AbstractContextManager[None]:
        return out_of_memory(self._batch, memory_advice(self.trainer.datamodule, vars(self.checkpointing)), doing)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainable = {f"model.{n}" for n in tuning.trainable_state(self.model)}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        checkpoint["pretrained"] = str(self.pretrained)
        checkpoint["experiment"], checkpoint["rate_settings"] = self.experiment, self.rate_settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:  # DeepSpeed and classic FSDP have read it by then
            check_tensors(self.model, checkpoint["state_dict"])
        if not self.trainer.training:
            return
        configured: Any = self.configure_optimizers()
        changes = apply_settings(checkpoint, self.rate_settings, configured["lr_scheduler"]["scheduler"])
        changes += self.changed_options
        rank_zero_info(
            f"resumed at step {checkpoint['global_step']}: weights, optimizer states, place among the rows and random "
            f"numbers are the checkpoint's; as given now: {some(changes, 6) or 'nothing that differs from it'}"
        )

    # -- validate and test ---------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._scores = Scores(self.metrics)
        self.answers = []

    def validation_step(self, batch: tuple[list[int], Batch, Batch], batch_idx: int) -> None:
        indices, rows, prompts = batch
        self._batch = rows
        with out_of_memory(rows, f"lower data.eval_batch_size ({len(rows)})", "validation"):
            out = self.model(**rows)
            dtype = torch.float16 if str(self.trainer.precision).startswith("16") else self.model.dtype
            with name_rows(rows.rows):
                self._scores.add_losses(rows.rows, out.row_losses, out.row_tokens, dtype)
            # By the first row of all ranks' batches, so that all ranks answer, or none does.
            first = batch_idx * self.trainer.datamodule.rows_of_step()
            if self.answer_rows is not None and first >= self.answer_rows:
                return
            all_done = self.trainer.strategy.reduce_boolean_decision
            with name_rows(prompts.rows):
                texts = answers(self.model, self.trainer.datamodule.processor, self.generation, prompts, all_done)
        for index, row, answer in zip(indices, prompts.rows, texts):
            if index < 0:  # padding: all ranks have equally many batches
                continue
            scores = self._scores.add_answer(row, answer)
            reasoning, response = split_reasoning(answer)
            self.answers.append({"index": index, "row": row, "answer": response, "reasoning": reasoning, **scores})

    def on_validation_epoch_end(self) -> None:
        scores = self._scores.means(self.trainer.world_size)
        if not self.trainer.sanity_checking:
            self.scores, self.scored_at = scores, self.trainer.global_step
        stage = "test" if self.trainer.testing else "val"
        for kind, values in scores.items():
            for name in ("loss", *self.metrics):
                if name in values:
                    key = f"{stage}/{kind}/{name}" if kind else f"{stage}/{name}"
                    self.log(key, values[name], prog_bar=not kind and name in ("loss", "exact"), batch_size=1)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    # -- predict -------------------------------------------------------------------------------------------------

    def on_predict_start(self) -> None:
        strategy = self.trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise UserError(
                f"predict: {type(strategy).__name__} splits the model, but each process answers rows of its own and "
                f"needs all of it; use --trainer.strategy auto, or model.quantize where memory does not suffice"
            )
        data, name = self.trainer.datamodule, str(self.pretrained) + (f" + {self.adapter}" if self.adapter else "")
        settings = self.generation, self.batching, name, data.on_error != "error", self.compiled
        self._answering = Answering(self.model, data.processor, *settings)

    def predict_step(self, prompt: Prompt, batch_idx: int) -> list[Row]:
        """Submit a prompt to the engine. Returns the rows whose answers ended meanwhile."""
        return self._answering.take(prompt)

    def remaining_answers(self) -> Iterator[list[Row]]:
        """Yield the rows that are still being answered after the last prompt."""
        while self._answering.engine.is_busy:
            with self.trainer.precision_plugin.predict_step_context():
                rows = self._answering.step()
            yield rows
