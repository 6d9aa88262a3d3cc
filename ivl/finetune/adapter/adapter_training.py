"""Training from a PEFT adapter: its tensors decide what trains, and are the initial values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivl.finetune import tune as tuning
from ivl.finetune.adapter.adapters import Adapter
from ivl.finetune.adapter.peft_adapter import other_base, put_adapter, read_adapter
from ivl.finetune.tune import PARTS, How, part_of, scale_alpha, target_names, used_blocks
from ivl.options import Blocks, LoRA, Tune
from ivl.types import UserError

if TYPE_CHECKING:
    from ivl.model.internvl import InternVL

REMEDY = "merge it (python -m ivl export --adapter DIR --out OUT) and train a LoRA of the merged checkpoint"


def continue_adapter(model: InternVL, folder: str | Path, base: str, typed: Tune) -> Tune:
    """Make an adapter's layers and parts trainable, from its values on. Returns what trains.

    `base`: the checkpoint that the model was read from; `typed`: what the options say trains. Raises UserError where
    the adapter was made for another checkpoint, says otherwise than `typed`, or has a form that no `Tune` describes.
    """
    if note := other_base(folder, base):
        raise UserError(f"--model.adapter {note}; give the checkpoint it was made for with --model.pretrained")
    adapter = read_adapter(model, folder)
    tune = tune_of(model, adapter, str(folder))
    if typed != Tune():
        tune = agreed(model, tune, typed, str(folder))
    tuning.apply(model, tune)
    put_adapter(model, adapter, str(folder))
    return tune


def tune_of(model: InternVL, adapter: Adapter, where: str) -> Tune:
    """Infer what trained in an adapter, per part. Raises UserError where a part has several ranks or scales."""
    modes: dict[str, Any] = dict.fromkeys(PARTS, "frozen")
    for part in PARTS:
        layers = [name for name in adapter.ranks if part_of(name) == part]
        full = {name for name in adapter.replaced if part_of(name) == part}
        if layers and full:
            raise UserError(f"{where}: {part} has both a LoRA and weights in full; {REMEDY}")
        if layers:
            modes[part] = _lora(model, adapter, part, layers, where)
        elif full:
            modes[part] = _full(model, part, full, where)
    if tuning.is_tied(model):
        modes["head"] = modes["embeddings"]
    return Tune(**modes)


def _lora(model: InternVL, adapter: Adapter, part: str, layers: list[str], where: str) -> LoRA:
    ranks, alphas = {adapter.ranks[n] for n in layers}, {round(float(adapter.alphas[n]), 6) for n in layers}
    if len(ranks) > 1 or len(alphas) > 1:
        raise UserError(
            f"{where}: {part} has layers of several ranks {sorted(ranks)} or alphas {sorted(alphas)}; expected one of "
            f"each per part, to go on training; {REMEDY}"
        )
    config = adapter.config
    lora = LoRA(ranks.pop(), alphas.pop(), config.dropout, dora=config.dora)
    if set(target_names(model, part, lora)) != set(layers):
        lora = replace(lora, targets=sorted({n.rpartition(".")[2] for n in layers}))
        if set(target_names(model, part, lora)) != set(layers):
            raise UserError(f"{where}: only some layers of {part} have the LoRA, such as {layers[0]}; {REMEDY}")
    return lora


def _full(model: InternVL, part: str, names: set[str], where: str) -> How:
    choices: list[How] = ["full"]
    if part == "vision_model":
        choices += [Blocks(last) for last in range(1, used_blocks(model) + 1)]
    for mode in choices:
        if names == set(_names(model, part, mode)):
            return mode
    raise UserError(f"{where}: brings weights of {part} in full, {min(names)} among them, but not the part; {REMEDY}")


def _names(model: InternVL, part: str, mode: How) -> Iterable[str]:
    trained = {id(p) for p in tuning.parameters_of(model, part, mode)}
    return (name for name, p in model.named_parameters() if id(p) in trained)


def agreed(model: InternVL, tune: Tune, typed: Tune, where: str) -> Tune:
    """Merge the adapter's modes with the options, which add dropout. Raises UserError where they differ."""
    modes: dict[str, Any] = {}
    options = tuning.modes(model, typed)
    for part in PARTS:
        there, here = getattr(tune, part), options[part]
        if isinstance(there, LoRA) and isinstance(here, LoRA) and _same(model, part, there, here):
            modes[part] = replace(there, dropout=here.dropout)
        elif there == here:
            modes[part] = there
        else:
            raise UserError(
                f"model.tune.{part}: {_words(here)}, but the adapter in {where} has {_words(there)}; leave model.tune "
                "out (null), or give what the adapter has"
            )
    return Tune(**modes)


def _same(model: InternVL, part: str, there: LoRA, here: LoRA) -> bool:
    layers = [set(target_names(model, part, lora)) for lora in (there, here)]
    return (
        (there.rank, there.dora) == (here.rank, here.dora)
        and math.isclose(there.scale, here.scale, rel_tol=1e-6)
        and layers[0] == layers[1]
    )


def _words(mode: How) -> str:
    if isinstance(mode, LoRA):
        targets = f", targets {', '.join(mode.targets)}" if mode.targets else ""
        return f"a {'DoRA' if mode.dora else 'LoRA'} of rank {mode.rank}, alpha {scale_alpha(mode):g}{targets}"
    return f"its last {mode.last} blocks" if isinstance(mode, Blocks) else mode
