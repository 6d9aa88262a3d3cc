"""`python -m ivl models [TEXT]`: the released models by name, what each needs, and the config to start from."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ivl.families import MODELS, ReleasedModel

TOKENS, TILES, RANK = 4096, 13, 8
"""What the memory columns are for: the document's length, an image of 12 tiles and its thumbnail, its LoRA"""

LOSS_CHUNK = 512
CONTEXT = 1.0e9
"""CUDA's own, kernels' workspaces and the allocator's slack"""
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, estimated from the dimensions: nothing here was measured on the released weights."""

    weights: float
    inference: float
    """Weights, the key-value cache of TOKENS, TILES through the vision tower"""
    lora: float
    """Training one row of TOKENS with TILES: LoRA of RANK on the language model, the rest frozen, layers recomputed"""


def memory(row: ReleasedModel) -> Memory:
    """What a model takes in bfloat16 (its linear layers in 8 bits where it is released so)."""
    llm, vision = row.backbone, row.vision
    width, inner, layers = llm.hidden_size, llm.intermediate_size, llm.num_hidden_layers
    head = llm.head_dim or width // llm.num_attention_heads
    q, kv = llm.num_attention_heads * head, llm.num_key_value_heads * head
    weights = row.parameters * BF16
    if row.int8:
        weights = row.parameters + llm.vocab_size * width  # of what is large, only the input embedding has 16 bits
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    tower = TILES * patches * (6 * vision.hidden_size + 2 * vision.intermediate_size) * BF16
    cache = TOKENS * layers * 2 * kv * BF16
    # q, k, v, o, gate, up, down: two thin matrices each; weights, gradients and AdamW's two moments in float32
    adapters = layers * RANK * (2 * (width + q) + 2 * (width + kv) + 3 * (width + inner)) * 4 * FP32
    kept = TOKENS * (layers * width + 6 * width + 2 * q + 2 * kv + 5 * inner) * BF16
    logits = LOSS_CHUNK * llm.vocab_size * (BF16 + 2 * FP32)
    return Memory(
        weights=weights,
        inference=weights + tower + cache + CONTEXT,
        lora=weights + adapters + max(tower, kept + logits) + CONTEXT,
    )


def config_of(row: ReleasedModel) -> str:
    """The config to start from: its own, or that of the document's model nearest in size."""
    if not row.in_document:
        row = min((r for r in MODELS if r.in_document and r.video), key=lambda r: abs(r.parameters - row.parameters))
    return f"configs/{row.name.replace('-', '_')}.yaml"


def _lines(rows: list[ReleasedModel]) -> list[str]:
    lines = [f"{'name':<26}  {'params':>6}  {'run':>4}  {'LoRA':>4}  {'images':<8}  {'video':<5}  config"]
    for row in rows:
        need = memory(row)
        turns = "any turn" if row.multi_turn_images else "one turn"
        own = "" if row.in_document else " *"
        lines += [
            (
                f"{row.name:<26}  {row.parameters / 1e9:5.1f}B  {need.inference / 1e9:4.0f}  {need.lora / 1e9:4.0f}  "
                f"{turns:<8}  {'yes' if row.video else 'no':<5}  {config_of(row)}{own}"
            ),
            f"    {row.huggingface} · {row.tower} + {row.llm}{' in 8 bits' if row.int8 else ''}",
        ]
    return lines


NOTES = f"""
run, LoRA: GB on one device, an estimate. Weights in bfloat16 (or 8 bits, where said so), and one row of {TOKENS} tokens
with an image of {TILES} tiles: to answer it, with a cache; to train on it with a LoRA of rank {RANK} on the language
model, its layers recomputed (model.checkpointing.language_model). Several devices share the weights.
* no config of its own: add --model.pretrained NAME to this one.
NAME is a name above, a hub's OWNER/NAME, or a local folder."""


def main(argv: list[str]) -> int:
    """Print the table. Returns the exit status: 1 where nothing matches."""
    parser = argparse.ArgumentParser(prog="python -m ivl models", description="List the released models.")
    parser.add_argument("text", nargs="?", default="", help="only models whose name, hub id or language model has this")
    text = parser.parse_args(argv).text.lower()
    rows = [row for row in MODELS if any(text in name.lower() for name in (row.name, row.huggingface, row.llm))]
    if not rows:
        print(f"no released model has {text!r} in its name")
        return 1
    print("\n".join(_lines(rows)))
    print(NOTES)
    return 0
