"""Records what TRL's DPO trainer computes on transformers' own InternVL, for `test_objectives.py`.

    pip install -e '.[trl]' && python -m tests.finetune.record_trl        # writes trl.json

Two models of random weights stand for the policy and the reference; the loss, the rewards and the gradient of each
batch of pairs are TRL's own (`DPOTrainer._compute_loss`).
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ivl.data.processor import Processor
from ivl.types import IGNORE, Batch
from tests.lit.rows import write_rows
from tests.tiny import write_checkpoint

RECORDED = Path(__file__).with_name("trl.json")
ROWS = [
    {"query": "<image>What is it?", "images": ["0.png"], "response": "It is a cat.", "rejected_response": "A dog, no?"},
    {"query": "How many?", "response": "four", "rejected_response": "five or six of them"},
    {"query": "<image>Where?", "images": ["1.png"], "response": "There on the left.", "rejected_response": "Here."},
]
CASES: dict[str, tuple[list[str], list[float], list[int]]] = {
    "sigmoid": (["sigmoid"], [1.0], [0, 1, 2]),
    "hinge": (["hinge"], [1.0], [0, 1, 2]),
    "ipo": (["ipo"], [1.0], [0, 1, 2]),
    "mpo 0": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], [0]),
    "mpo 1": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], [1]),
    "mpo 2": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], [2]),
}
"""Name → TRL's losses and weights, and the rows of the batch; one pair for `sft`, which is a mean over a batch there"""
GRADIENTS = ("lm_head.weight", "layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight")


def folders(root: Path) -> tuple[Path, Path]:
    """Policy and reference, in transformers' layout, and the pictures of ROWS beside them."""
    from ivl.commands.export import export

    write_rows(root)
    made = [write_checkpoint(root / name, "Qwen2ForCausalLM", seed=seed) for seed, name in enumerate(("one", "two"))]
    policy, reference = (export(str(path) + "-hf", base=str(path), layout="hf") for path in made)
    return Path(policy), Path(reference)


def batch_of(processor: Processor, root: Path, numbers: list[int]) -> Batch:
    processor.pairs = True
    return processor.collate([processor(ROWS[n], root=root) for n in numbers])


def trl_inputs(batch: Batch) -> dict[str, Any]:
    """A batch as TRL has it: the chosen answers first, and the tiles of each answer."""
    order = [*range(0, len(batch), 2), *range(1, len(batch), 2)]
    tiles = Processor.pixel_values(batch.tiles)[batch.tile_index] if batch.tile_index is not None else None
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids[order],
        "attention_mask": batch.attention_mask[order].long(),
        "completion_mask": (batch.labels != IGNORE).long()[order],
    }
    if tiles is not None:
        parts = tiles.split(batch.tiles_per_row.tolist())
        inputs["pixel_values"] = torch.cat([parts[n] for n in order])
    return inputs


def record() -> dict[str, Any]:
    from accelerate import Accelerator
    from transformers import AutoModelForImageTextToText
    from trl import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    root = Path(tempfile.mkdtemp())
    policy, reference = folders(root)
    processor = Processor.from_pretrained(policy)
    models = [AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32) for path in (policy, reference)]
    for model in models:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    recorded = {}
    for name, (losses, weights, numbers) in CASES.items():
        trainer = object.__new__(DPOTrainer)
        vars(trainer).update(
            model=models[0], ref_model=models[1], accelerator=Accelerator(cpu=True), aux_loss_enabled=False,
            precompute_ref_logps=False, f_divergence_type="reverse_kl", loss_types=losses, loss_weights=weights,
            beta=0.1, ld_alpha=None, label_smoothing=0.0, use_weighting=False, _tp_size=1, _total_train_tokens=0,
            _metrics=defaultdict(lambda: defaultdict(list)), args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        )  # fmt: skip
        models[0].zero_grad()
        loss = trainer._compute_loss(models[0], trl_inputs(batch_of(processor, root, numbers)), False)
        loss.backward()
        values = next(iter(trainer._metrics.values()))
        gradients = {
            end: float(p.grad.double().norm())
            for end in GRADIENTS
            for n, p in models[0].named_parameters()
            if n.endswith(end) and "vision" not in n
        }
        recorded[name] = {
            "loss": float(loss.detach()),
            "chosen": values["rewards/chosen"][0],
            "rejected": values["rewards/rejected"][0],
            "gradients": gradients,
        }
    return recorded


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(record(), indent=1) + "\n")
