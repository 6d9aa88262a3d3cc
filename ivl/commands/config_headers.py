"""Headers of configs/ and the table of `ivl models`: memory to train each released model.

The numbers are those of `ivl.estimate.memory`.

    python -m ivl plan --headers configs

rewrites the comments on top of the configs of released models, and the table that `python -m ivl models` reads. Nothing
below the comments changes. A released model without a config gets one: that of PATTERN with its own name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from tqdm import tqdm

from ivl.architecture.config import Config
from ivl.architecture.families import MODELS, ReleasedModel, config_for, find_model
from ivl.commands.models import TABLE, config_of, memory
from ivl.estimate.hardware import TILES, TOKENS
from ivl.estimate.memory import memory_needed
from ivl.estimate.training_step import BatchShape, ShallowModel, Strategy, TrainSetup
from ivl.options import LoRA, Quantize, Tune

SUPERVISED = 1024
"""Supervised tokens, of the TOKENS of a row."""
FULL = Tune(vision_model="full", mlp1="full", language_model="full")


@dataclass(frozen=True)
class Recipe:
    """Way to train: yamls to stack on the model's, and the number of devices of the estimate."""

    stacked: tuple[str, ...]
    devices: int = 1
    strategy: Strategy = "single"
    tune: Tune | None = None
    quantize: Quantize | None = None
    recomputed: bool = False
    """Recompute the vision encoder's blocks as well."""

    @property
    def options(self) -> str:
        stacked = "".join(f" --config configs/{name}" for name in self.stacked)
        return stacked + " --model.checkpointing.vision_model true" * self.recomputed


RECIPES = (
    Recipe(()),
    Recipe(("tune/qlora.yaml",), quantize="nf4", tune=Tune(language_model=LoRA(rank=16))),
    Recipe(("strategy/layer_split.yaml",), 2, "layer_split"),
    Recipe(("strategy/deepspeed_zero2.yaml",), 2, "zero2"),
    Recipe(("tune/full.yaml", "strategy/fsdp2.yaml"), 4, "fsdp2", FULL, None, True),
)


def recipes(row: ReleasedModel, folder: Path) -> Iterator[Recipe]:
    """Recipes that this model can be trained by, and whose files exist."""
    for recipe in RECIPES:
        quantised = row.int8 and (recipe.tune == FULL or recipe.quantize)
        if not quantised and all((folder / name).is_file() for name in recipe.stacked):
            yield recipe


def gigabytes(row: ReleasedModel, recipe: Recipe, lora: LoRA) -> float:
    """Memory of the fullest device in GB, for a step on a row of TOKENS with TILES."""
    setup = TrainSetup(
        tune=recipe.tune or Tune(language_model=lora),
        precision="bf16-mixed",
        quantize=recipe.quantize,
        language_checkpointing=True,
        vision_checkpointing=recipe.recomputed,
        accumulate=16,
        strategy=recipe.strategy,
        devices=recipe.devices,
    )
    sketch = ShallowModel(Config.from_dict(config_for(row)), setup)
    return memory_needed(sketch, BatchShape(1, TOKENS, TILES, SUPERVISED)).total / 1e9


def simulated(row: ReleasedModel, folder: Path) -> float:
    """Gigabytes for the LoRA of the model's config on one device, for the table of `ivl models`."""
    return round(gigabytes(row, RECIPES[0], _lora(folder / Path(config_of(row)).name)), 3)


def header(path: Path) -> str:
    """Comments on top of a released model's config."""
    row, lora = find_model(_pretrained(path)), _lora(path)
    assert row is not None, f"{path}: not a released model's"
    lines = [f"# {row.huggingface.rpartition('/')[2]}, LoRA on the language model."]
    for recipe in recipes(row, path.parent):
        devices = f"each of {recipe.devices} devices" if recipe.devices > 1 else "one device"
        lines.append(f"#   python -m ivl fit --config configs/{path.name}{recipe.options} --data.train my.jsonl")
        lines.append(f"#     {gigabytes(row, recipe, lora):.0f} GB on {devices}")
    lines.append(
        f"# Memory is estimated (python -m ivl plan): rows of {TOKENS} tokens with an image of {TILES} tiles. "
        f"To run it: {memory(row).inference / 1e9:.0f} GB."
    )
    return "\n".join(lines) + "\n"


def body(text: str) -> str:
    """Text of a config without the comments on its top."""
    lines = text.splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if not line.startswith("#"))
    return "".join(lines[first:])


PATTERN = "internvl2_8b.yaml"
"""Config that those of other models are made from"""


def new_config(row: ReleasedModel, folder: Path) -> str:
    """Text of a config for a model that has none. Tiles are shared over a row's images, as in the official recipe."""
    text = body((folder / PATTERN).read_text(encoding="utf-8"))
    text = text.replace("OpenGVLab/InternVL2-8B", row.huggingface)
    return text.replace("data:\n  max_length: 4096\n", "data:\n  max_length: 4096\n  share_tiles: true\n")


def rewrite(folder: Path) -> None:
    """Give every released model a config in a folder, each config its header, and `ivl models` its table."""
    for row in MODELS:
        path = folder / Path(config_of(row)).name
        if not path.is_file() and (folder / PATTERN).is_file():
            path.write_text(new_config(row, folder), encoding="utf-8")
    table = {row.name: simulated(row, folder) for row in tqdm(MODELS, desc="models", disable=None)}
    head = "# Gigabytes of a training step with a LoRA, simulated: python -m ivl plan --headers configs\n"
    TABLE.write_text(head + yaml.safe_dump(table, sort_keys=False), encoding="utf-8")
    paths = [path for path in sorted(folder.glob("*.yaml")) if find_model(_pretrained(path))]
    for path in tqdm(paths, desc="headers", disable=None):
        path.write_text(header(path) + body(path.read_text(encoding="utf-8")), encoding="utf-8")


def _pretrained(path: Path) -> str:
    return str(yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["pretrained"])


def _lora(path: Path) -> LoRA:
    return LoRA(**yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["tune"]["language_model"])
