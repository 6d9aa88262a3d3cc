"""Each technique of `ivl.model.efficient` by itself: what a step keeps for backward and how long it takes without it.

    python benchmarks/efficient.py [--steps 9]      prints a Markdown table

The 60m model of `models.py`, one row of 768 tokens with two tiles, one token in fifteen supervised, float32 on one
core. Kept is what forward leaves for backward, in bytes of live tensors beside the weights. Sides take turns, step by
step; seconds are those of the processor, the median of steps without the optimizer.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from models import raw_config

from ivl.architecture.config import Config
from ivl.estimate.training_step import MemTracker
from ivl.finetune import tune as tuning
from ivl.model.efficient import last_block, layer_scale, lora_linear, recompute
from ivl.model.internvl import InternVL
from ivl.options import LoRA, Tune

TOKENS, TILES, IMAGE = 768, 2, 9
TECHNIQUES = {"recompute": recompute, "last_block": last_block, "layer_scale": layer_scale, "lora_linear": lora_linear}
RECIPES = {"LoRA": Tune(language_model=LoRA(16, dropout=0.05)), "full": Tune("full", "full", "full")}


def build(tune: Tune, without: str) -> InternVL:
    """The model with all techniques but one; `without` all: none."""
    torch.manual_seed(0)
    model = InternVL.from_config(Config.from_dict(raw_config("60m")), image_token_id=IMAGE, efficient=False)
    chosen = [name for name in TECHNIQUES if without not in (name, "all")]
    for name in ("layer_scale", "recompute", "last_block"):
        if name in chosen:
            TECHNIQUES[name].install(model)
    tuning.apply(model, tune)
    if "lora_linear" in chosen:
        lora_linear.install(model)
    return model


def batch_of(model: InternVL) -> dict[str, torch.Tensor]:
    ids, size = torch.full((1, TOKENS), 3), model.config.image_size
    ids[0, 1 : 1 + TILES * model.config.tokens_per_tile] = IMAGE
    labels = torch.full_like(ids, -100)
    labels[0, -TOKENS // 15 :] = 5
    return {"input_ids": ids, "labels": labels, "tiles": torch.zeros(TILES, 3, size, size, dtype=torch.uint8)}


def kept(model: InternVL, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that forward leaves for backward."""
    with MemTracker(model) as tracker:
        loss = model(**batch).loss
    return tracker.live if loss is not None else 0


def step(model: InternVL, batch: dict[str, torch.Tensor]) -> float:
    model.zero_grad()
    start = time.process_time()
    model(**batch).loss.backward()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {TOKENS} tokens, {TILES} tiles, {args.steps} steps a side\n")
    print("| recipe | without | kept, MB | s a step | kept more, MB | slower |")
    print("| --- | --- | --- | --- | --- | --- |")
    for recipe, tune in RECIPES.items():
        sides = ["nothing", *TECHNIQUES, "all"]
        models = {side: build(tune, side) for side in sides}
        batch = batch_of(models["nothing"])
        size = {side: kept(model, batch) / 1e6 for side, model in models.items()}
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.steps):
            for side, model in models.items():
                times[side].append(step(model, batch))
        seconds = {side: statistics.median(each) for side, each in times.items()}
        for side in sides:
            more, slower = size[side] - size["nothing"], seconds[side] / seconds["nothing"] - 1
            print(
                f"| {recipe} | {side} | {size[side]:.0f} | {seconds[side]:.3f} | {more:+.1f} | {100 * slower:+.1f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
