"""The training, validation and prediction steps: model, loss, log. No maths of its own but the loss's denominator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ivl.data.grounding import parse_boxes
from ivl.eval.metrics import exact_match, iou
from ivl.lit.feature_cache import with_features
from ivl.lit.prediction import answered, failed
from ivl.lit.prompts import LAST, Prompt
from ivl.lit.schedule import Warmup
from ivl.model import peft_adapter as adapting
from ivl.model import tune as tuning
from ivl.model.fingerprint import fingerprint
from ivl.model.generate import Choice, Ends
from ivl.model.internvl import InternVL
from ivl.model.rates import param_groups
from ivl.model.serve import Batching, Engine, Request, row_seed
from ivl.model.tune import Tune
from ivl.types import Batch, Conversation, UserError

ScheduleCallable = Callable[[Optimizer, int], LRScheduler]

LOSS_UNIT = 1024.0
"""Backward runs on the sum of token losses divided by this (a power of two, so it costs no rounding); the gradients
are divided by the number of supervised tokens of the whole optimizer step once that is known."""


@dataclass(frozen=True)
class Generation:
    """How answers are generated in validation and prediction."""

    max_new_tokens: int = 128
    """The longest answer, in tokens."""
    min_new_tokens: int = 0
    """No end of the answer before this many tokens."""
    temperature: float = 0.0
    """0 is greedy; above, tokens are sampled."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together have this probability."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that already occurred become less likely."""
    num_beams: int = 1
    """Above 1, answers are searched for with this many beams, one row after another."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, beside the checkpoint's own end tokens; they are not part of it."""
    seed: int = 0
    """Of the sampling; each row has a generator of its own, so answers do not depend on batching."""

    @property
    def choice(self) -> Choice:
        """How a token is chosen. Raises UserError for values out of range."""
        choice = Choice(self.temperature, self.top_p, self.top_k, self.repetition_penalty)
        choice.check_beams(self.num_beams)
        return choice


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
        adapter: PEFT adapter folder to put on the model first (validate and predict).
        dtype: What frozen weights are kept in; `auto` follows trainer.precision. What trains is float32.
        quantize: Keep the linear layers of the language model's blocks in 8 or 4 bits (needs bitsandbytes): for
            inference, and as the frozen base of a LoRA (QLoRA). The vision encoder, projector and head stay whole.
        attention: Attention kernel; `auto` takes the fastest that is installed and runs here.
        checkpointing: Activation checkpointing per part.
        optimizer: Made with the parameter groups of what trains.
        schedule: Made with the optimizer and the number of optimizer steps; stepped once per optimizer step.
        generation: How answers are generated in validation and prediction.
        batching: How many rows are answered at the same time in prediction; answers do not depend on it.
        answer_rows: At most this many rows per validation are answered in words; the loss is of all. Unset: all.
    """

    def __init__(
        self,
        pretrained: str,
        tune: Tune = Tune(),
        adapter: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        quantize: Literal["int8", "nf4"] | None = None,
        attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto",
        checkpointing: Checkpointing = Checkpointing(),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4),
        schedule: ScheduleCallable = lambda o, total_steps: Warmup(o, total_steps),
        generation: Generation = Generation(),
        batching: Batching = Batching(),
        answer_rows: int | None = None,
    ):
        super().__init__()
        self.pretrained = pretrained
        self.tune, self.adapter = tune, adapter
        self.dtype_name, self.quantize, self.attention = dtype, quantize, attention
        self.checkpointing = checkpointing
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.generation, self.batching = generation, batching
        self.answer_rows = answer_rows
        self.model: InternVL | None = None
        # A checkpoint holds only what trains; on_load_checkpoint is strict about that part.
        self.strict_loading = False
        self.scores: dict[str, dict[str, float]] = {}
        self.answers: list[dict[str, Any]] = []
        self._tally: dict[str, dict[str, float]] = {}
        self._engine: Engine | None = None

    # -- building ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        _ = self.generation.choice  # a mistake is told before the model is read

    def configure_model(self) -> None:
        if self.model is not None:
            return
        # Where each process holds the whole model it is read straight onto its device; sharded, onto the host first.
        whole = isinstance(self.trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        model = InternVL.from_pretrained(
            self.pretrained,
            dtype=self._weight_dtype(),
            device=self.trainer.strategy.root_device if whole else "cpu",
            attention=self.attention,
            quantize=self.quantize,
        )
        if self.adapter:
            adapting.load_adapter(model, self.adapter)
        else:
            tuning.apply(model, self.tune)
        model.set_checkpointing(self.checkpointing.vision_model, self.checkpointing.language_model)
        self.model = model
        if self.trainer.training:
            rank_zero_info(f"{self.pretrained}\n{tuning.table(model)}")

    def _weight_dtype(self) -> str:
        if self.dtype_name != "auto":
            return self.dtype_name
        precision = str(self.trainer.precision)
        return "bfloat16" if "bf16" in precision else "float16" if precision.startswith("16") else "float32"

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make_optimizer(param_groups(self.model))
        schedule = self.make_schedule(optimizer, self.trainer.datamodule.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- fit -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self._window_loss = torch.zeros((), device=self.device)
        self._window_tokens = torch.zeros((), device=self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if (store := self.trainer.datamodule.feature_store) is not None:
            batch = with_features(batch, self.model, store)
        out = self.model(**batch)
        self._window_loss += out.loss_sum.detach()
        self._window_tokens += out.num_supervised
        # Lightning divides by the number of micro-batches; the right denominator follows in on_before_optimizer_step.
        return out.loss_sum * (self.trainer.accumulate_grad_batches / LOSS_UNIT)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradients those of the mean over all supervised tokens: of all ranks and micro-batches."""
        totals = torch.stack([self._window_loss, self._window_tokens])
        ranks = self.trainer.world_size
        if ranks > 1:
            torch.distributed.all_reduce(totals)
        loss, tokens = totals
        scale = LOSS_UNIT * ranks / tokens.clamp(min=1)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, scale)
        self.log("train/loss", loss / tokens.clamp(min=1), prog_bar=True, batch_size=1)
        self._window_loss.zero_()
        self._window_tokens.zero_()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {f"model.{n}" for n in tuning.trainable_state(self.model)}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["pretrained"] = str(self.pretrained)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {f"model.{n}" for n in tuning.trainable_state(self.model)}
        found = set(checkpoint["state_dict"])
        if kept != found:
            odd = sorted(kept ^ found)
            raise UserError(
                f"--ckpt_path: the checkpoint does not hold what model.tune trains: {len(kept - found)} tensors are "
                f"missing and {len(found - kept)} unexpected, {odd[0]} among them; use the run's own config.yaml"
            )

    # -- validate and test ---------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._tally = defaultdict(lambda: defaultdict(float))
        self.answers = []

    def validation_step(self, batch: tuple[list[int], Batch, Batch], batch_idx: int) -> None:
        indices, batch, prompts = batch
        out = self.model(**batch)
        total = self._tally[""]
        total["loss"] += float(out.loss_sum)
        total["tokens"] += int(out.num_supervised)
        if self.answer_rows is not None and indices[0] >= self.answer_rows:
            return
        for index, row, answer in zip(indices, prompts.rows, self._generate(prompts)):
            if index < 0:  # filled up so that all ranks have equally many batches
                continue
            scores = score(row, answer)
            self.answers.append({"index": index, "row": row, "answer": answer, **scores})
            for kind in {"", row.source or "rows"}:
                tally = self._tally[kind]
                tally["rows"] += 1
                for name, value in scores.items():
                    tally[name] += value
                    tally[f"{name}_rows"] += 1

    def on_validation_epoch_end(self) -> None:
        tallies = [{k: dict(v) for k, v in self._tally.items()}]
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, tallies[0])
            tallies = gathered
        self.scores = summary(tallies)
        total = self.scores.get("", {})
        for name in ("loss", "exact", "iou"):
            if name in total:
                self.log(f"val/{name}", total[name], prog_bar=name != "iou", batch_size=1)
        for kind, values in self.scores.items():
            for name in ("exact", "iou"):
                if kind and name in values:
                    self.log(f"val/{kind}/{name}", values[name], batch_size=1)

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
        chosen = self.generation
        self._engine = Engine(
            self.model, self._ends(), chosen.choice, chosen.max_new_tokens, chosen.num_beams, self.batching
        )

    def predict_step(self, prompt: Prompt, batch_idx: int) -> list[dict[str, Any]]:
        """Hand one prompt to the engine. Returns the rows whose answers have come to an end meanwhile."""
        if prompt.index == LAST:
            return []
        if prompt.error:
            return [failed(prompt.index, prompt.conversation, prompt.where, prompt.error)]
        example, conversation = prompt.example, prompt.example.conversation
        request = Request(
            (prompt.index, conversation),
            example.input_ids,
            example.tiles,
            seed=row_seed(self.generation.seed, prompt.index),
        )
        try:
            self._engine.submit(request)
        except UserError as error:
            text = f"{prompt.where}: {error}"
            if self.trainer.datamodule.on_error == "error":
                raise UserError(text) from error
            return [failed(prompt.index, conversation, prompt.where, text)]
        rows = []
        while not self._engine.hungry:
            rows += self._answered(self._engine.step())
        return rows

    @cached_property
    def made_by(self) -> dict[str, Any]:
        """What the answers of a run are made with, for the record of their score."""
        processor, name = self.trainer.datamodule.processor, str(self.pretrained)
        name += f" + {self.adapter}" if self.adapter else ""
        return {
            "model": f"{name}@{fingerprint(self.model.state_dict().items())}",
            "max_tiles": processor.max_tiles,
            "frames": processor.video.num_segments if processor.video.fps is None else f"{processor.video.fps}/s",
            "decoding": dict(vars(self.generation)),
        }

    def remaining_answers(self) -> Iterator[list[dict[str, Any]]]:
        """The rows that are still being answered once there are no more prompts."""
        while self._engine.busy:
            with self.trainer.precision_plugin.predict_step_context():
                requests = self._engine.step()
            yield self._answered(requests)

    def _answered(self, requests: list[Request]) -> list[dict[str, Any]]:
        processor, stop = self.trainer.datamodule.processor, self.generation.stop
        return [answered(*r.key, processor.decode(r.answer, stop), processor) | self.made_by for r in requests]

    # -- answers -------------------------------------------------------------------------------------------------

    def _ends(self) -> Ends:
        processor, chosen = self.trainer.datamodule.processor, self.generation
        eos_ids = [*processor.stop_ids, *self.model.eos_ids]
        return Ends(eos_ids, stopped=processor.stopped_by(chosen.stop), min_new_tokens=chosen.min_new_tokens)

    def _generate(self, prompts: Batch) -> list[str]:
        """Answers in validation."""
        processor, ends = self.trainer.datamodule.processor, self._ends()
        settings = {k: v for k, v in vars(self.generation).items() if k != "stop"}
        found = self.model.generate(prompts, eos_ids=ends.eos_ids, stopped=ends.stopped, **settings)
        return [processor.decode(ids, self.generation.stop) for ids in found]


def score(row: Conversation, answer: str) -> dict[str, float]:
    """Exact match with the reference, and IoU of the boxes where the reference has boxes.

    Boxes are compared one by one in their order; a box that is missing or too many counts as 0.
    """
    if row.reference is None:
        return {}
    scores = {"exact": float(exact_match(answer, row.reference))}
    wanted = [box for _, boxes in parse_boxes(row.reference) for box in boxes]
    if wanted:
        given = [box for _, boxes in parse_boxes(answer) for box in boxes]
        hits = [iou(a, b) for a, b in zip(given, wanted)]
        scores["iou"] = sum(hits) / max(len(given), len(wanted))
    return scores


def summary(tallies: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The sums of all ranks → means per kind of row; the kind "" is all rows."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for tally in tallies:
        for kind, values in tally.items():
            for name, value in values.items():
                sums[kind][name] += value
    means: dict[str, dict[str, float]] = {}
    for kind in sorted(sums):
        values = sums[kind]
        means[kind] = {"rows": values["rows"]}
        if values["tokens"]:
            means[kind]["loss"] = values["loss"] / values["tokens"]
        for name in ("exact", "iou"):
            if values[f"{name}_rows"]:
                means[kind][name] = values[name] / values[f"{name}_rows"]
    return means
