"""Reference of preference tuning in a plan: a forward more at each step, or once before the first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ivl.architecture.config import Config
from ivl.errors import amount
from ivl.estimate import flops
from ivl.estimate.training_step import Strategy, TrainSetup
from ivl.finetune.reference import Way, is_fresh_lora, reference_way
from ivl.finetune.tune import PARTS
from ivl.options import LoRA, Tune


def reference_of(fit: Any, tune: Tune, strategy: Strategy) -> Way | None:
    """Way in which the options of a fit have the reference (`ivl.lit.training.preference`); None: of objective sft."""
    objective = fit.model.objective
    if objective == "sft":
        return None
    beside_lora = any(mode != "frozen" and not isinstance(mode, LoRA) for mode in map(tune.mode, PARTS))
    is_fresh = is_fresh_lora(tune, fit.model.adapter)
    return reference_way(objective.reference, beside_lora, strategy in ("fsdp2", "zero3"), is_fresh)


def reference_plan(
    config: Config, setup: TrainSetup, how: Way, batch: flops.Work, epoch: flops.Work | None
) -> dict[str, Any]:
    """Operations of the reference: of each micro-batch where it is live, else of all rows once, where those are known.

    Where neither vision encoder nor projector trains, the live one takes the features of the step.
    """
    costs = flops.forward_costs(config, setup)
    if how == "stored":
        return {"how": how, "flops_before_training": None if epoch is None else costs.total(epoch)}
    if setup.tune.vision_model == setup.tune.mlp1 == "frozen" and setup.strategy not in ("fsdp2", "zero3"):
        costs = replace(costs, tile=0.0)
    return {
        "how": how,
        "flops_per_micro_batch": costs.total(batch),
        "flops_per_epoch": None if epoch is None else costs.total(epoch),
    }


def reference_text(plan: dict[str, Any]) -> str:
    """Line about the reference for people."""
    if plan["how"] == "live":
        tflop = plan["flops_per_micro_batch"] / 1e12
        return f"the reference: a forward without the LoRA in each batch, {amount(tflop)} TFLOP"
    total = plan["flops_before_training"]
    known = "" if total is None else f", {amount(total / 1e12)} TFLOP"
    return f"the reference: a forward of all rows once, before training{known}; it is kept for later runs"
