"""LightningModule of InternVL: steps of fit, validate, test, predict."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ivl.data.media.feature_store import FeatureStore
from ivl.data.processor import Processor
from ivl.finetune import tune as tuning
from ivl.finetune.objectives import HELD_OUT, PairOfAnswers, Preference
from ivl.finetune.param_groups import param_groups, scale_rates, vectors
from ivl.lit.callbacks.nonfinite import NonFiniteGuard
from ivl.lit.loaders import data_rank
from ivl.lit.metrics import Metric, Scores, check_metrics
from ivl.lit.prediction.answering import Answering, answers, name_rows
from ivl.lit.prediction.prediction_rows import Row
from ivl.lit.prediction.prompts import Prompt, prompts_of
from ivl.lit.run.experiment import Experiment
from ivl.lit.run.optimizer_settings import apply_settings, build, check_schedule, rate_settings
from ivl.lit.run.resume import check_tensors
from ivl.lit.schedule import Warmup, estimated_steps
from ivl.lit.strategies.model_loading import load_model
from ivl.lit.strategies.precision import PrecisionGuard
from ivl.lit.training.feature_cache import with_features
from ivl.lit.training.loss_normalizer import LossNormalizer
from ivl.lit.training.out_of_memory import MemoryGuard, out_of_memory
from ivl.lit.training.preference import PreferenceTuning, means
from ivl.lit.types import IvlTrainer, data_of
from ivl.model.internvl import InternVL
from ivl.model.loss import loss_weights
from ivl.model.moe.experts import balancing_loss
from ivl.options import (
    AttentionKernel,
    Batching,
    Checkpointing,
    DType,
    GenerationOptions,
    Quantize,
    Rates,
    Reduction,
    Tune,
)
from ivl.reasoning import split_reasoning
from ivl.types import Batch, UserError, first_few

ScheduleCallable = Callable[[Optimizer, int], LRScheduler]


class LitInternVL(MemoryGuard):
    """InternVL for fit, validate, test and predict, by the command line or by a Trainer and any loader of its batches.

    Args:
        pretrained: Checkpoint: a folder in the released layout, or a model's name.
        tune: What trains, per part.
        adapter: PEFT adapter to put on the model first, a folder or a hub's OWNER/NAME. A fit goes on training it:
            `tune` follows from it.
        dtype: Type of frozen weights; `auto` follows trainer.precision. What trains is float32.
        quantize: Keep the linear layers of the language model's blocks in 8 or 4 bits (int8, nf4: by bitsandbytes; fp8:
            by torch alone): for inference, and as the frozen base of a LoRA (QLoRA). The vision encoder, projector and
            head stay whole.
        attention: Attention kernel; `auto` takes the fastest that is installed and runs here.
        checkpointing: Activation checkpointing per part.
        efficient: Train in less memory and time (`ivl.model.efficient`); false: the same by plain layers.
        compile: torch.compile the layers in training, and the decoding step in prediction: the first steps take
            minutes, the others less time, most of all on a GPU. Needs a C++ compiler.
        loss_reduction: Rows count in a step by their supervised tokens, alike, or by the root (token, sample, square).
        router_aux_loss: Coefficient of the auxiliary loss that balances the experts of a mixture (0.001 is usual); 0:
            off, as in the official training.
        objective: sft learns the answers of the rows; dpo and mpo prefer the chosen to the rejected answer of pairs.
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
        dtype: DType = "auto",
        quantize: Quantize | None = None,
        attention: AttentionKernel = "auto",
        checkpointing: Checkpointing = Checkpointing(),
        efficient: bool = True,
        compile: bool = False,  # noqa: A002  (the option's name)
        loss_reduction: Reduction = "token",
        router_aux_loss: float = 0.0,
        objective: Literal["sft"] | Preference = "sft",
        label_smoothing: float = 0.0,
        neftune: float = 0.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4),
        rates: Rates = Rates(),
        schedule: ScheduleCallable = lambda o, total_steps: Warmup(o, total_steps),
        generation: GenerationOptions = GenerationOptions(),
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
        self.router_aux_loss = router_aux_loss
        self.loss_reduction, self.label_smoothing, self.neftune = loss_reduction, label_smoothing, neftune
        self.make_optimizer, self.make_schedule, self.rates = optimizer, schedule, rates
        self.generation, self.batching = generation, batching
        self.answer_rows = answer_rows
        # A checkpoint holds only what trains; on_load_checkpoint is strict about that part.
        self.strict_loading = False
        self._vectors: set[str] | None = None
        generation.check()  # before the model is read
        self.normalizer = LossNormalizer()
        self.learns_pairs = isinstance(objective, Preference)
        self.preference = PreferenceTuning(objective) if isinstance(objective, Preference) else None
        self.feature_store: FeatureStore | None = None
        self.on_rows: Callable[[list[Row]], None] | None = None
        self.scores: dict[str, dict[str, float]] = {}
        self.scored_at = 0  # the optimizer step that the scores belong to
        self.answers: list[dict[str, Any]] = []
        self.pairs: list[PairOfAnswers] = []
        check_metrics(metrics)
        self.metrics = metrics
        self._scores = Scores(metrics)
        self.stop_after_bad = stop_after_bad
        self.experiment: Experiment | None = None  # kept in checkpoints; set by the command line
        self.changed_options: tuple[str, ...] = ()
        """Options that differ from those of the run that is resumed, for the message"""
        self._processor: Processor | None = None
        self._rows_done = 0  # rows of this process in the validation or prediction under way

    @property
    def processor(self) -> Processor:
        """Processor of the run's rows: the data module's, else the checkpoint's with its defaults."""
        if (data := data_of(self.trainer)) is not None:
            return data.processor
        self._processor = self._processor or Processor.from_pretrained(self.pretrained)
        return self._processor

    # -- building ------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        return [PrecisionGuard(), self.normalizer, NonFiniteGuard(self.normalizer, self.stop_after_bad)]

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        self.model = load_model(self)
        if self.router_aux_loss and self.model.language_model.config.experts is None:
            raise UserError(
                f"model.router_aux_loss: {self.router_aux_loss:g}, and this model has no experts; leave it out"
            )
        self.model.neftune_alpha, self._vectors = self.neftune, vectors(self.model)
        if self.preference is not None and not self.trainer.predicting:
            self.preference.set_up(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = build("model.optimizer", self.make_optimizer, param_groups(self.model, self.rates, self._vectors))
        scale_rates(optimizer)
        if optimizer.defaults.get("fused") and getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise UserError(
                "model.optimizer: fused and trainer.precision 16-mixed do not go together (a fused optimizer unscales "
                "gradients too late for the loss's denominator); leave fused out, or train in bf16-mixed"
            )
        data = data_of(self.trainer)
        self.total_steps = estimated_steps(self.trainer) if data is None else data.total_steps()
        schedule = build("model.schedule", self.make_schedule, optimizer, self.total_steps)
        check_schedule(schedule)
        self.rate_settings = rate_settings(optimizer, schedule, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- fit -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:
        self.batch = batch
        with self.memory("forward"):
            if self.feature_store is not None:
                batch = with_features(batch, self.model, self.feature_store)
            reference = None
            if self.preference is not None:
                batch, reference = self.preference.reference(self, batch)
            weights = loss_weights(batch.labels, batch.row_ids, len(batch), self.loss_reduction)
            experts = self.model.language_model.config.experts
            settings = {"label_smoothing": self.label_smoothing, "return_router_load": experts is not None}
            out = self.model(**batch, loss_weights=weights, **settings)
            loss_sum, weight, measures = out.loss_sum, out.weight_sum, None
            if self.preference is not None:
                loss_sum, weight, measures = self.preference.loss(self.trainer, out, reference, batch.row_weights)
        terms, load = [], out.router_load
        if load is not None and experts is not None and self.router_aux_loss:
            terms.append(self.router_aux_loss * balancing_loss(load, experts.per_token))
        loss = self.normalizer.add(self.trainer, loss_sum, weight, *terms)
        row_losses, load = out.row_losses.detach(), None if load is None else load.detach()
        outputs = {"row_losses": row_losses, "row_tokens": out.row_tokens, "router_load": load}
        return outputs | {"loss": loss, "measures": measures}

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
        else:
            self.normalizer.clip(self, float(gradient_clip_val or 0))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainable = {f"model.{n}" for n in tuning.trainable_state(self.model)}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        checkpoint["pretrained"] = str(self.pretrained)
        if self.preference is not None:
            checkpoint["objective"] = self.preference.state_dict()
        checkpoint["experiment"], checkpoint["rate_settings"] = self.experiment, self.rate_settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:  # DeepSpeed and classic FSDP have read it by then
            check_tensors(self.model, checkpoint["state_dict"])
        if self.preference is not None:
            self.preference.load_state_dict(checkpoint.get("objective", {}))
        if not self.trainer.training:
            return
        configured: Any = self.configure_optimizers()
        changes = apply_settings(checkpoint, self.rate_settings, configured["lr_scheduler"]["scheduler"])
        changes += self.changed_options
        rank_zero_info(
            f"resumed at step {checkpoint['global_step']}: weights, optimizer states, place among the rows and random "
            f"numbers are the checkpoint's; as given now: {first_few(changes, 6) or 'nothing that differs from it'}"
        )

    # -- validate and test ---------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch | tuple[list[int], Batch, Batch], batch_idx: int) -> None:
        if batch_idx == 0:
            self._scores, self.answers, self.pairs, self._rows_done = Scores(self.metrics), [], [], 0
            self._measures = torch.zeros(len(HELD_OUT) + 1, device=self.device)
        indices, rows, prompts = batch if isinstance(batch, tuple) else (range(len(batch)), batch, None)
        self.batch = rows
        count = len(rows) // (2 if rows.paired else 1)
        # By the first row of all ranks' batches, so that all ranks answer, or none does.
        first = self._rows_done * data_rank(self.trainer)[1]
        self._rows_done += count
        with out_of_memory(rows, f"lower data.eval_batch_size ({count})", "validation"):
            reference = None
            if self.preference is not None:
                rows, reference = self.preference.reference(self, rows)
            out = self.model(**rows)
            if self.preference is not None:
                self._measures += self.preference.held_out(out, reference)
                answered = self.preference.answered(rows.rows, out, reference)
                self.pairs += [pair for index, pair in zip(indices, answered) if index >= 0]
            chosen = slice(None, None, 2 if rows.paired else 1)
            dtype = torch.float16 if str(self.trainer.precision).startswith("16") else self.model.dtype
            with name_rows(rows.rows):
                self._scores.add_losses(rows.rows[chosen], out.row_losses[chosen], out.row_tokens[chosen], dtype)
            if self.answer_rows is not None and first >= self.answer_rows:
                return
            if prompts is None:  # of a loader of the user's own
                examples = [self.processor(row.as_prompt()) for row in rows.rows[chosen]]
                prompts = self.processor.collate(examples).to(self.device)
            all_done = self.trainer.strategy.reduce_boolean_decision
            with name_rows(prompts.rows):
                texts = answers(self.model, self.processor, self.generation, prompts, all_done)
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
        if self.preference is not None:
            measures = means(self._measures, self.trainer.world_size, HELD_OUT)
            self.log_dict({f"{stage}/{name}": value for name, value in measures.items()}, batch_size=1)
        for kind, values in scores.items():
            for name in ("loss", *self.metrics):
                if name in values:
                    key = f"{stage}/{kind}/{name}" if kind else f"{stage}/{name}"
                    self.log(key, values[name], prog_bar=not kind and name in ("loss", "exact"), batch_size=1)

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    # -- predict -------------------------------------------------------------------------------------------------

    def predict_step(self, batch: Batch | Iterable[Prompt], batch_idx: int) -> list[Row]:
        """Answer a batch of rows. Returns a row of its answer for each, in the order in which their answers ended."""
        if batch_idx == 0:
            data, name = data_of(self.trainer), str(self.pretrained) + (f" + {self.adapter}" if self.adapter else "")
            settings = (
                self.generation,
                self.batching,
                name,
                data is not None and data.options.on_error != "error",
                self.compiled,
            )
            self._answering, self._rows_done = Answering(self.model, self.processor, *settings), 0
        if isinstance(batch, Batch):
            rank, ranks = data_rank(self.trainer)
            prompts = prompts_of(batch, self.processor, range(self._rows_done * ranks + rank, sys.maxsize, ranks))
            self._rows_done += len(batch)
            batch = prompts
        rows: list[Row] = []
        for ended in self._answering.run(batch):
            rows += ended
            if self.on_rows is not None:
                self.on_rows(ended)
        return rows
