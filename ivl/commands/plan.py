"""Plan of a run: memory, operations and time before a weight is read (`python -m ivl plan`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ivl.architecture.config import Config
from ivl.architecture.families import config_for, find_model, llm_family
from ivl.architecture.hf_config import read_config
from ivl.commands.plan_reference import reference_of, reference_plan, reference_text
from ivl.errors import amount
from ivl.estimate import flops
from ivl.estimate.hardware import DEVICES, Device, find_device
from ivl.estimate.memory import MemoryEstimate, memory_needed
from ivl.estimate.training_step import BatchShape, ShallowModel, Strategy, TrainSetup
from ivl.finetune.reference import is_fresh_lora
from ivl.hub.hints import check_model_folder
from ivl.hub.unsupported import refuse_name
from ivl.model.moe.experts import idle_parameters
from ivl.options import DataOptions, LoRA, PlanOptions, Tune
from ivl.parallel.devices import parse_size
from ivl.types import UserError

SUPERVISED = 0.25
"""Share of a row's tokens that is learnt from, where no rows are given."""
FULL = 0.95
"""Fill of packs: share of a pack's tokens that rows take."""


@dataclass(frozen=True)
class Rows:
    """Rows of an epoch, and the largest micro-batch."""

    largest: BatchShape
    work: flops.Work | None
    """Work of an epoch; None: unknown."""
    batches: float | None
    """Micro-batches of an epoch, over all devices."""
    known: str
    """Source of these numbers, for people."""


def main(options: PlanOptions) -> int:
    """Print a plan. Raises UserError where it does not fit the memory given."""
    if options.headers:
        from ivl.commands.config_headers import rewrite

        rewrite(options.headers)
        return 0
    from ivl.lit.cli import read  # slow to import

    fit = read(options.fit)
    if fit.demo:
        from ivl.demo import prepare

        prepare(Path(fit.demo))
    device = _device(options.device)
    config = checkpoint_config(str(fit.model.pretrained))
    setup = setup_of(
        fit, options.devices, device is not None or options.memory is not None or str(fit.trainer.accelerator)
    )
    rows = rows_of(fit, config)
    sketch = ShallowModel(config, setup)
    memory = memory_needed(sketch, rows.largest)
    limit = _size(options.memory) if options.memory else device.memory if device else None
    plan = summary(fit, config, sketch, rows, memory, device, options.efficiency)
    if limit is not None and memory.total <= limit:
        plan["faster"] = spare(config, setup, rows.largest, limit, plan["flops_per_step"]["micro_batch"])
    print(json.dumps(plan, indent=2) if options.json else report(plan))
    if limit is not None and memory.total > limit:
        change = first_fit(config, setup, rows.largest, limit)
        raise UserError(
            f"does not fit: about {memory.total / 1e9:.1f} GB are needed on a device of {limit / 1e9:.1f} GB; {change}"
        )
    return 0


def _device(name: str | None) -> Device | None:
    if name is None:
        return None
    device = find_device(name)
    if device is None:
        raise UserError(f"--device: {name!r} is not known; expected one of {', '.join(DEVICES)}, or give --memory")
    return device


def _size(text: str) -> int:
    """`24GB`, `80GiB` or a number of gigabytes, in bytes."""
    return parse_size(f"{text}GB" if text.replace(".", "").isdigit() else text, "memory")


def checkpoint_config(pretrained: str) -> Config:
    """Config of a folder, or of a released model by name. Raises UserError for anything else."""
    if Path(pretrained).is_dir():
        check_model_folder(Path(pretrained))
        return read_config(pretrained)
    refuse_name(pretrained)
    if (row := find_model(pretrained)) is None:
        raise UserError(
            f"--model.pretrained: {pretrained!r} is neither a folder nor a released model (python -m ivl models)"
        )
    return Config.from_dict(config_for(row))


# From the options of fit


