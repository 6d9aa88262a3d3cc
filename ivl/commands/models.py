"""Table of the released models, their memory and configs: `python -m ivl models [TEXT]`."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from ivl.architecture.families import MODELS, VARIANTS, ReleasedModel
from ivl.estimate.hardware import CONTEXT, TILES, TOKENS
from ivl.estimate.inference import cache_bytes, tower_bytes
from ivl.hub.unsupported import UNSUPPORTED
from ivl.options import ModelsOptions

TABLE = Path(__file__).resolve().parents[1] / "estimate/memory.yaml"
"""Gigabytes of a training step of each model, written by `ivl.commands.config_headers`, which takes minutes"""
BF16 = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, estimated from the dimensions: nothing here was measured on the released weights."""

    weights: float
    inference: float
    """Weights, the key-value cache of TOKENS, TILES through the vision tower"""
    lora: float
    """Training one row of TOKENS with TILES: the LoRA of the model's config, layers recomputed"""


def memory(row: ReleasedModel) -> Memory:
    """Estimate a model's memory in bfloat16 (linear layers in 8 bits where it is released so)."""
    llm, weights = row.backbone, row.parameters * BF16
    head = llm.head_dim or llm.hidden_size // llm.num_attention_heads
    if row.int8:
        # Of the large tensors, only the input embedding has 16 bits.
        weights = row.parameters + llm.vocab_size * llm.hidden_size
    cache = llm.num_hidden_layers * cache_bytes(llm.num_key_value_heads, head, BF16)
    tower = tower_bytes(row.vision, row.vision.image_size, BF16)
    return Memory(weights, weights + tower + cache + CONTEXT, _simulated()[row.name] * 1e9)


@cache
def _simulated() -> dict[str, float]:
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def config_of(row: ReleasedModel) -> str:
    """Path of the config to start from: the model's, of a variant that of its model."""
    return f"configs/{(row.variant_of or row.name).replace('-', '_')}.yaml"


def variants_of(row: ReleasedModel) -> list[str]:
    """Names of a model's variants."""
    return [variant.name for variant in VARIANTS if variant.variant_of == row.name]


def _active(row: ReleasedModel) -> str:
    """Parameters that a token is multiplied with, where they are not all."""
    if row.active_parameters == row.parameters:
        return ""
    return f", {row.active_parameters / 1e9:.1f}B active for a token"


def _lines(rows: list[ReleasedModel]) -> list[str]:
    lines = [f"{'name':<26}  {'params':>6}  {'run':>4}  {'LoRA':>4}  {'images':<8}  {'video':<5}  config"]
    for row in rows:
        need = memory(row)
        turns = "any turn" if row.multi_turn_images else "one turn"
        lines += [
            (
                f"{row.name:<26}  {row.parameters / 1e9:5.1f}B  {need.inference / 1e9:4.0f}  {need.lora / 1e9:4.0f}  "
                f"{turns:<8}  {'yes' if row.video else 'no':<5}  {config_of(row)}"
            ),
            f"    {row.huggingface} · {row.tower} + {row.llm}{' in 8 bits' if row.int8 else ''}{_active(row)}",
        ]
        if variants := variants_of(row):
            text = f"as well: {', '.join(variants)}"
            lines += textwrap.wrap(text, 116, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return lines


NOTES = f"""
run, LoRA: GB on one device, an estimate. Weights in bfloat16 (or 8 bits, where said so), and one row of {TOKENS} tokens
with an image of {TILES} tiles: to answer it, with a cache; to train on it with the LoRA of the model's config, the
language model's layers recomputed (`python -m ivl plan` for other options). Several devices share the weights.
as well: variants, with the dimensions and the config of the model: other stages of training, and transformers' layout.
NAME is a name above, a hub's OWNER/NAME (of a repository with several models OWNER/NAME:FOLDER), or a local folder.
Not loaded: {", ".join(row.kind for row in UNSUPPORTED)}."""


def _words(row: ReleasedModel) -> list[str]:
    """Texts that a word of the user is looked for in."""
    return [row.name, row.huggingface, row.llm, *variants_of(row)]


def main(options: ModelsOptions) -> int:
    """Print the table. Returns the exit status: 1 where nothing matches."""
    text = options.text.lower()
    rows = [row for row in MODELS if any(text in name.lower() for name in _words(row))]
    if not rows:
        print(f"no released model has {text!r} in its name")
        return 1
    print("\n".join(_lines(rows)))
    print("\n".join(textwrap.fill(line, 120, break_on_hyphens=False) for line in NOTES.splitlines()))
    return 0
