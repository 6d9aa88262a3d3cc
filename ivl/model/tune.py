"""What trains: each part of the model frozen, fully tuned, or given a LoRA; and the optimizer groups that follow.

The parts carry the released names: `vision_model`, `mlp1` (the projector) and `language_model`.
LoRA layers are peft's own (Hu et al. 2021, https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ivl.config import read_json
from ivl.families import llm_family
from ivl.model import adapters
from ivl.types import UserError

PARTS = ("vision_model", "mlp1", "language_model")
ADAPTER = "default"
"""peft's name for the one adapter a model carries"""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on the linear layers of a part."""

    rank: int = 16
    """Width of the low-rank matrices."""
    alpha: float | None = None
    """Scale: the update is multiplied by alpha / rank. Default: twice the rank."""
    dropout: float = 0.0
    """Dropout in front of the low-rank matrices, in training."""
    targets: list[str] | None = None
    """Names (last component) of the linear layers to adapt. Default: every linear layer of a block."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Learn magnitude and direction apart (https://arxiv.org/abs/2402.09353)."""
    init: Literal["default", "gaussian"] = "default"
    """How the first matrix starts (the second is zero)."""


@dataclass(frozen=True)
class Tune:
    """What trains, per part: `frozen`, `full`, or the settings of a LoRA such as `{rank: 16}`."""

    vision_model: Literal["frozen", "full"] | LoRA = "frozen"
    """The vision encoder (InternViT)."""
    mlp1: Literal["frozen", "full"] | LoRA = "frozen"
    """The projector between the two."""
    language_model: Literal["frozen", "full"] | LoRA = field(default_factory=LoRA)
    """The language model, its embeddings and head included when tuned in full."""


_TARGETS = {"vision_model": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), "mlp1": ("1", "3")}