def setup_of(fit: Any, devices: int | None, on_gpu: bool | str) -> TrainSetup:
    """Options of a fit that decide memory."""
    trainer, model = fit.trainer, fit.model
    configured = trainer.devices if isinstance(trainer.devices, int) and trainer.devices > 0 else 1
    count = devices or _layer_split_devices(trainer.strategy) or configured
    optimizer = getattr(model.optimizer, "class_path", None) or "torch.optim.AdamW"
    tune, strategy = Tune.from_dict(_plain(model.tune)), strategy_of(trainer.strategy, count)
    return TrainSetup(
        tune=tune,
        precision=str(trainer.precision or "32-true"),
        quantize=model.quantize,
        vision_checkpointing=model.checkpointing.vision_model,
        language_checkpointing=model.checkpointing.language_model,
        attention="eager" if model.attention == "eager" else "sdpa",
        efficient=model.efficient,
        optimizer=optimizer,
        accumulate=trainer.accumulate_grad_batches,
        strategy=strategy,
        devices=count,
        on_gpu=on_gpu is True or on_gpu not in ("cpu", False),
        keeps_start=reference_of(fit, tune, strategy) == "live" and not is_fresh_lora(tune, fit.model.adapter),
    )


def _plain(value: Any) -> Any:
    """Convert namespaces and dataclasses to dicts, unset values left out."""
    if hasattr(value, "__dict__"):
        value = vars(value)
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def strategy_of(strategy: Any, devices: int) -> Strategy:
    """Name of a Lightning strategy in `ivl.estimate.training_step`."""
    path = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "") or "auto"
    name = path.rpartition(".")[2].lower()
    if "deepspeed" in name:
        stage = getattr(getattr(strategy, "init_args", None), "stage", None)
        return "zero3" if "3" in name or stage == 3 else "zero2"
    if name == "layersplit":
        return "layer_split"
    if any(kind in name for kind in ("fsdp", "modelparallel", "sharded")):
        return "fsdp2"
    return "ddp" if devices > 1 else "single"


def _layer_split_devices(strategy: Any) -> int | None:
    """Number of devices that share the layers of one process, by the strategy's settings; None: no layer split."""
    if strategy_of(strategy, 1) != "layer_split":
        return None
    settings = strategy.init_args
    devices = settings.devices or len(settings.device_max_memory or ()) or 2
    return devices if isinstance(devices, int) else len(devices)