def apply(model: nn.Module, tune: Tune) -> None:
    """Freeze everything, then make trainable what `tune` says; LoRA layers are put in place.

    Trainable parameters become float32, whatever the frozen weights are kept in.
    Raises UserError where nothing would train or a target names no linear layer.
    """
    modes = {part: getattr(tune, part) for part in PARTS}
    if len({mode.dora for mode in modes.values() if isinstance(mode, LoRA)}) > 1:
        raise UserError("model.tune: dora is on for one part and off for another; an adapter file holds one kind only")
    for part, mode in modes.items():
        if mode == "full" and not all(p.is_floating_point() for p in getattr(model, part).parameters()):
            raise UserError(f"model.tune.{part}: full, but its weights are quantised; give it a LoRA, or load it whole")
        if isinstance(mode, LoRA):
            _inject(model, _lora_config(mode, target_names(model, part, mode)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for part, mode in modes.items():
        for name, parameter in getattr(model, part).named_parameters():
            if mode == "full" or (isinstance(mode, LoRA) and "lora_" in name):
                if parameter.dtype != torch.float32:
                    parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        # A frozen part computes as it will when the model is used: no dropout, no drop path.
        getattr(model, part).train(mode != "frozen")
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("model.tune: nothing trains; expected at least one of the parts to be full or a LoRA")


def target_names(model: nn.Module, part: str, lora: LoRA) -> list[str]:
    """Full names of the linear layers a LoRA of this part covers."""
    wanted = lora.targets or _TARGETS.get(part) or llm_family(model.config.llm_architecture).lora_targets
    linears = [n for n, m in getattr(model, part).named_modules() if isinstance(m, nn.Linear)]
    found = [n for n in linears if any(n == w or n.endswith("." + w) for w in wanted)]
    missing = [w for w in wanted if not any(n == w or n.endswith("." + w) for n in found)]
    if missing:
        ends = sorted({n.rsplit(".", 1)[-1] for n in linears})
        raise UserError(
            f"model.tune.{part}.targets: no linear layer is named {', '.join(missing)}; there are {', '.join(ends)}"
        )
    return [f"{part}.{n}" for n in found]


def table(model: nn.Module) -> str:
    """What trains, part by part, as text for the start of a run."""
    rows = [("part", "parameters", "trainable", "how")]
    for part in PARTS:
        module = getattr(model, part)
        total = sum(p.numel() for p in module.parameters())
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        adapted = sum(1 for n, _ in module.named_modules() if n.endswith("lora_A"))
        how = f"LoRA on {adapted} layers" if adapted else "full" if trained else "frozen"
        rows.append((part, f"{total:,}", f"{trained:,}", how))
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows.append(("all", f"{total:,}", f"{trained:,}", f"{100 * trained / total:.2f} %"))
    widths = [max(len(r[i]) for r in rows) for i in range(4)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows)


def param_groups(model: nn.Module) -> list[dict]:
    """Optimizer groups: per part, matrices (with the optimizer's own weight decay) and vectors (without any).

    Every trainable parameter is in exactly one group.
    """
    groups = []
    for part in PARTS:
        trained = [p for p in getattr(model, part).parameters() if p.requires_grad]
        matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        if matrices:
            groups.append({"params": matrices, "name": part})
        if vectors:
            groups.append({"params": vectors, "name": f"{part}_no_decay", "weight_decay": 0.0})
    grouped = sum(len(g["params"]) for g in groups)
    assert grouped == sum(1 for p in model.parameters() if p.requires_grad), "a trainable parameter has no group"
    return groups


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that train, by name: what a checkpoint of a run holds."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def has_adapter(model: nn.Module) -> bool:
    """Whether any LoRA layer is in place."""
    return any(n.endswith(f"lora_A.{ADAPTER}") for n, _ in model.named_modules())


def save_adapter(model: nn.Module, tune: Tune, folder: Path, base: str, state: dict[str, Tensor] | None = None) -> None:
    """Write the LoRA as a PEFT adapter folder (adapter_config.json, adapter_model.safetensors).

    Parts tuned in full go along as peft's `modules_to_save`. `base` is the checkpoint it belongs to; `state` the
    tensors to write, by default what trains.
    """
    loras = {part: mode for part in PARTS if isinstance(mode := getattr(tune, part), LoRA)}
    full = [part for part in PARTS if getattr(tune, part) == "full"]
    names = {part: _adapted(model, part) for part in loras}
    first, *_ = loras.values()
    config = _lora_config(first, sorted(n for group in names.values() for n in group))
    config.rank_pattern = {n: lora.rank for part, lora in loras.items() for n in names[part]}
    # One scale formula in the file; where a part has the other, its alpha makes up for it.
    config.use_rslora = False
    config.alpha_pattern = {
        n: _alpha(lora) * (lora.rank**0.5 if lora.rslora else 1) for part, lora in loras.items() for n in names[part]
    }
    config.lora_dropout = max(lora.dropout for lora in loras.values())
    config.modules_to_save = full or None
    config.base_model_name_or_path = base
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    state = trainable_state(model) if state is None else state
    state = {_peft_key(n): t.contiguous().cpu() for n, t in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Put a PEFT adapter folder onto the model: LoRA layers and fully tuned parts. Strict in names and shapes.

    One that another program made, in the names of the releases' own code or of transformers, is translated first.

    Raises UserError where a file is missing or damaged, or the adapter does not fit this model.
    """
    from peft import LoraConfig

    folder = Path(folder)
    settings = read_json(folder / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{folder}/adapter_config.json: expected peft_type LORA, found {settings.get('peft_type')!r}")
    path = folder / "adapter_model.safetensors"
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected the weights of a PEFT adapter") from error
    try:
        foreign = adapters.translated(model, state, settings)
    except UserError as error:
        raise UserError(f"{path}: {error}; it was made for {settings.get('base_model_name_or_path')!r}") from error
    if foreign is None:
        config = LoraConfig.from_pretrained(str(folder))
        config.modules_to_save = None  # our modules stay as they are; peft would wrap them
    else:
        names, state = foreign.ranks, foreign.state
        config = LoraConfig(target_modules=list(names), rank_pattern=names, alpha_pattern=foreign.alphas)
        config.use_dora = foreign.dora
    _inject(model, config)
    model.requires_grad_(False)
    own = {_peft_key(n): p for n, p in model.named_parameters()}
    wanted = {k for k in own if "lora_" in k} | {
        k for k in own for part in settings.get("modules_to_save") or () if k.startswith(f"base_model.model.{part}.")
    }
    problems = [f"missing {k}" for k in sorted(wanted - set(state))]
    problems += [f"unexpected {k}" for k in sorted(set(state) - set(own))]
    problems += [
        f"{k}: expected {tuple(own[k].shape)}, found {tuple(t.shape)}"
        for k, t in sorted(state.items())
        if k in own and own[k].shape != t.shape
    ]
    if problems:
        raise UserError(
            f"{path}: the adapter does not fit this model ({len(problems)} tensors): {'; '.join(problems[:5])}; "
            f"it was made for {settings.get('base_model_name_or_path')!r}"
        )
    with torch.no_grad():
        for key, tensor in state.items():
            own[key].copy_(tensor)


def merge(model: nn.Module) -> None:
    """Add every LoRA to the weights under it, in float32, and leave plain linear layers in the dtypes they had.

    Raises UserError where the weights under it are quantised, or a merged weight is not finite.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
        linear = layer.get_base_layer()
        dtype = linear.weight.dtype
        if not dtype.is_floating_point:
            raise UserError(f"{name}: a LoRA cannot be merged into {dtype} weights; load the model without quantize")
        layer.float()
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise UserError(f"{name}: the merged weight is not finite; the adapter is damaged or diverged") from error
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, linear.to(dtype).requires_grad_(False))


def _alpha(lora: LoRA) -> float:
    return 2 * lora.rank if lora.alpha is None else lora.alpha


def _lora_config(lora: LoRA, targets: Iterable[str]):
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=_alpha(lora),
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=True if lora.init == "default" else lora.init,
    )


def _inject(model: nn.Module, config) -> None:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    del model.peft_config  # parts are injected one after the other; peft would take the next for a second adapter


def _adapted(model: nn.Module, part: str) -> list[str]:
    ending = ".lora_A"
    return [f"{part}.{n.removesuffix(ending)}" for n, _ in getattr(model, part).named_modules() if n.endswith(ending)]


def _peft_key(name: str) -> str:
    """Our parameter's name → its name in a PEFT adapter file."""
    name = name.replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
    return "base_model.model." + name.replace(f".{ADAPTER}.", ".").replace(".base_layer.", ".")


def adapted_parts(folder: str | Path) -> list[str]:
    """The parts of the model that an adapter folder changes. Raises UserError where it has no weights."""
    path = Path(folder) / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            parts = {adapters.part_of(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected the weights of a PEFT adapter") from error
    return [part for part in PARTS if part in parts]


def adapter_base(folder: str | Path) -> str | None:
    """The checkpoint an adapter folder says it belongs to."""
    return read_json(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