def rows_of(fit: Any, config: Config) -> Rows:
    """Rows to train on: the named ones where they are at hand, else rows of the greatest length."""
    from ivl.lit.cli import data_options

    data, paired = data_options(fit), fit.model.objective != "sft"
    if (why := _why_not_read(fit)) is None:
        data = replace(data, report=None)  # the report is the run's to write
        return _read_rows(str(fit.model.pretrained), data, paired)
    packed = data.is_packed
    length = data.max_length or config.llm["max_position_embeddings"]
    if packed and (data.pack_tokens or not paired):  # a pack has room for both answers of a pair
        length = data.tokens_per_pack // (2 if paired else 1)
    tiled = config.dynamic_image_size if data.dynamic_image_size is None else data.dynamic_image_size
    tiles = (data.max_tiles or config.max_dynamic_patch) + config.use_thumbnail if tiled else 1
    most = max(0, length - 64) // config.tokens_per_tile
    rows = 1 if packed else data.rows_per_batch
    tiles = min(data.pack_tiles or most, most) if packed else rows * min(tiles, most)
    supervised = max(1, int(SUPERVISED * rows * max(length - tiles // rows * config.tokens_per_tile, length // 4)))
    if paired:  # the prompt is computed once
        length, supervised = length + supervised // rows, 2 * supervised
    micro = BatchShape(rows, length, tiles, supervised, packed)
    kind = "a prompt and two answers" if paired else "rows"
    known = f"assumed: {kind} of {length} tokens, the tiles that they can hold, since {why}"
    return Rows(micro, None, None, known)


def _why_not_read(fit: Any) -> str | None:
    """Reason why the lengths of the rows are not read; None: they are."""
    if fit.data.mixture:
        return "data.mixture is not read here"
    files = [fit.data.train] if isinstance(fit.data.train, str) else fit.data.train or []
    if not files:
        return "no --data.train is given"
    for file in files:
        if not Path(file).is_file():
            return f"{file} is not a file here"
    if not Path(fit.model.pretrained).is_dir():
        return f"{fit.model.pretrained} is not a folder here, and lengths need its tokenizer"
    return None


def _read_rows(pretrained: str, options: DataOptions, paired: bool) -> Rows:
    from ivl.lit.datamodule import IvlData
    from ivl.lit.training.largest import computed_tokens, largest_batch

    data = IvlData(pretrained, **vars(options))
    if paired:
        data.learn_pairs()
    index, micro, lengths = data.training_index(), largest_batch(data), computed_tokens(data)
    count, tokens, tiles = len(index), int(lengths.sum()), int(index.tiles.sum())
    batches = math.ceil(count / micro.rows)
    if micro.packed:
        batches = math.ceil(int(index.tokens.astype(int).sum()) / (FULL * data.options.tokens_per_pack))
    # Padding is not computed, and a row sees no other.
    work = flops.Work(tiles, tokens, int((lengths**2).sum()), int(index.supervised.sum()))
    what = f"{count} pairs, {tokens} tokens of prompts and both answers" if paired else f"{count} rows, {tokens} tokens"
    return Rows(micro, work, batches, f"read: {what}, {tiles} tiles")


# The plan


def summary(
    fit: Any,
    config: Config,
    sketch: ShallowModel,
    rows: Rows,
    memory: MemoryEstimate,
    device: Device | None,
    efficiency: float,
) -> dict[str, Any]:
    """Return the plan, as JSON takes it. Bytes, operations, seconds."""
    setup, micro = sketch.setup, rows.largest
    parts = {part: {"parameters": p.total, "trainable": p.trainable} for part, p in sketch.parameters().items()}
    computed, work = flops.costs(config, setup, micro.supervised), work_of(micro)
    done, required = computed.total(work), flops.model_costs(config, setup.tune).total(work)
    times = setup.accumulate * (1 if setup.strategy == "layer_split" else setup.devices)
    plan: dict[str, Any] = {
        "pretrained": str(fit.model.pretrained),
        "parts": parts,
        "idle_parameters": idle_parameters(config.llm) if llm_family(config.llm_architecture).mlp == "experts" else 0,
        "strategy": setup.strategy,
        "devices": setup.devices,
        "precision": setup.precision,
        "batch": asdict(micro) | {"accumulate": setup.accumulate},
        "rows": rows.known,
        "memory": asdict(memory) | {"total": memory.total},
        "flops_per_step": {"model": required * times, "computed": done * times, "micro_batch": done},
        "tokens_per_step": work.tokens * times,
        "estimated": True,
    }
    if how := reference_of(fit, setup.tune, setup.strategy):
        plan["reference"] = reference_plan(config, setup, how, work, rows.work)
    live = plan.get("reference", {})
    done += live.get("flops_per_micro_batch", 0.0)
    if rows.work is not None and rows.batches is not None:
        plan["epoch"] = {
            "steps": math.ceil(rows.batches / times),
            "tokens": rows.work.tokens,
            "flops": computed.total(rows.work) + live.get("flops_per_epoch", 0.0),
        }
    if device is not None:
        working = 1 if setup.strategy == "layer_split" else setup.devices
        rate = device.flops * efficiency * working
        plan["device"] = {
            "name": device.name,
            "efficiency_assumed": efficiency,
            "step_seconds": done * times / rate,
        }
        if "epoch" in plan:
            plan["device"]["epoch_seconds"] = plan["epoch"]["flops"] / rate
    return plan


def work_of(micro: BatchShape) -> flops.Work:
    """Return the work of a batch, padding included."""
    return flops.Work(micro.tiles, micro.rows * micro.length, micro.rows * micro.length**2, micro.supervised)


def operations(config: Config, setup: TrainSetup, micro: BatchShape) -> float:
    """Floating-point operations of one micro-batch, forward and backward."""
    return flops.costs(config, setup, micro.supervised).total(work_of(micro))


def report(plan: dict[str, Any]) -> str:
    """Format the plan for people."""
    lines = [f"{plan['pretrained']}: {plan['strategy']} on {plan['devices']}, {plan['precision']}", ""]
    lines.append(f"{'part':<16}{'parameters':>16}{'trainable':>16}")
    lines += [f"{k:<16}{v['parameters']:>16,}{v['trainable']:>16,}" for k, v in plan["parts"].items()]
    sums = [sum(v[k] for v in plan["parts"].values()) for k in ("parameters", "trainable")]
    lines.append(f"{'all':<16}{sums[0]:>16,}{sums[1]:>16,}")
    if idle := plan["idle_parameters"]:
        lines.append(f"{'for one token':<16}{sums[0] - idle:>16,}")
    lines.append("")
    batch, memory = plan["batch"], plan["memory"]
    kind = "packed" if batch["packed"] else "padded"
    lines.append(
        f"largest batch: {batch['rows']} x {batch['length']} tokens ({kind}), {batch['tiles']} tiles, "
        f"{batch['supervised']} supervised; {batch['accumulate']} per step ({plan['rows']})"
    )
    lines.append("memory of one device, estimated, GB:")
    names = ("weights", "gradients", "optimizer", "activations", "buffers", "total")
    lines += [f"  {name:<14}{amount(memory[name] / 1e9):>9}" for name in names]
    lines.append(f"  logits are {amount(memory['logits'] / 1e9)} of the activations, whatever the length")
    work = plan["flops_per_step"]
    lines.append(
        f"\na step: {plan['tokens_per_step']:,} tokens at most, {amount(work['model'] / 1e12)} TFLOP of the model, "
        f"{amount(work['computed'] / 1e12)} with what is computed again"
    )
    if "reference" in plan:
        lines.append(reference_text(plan["reference"]))
    if epoch := plan.get("epoch"):
        lines.append(f"an epoch: about {epoch['steps']:,} steps, {epoch['tokens']:,} tokens")
    if device := plan.get("device"):
        seconds = f"{device['step_seconds']:.3g} s a step"
        if "epoch_seconds" in device:
            seconds += f", {device['epoch_seconds'] / 3600:.3g} h an epoch"
        lines.append(f"{device['name']}, {100 * device['efficiency_assumed']:.0f} % of its rate assumed: {seconds}")
    if plan.get("faster"):
        lines.append(f"faster: {plan['faster']}")
    return "\n".join(lines)


def spare(config: Config, setup: TrainSetup, micro: BatchShape, limit: float, now: float) -> str | None:
    """Options that switch recomputation off and still fit, for as many blocks as possible; None: none fits."""
    names = {"language_model": "language_checkpointing", "vision_model": "vision_checkpointing"}
    on = tuple(part for part, name in names.items() if getattr(setup, name))
    for off in filter(None, dict.fromkeys((on, on[:1], on[1:]))):
        changed: dict[str, Any] = {names[part]: False for part in off}
        candidate = replace(setup, **changed)
        total = memory_needed(ShallowModel(config, candidate), micro).total
        if total <= limit:
            options = " ".join(f"--model.checkpointing.{part} false" for part in off)
            saved = 1 - operations(config, candidate, micro) / now
            return f"{options} fits as well: {total / 1e9:.2f} GB, {100 * saved:.0f} % fewer operations"
    return None


def first_fit(config: Config, setup: TrainSetup, micro: BatchShape, limit: float) -> str:
    """Advice: the shortest series of the usual changes that fits."""
    options: list[str] = []
    for text, changed, batch in changes(setup, micro):
        options.append(text)
        if memory_needed(ShallowModel(config, changed), batch).total <= limit:
            return "it would fit with " + ", ".join(options)
    return "no usual change makes it fit: take a larger device, or more of them with sharding"


def changes(setup: TrainSetup, micro: BatchShape) -> Iterator[tuple[str, TrainSetup, BatchShape]]:
    """Yield the usual changes, the cheapest first, each on top of those before it."""
    if not setup.language_checkpointing:
        setup = replace(setup, language_checkpointing=True)
        yield "--model.checkpointing.language_model true", setup, micro
    if not setup.vision_checkpointing and setup.tune.vision_model != "frozen":
        setup = replace(setup, vision_checkpointing=True)
        yield "--model.checkpointing.vision_model true", setup, micro
    if micro.rows > 1:
        rows = micro.rows
        micro = BatchShape(1, micro.length, math.ceil(micro.tiles / rows), math.ceil(micro.supervised / rows))
        setup = replace(setup, accumulate=setup.accumulate * rows)
        yield f"--data.batch_size 1 --trainer.accumulate_grad_batches {setup.accumulate}", setup, micro
    if setup.precision.startswith("32") and setup.on_gpu:
        setup = replace(setup, precision="bf16-mixed")
        yield "--trainer.precision bf16-mixed", setup, micro
    if setup.devices > 1 and setup.strategy in ("single", "ddp"):
        setup = replace(setup, strategy="fsdp2")
        yield "--config configs/strategy/fsdp2.yaml", setup, micro
    if any(mode == "full" for mode in (setup.tune.language_model, setup.tune.vision_model)):
        setup = replace(setup, tune=Tune(language_model=LoRA(rank=16)))
        yield "--config configs/tune/lora.yaml", setup, micro
    if micro.tiles > 7:
        micro = replace(micro, tiles=7)
        yield "--data.max_tiles 6", setup, micro
    if setup.quantize is None and isinstance(setup.tune.language_model, LoRA) and setup.on_gpu:
        setup = replace(setup, quantize="nf4")
        yield "--config configs/tune/qlora.yaml", setup, micro
