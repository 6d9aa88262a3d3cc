"""Export of a trained model as a checkpoint folder: `python -m ivl export --run RUN --out DIR`.

    trained tensors (of a run, an adapter, or none) + their base → merged → written beside DIR → verified → renamed

DIR holds `export_report.json` with every check of `ivl.export.verify`, and a model card, README.md. An export
that fails leaves nothing. With `--push OWNER/NAME` DIR is uploaded to the Hugging Face hub.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ivl import __version__
from ivl.architecture.config import read_json
from ivl.architecture.families import llm_family
from ivl.checkpoint.ckpt_file import best_beside, trained_state
from ivl.checkpoint.folder import Checkpoint
from ivl.checkpoint.hf_layout import hf_tensor
from ivl.checkpoint.weights import save_weights
from ivl.data.processor import Processor
from ivl.export.files import Settings, hf_rows, write_hf, write_released
from ivl.export.model_card import CARD, model_card
from ivl.export.push import REPORT, Push
from ivl.export.target import beside, check_target
from ivl.export.verify import Check, Probe, stored_dtype, verify, verify_adapter
from ivl.finetune import tune as tuning
from ivl.finetune.adapter import peft_adapter as adapting
from ivl.finetune.adapter.adapter_writer import Layout
from ivl.finetune.tune import PARTS, How
from ivl.hub import resolve, resolve_adapter
from ivl.hub.hints import is_run
from ivl.model.internvl import InternVL
from ivl.options import DType, ExportOptions, LoRA, Quantize, Tune
from ivl.parallel.devices import check_at_hand, device_of, parse_size
from ivl.run import Run, run_and_checkpoint, weights_of
from ivl.storage.files import write_json, write_text
from ivl.types import UserError, printable

PROCESSING = ("system_message", "thinking", "dynamic_image_size", "pad2square")


@dataclass
class Trained:
    """Trained weights to add to a base: the tensors of a run, an adapter folder, or none."""

    base: str
    """Folder or name of the model."""
    tune: Tune | None = None
    state: dict[str, Tensor] | None = None
    """Trained tensors by name, with `tune`"""
    adapter: Path | None = None
    max_tiles: int | None = None
    processing: dict[str, Any] = field(default_factory=dict)
    """Options of the run's processor, for prompts and tiles as in training."""
    quantize: Quantize | None = None
    """Quantization of the base during training."""
    where: str = ""

    @property
    def run(self) -> Run | None:
        """Run that the weights came from, or that the adapter's folder lies in."""
        if self.adapter is None:
            return Run.of(self.where or None)
        return Run(self.adapter.parent) if is_run(self.adapter.parent) else None

    @property
    def parts(self) -> list[str]:
        """Parts whose weights differ from the base's."""
        if self.adapter is not None:
            return adapting.adapted_parts(self.adapter)
        return [part for part, mode in self._modes().items() if mode != "frozen"]

    @property
    def lora_parts(self) -> list[str]:
        if self.adapter is not None:
            return self.parts
        return [part for part, mode in self._modes().items() if isinstance(mode, LoRA)]

    def _modes(self) -> dict[str, How]:
        return {} if self.tune is None else {part: self.tune.mode(part) for part in PARTS}

    def model(self, folder: Path, dtype: str, device: str) -> InternVL:
        """Load the base and add the trained weights, not yet merged, in eval mode."""
        return self.onto(InternVL.from_pretrained(folder, dtype=dtype, device=device))

    def onto(self, model: InternVL) -> InternVL:
        """Add the trained weights to the base's model, not merged, in eval mode.

        Weights that were trained in full take the model's dtype, since nothing casts between layers outside training;
        a LoRA stays in float32.
        """
        dtype = model.dtype
        if self.adapter is not None:
            adapting.load_adapter(model, self.adapter)
        elif self.state is not None and self.tune is not None:
            check_at_hand(model)
            tuning.apply(model, self.tune)
            _copy_into(model, self.state, self.where)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_" not in name:
                    parameter.data = parameter.data.to(dtype)
        return model.eval().requires_grad_(False)


def export(out: str, **options: Any) -> Path:
    """Write a trained model as a checkpoint folder, and verify it. Returns the folder.

    `options`: as in ExportOptions. Raises UserError for a user's mistake; nothing is left behind then.
    """
    return _export(ExportOptions(out=out, **options))


def _export(options: ExportOptions) -> Path:
    shard_bytes = parse_size(options.max_shard_size, "max_shard_size")
    target = Path(options.out)
    pushing = Push.of(options.push, options.private, options.push_replace)
    if options.sources:
        trained = _trained(options)
        if options.adapter_only and (trained.tune is None or not trained.lora_parts):
            raise UserError("--adapter_only: expected --run with the run of a LoRA; there is none to write here")
        check_target(target, [p for p in (options.run, options.adapter, trained.base) if p], options.overwrite)
        if pushing is not None:
            pushing.check_empty()
        report = _write(target, trained, options, shard_bytes)
        print(printable(_summary(target, report)))
        if options.run and (best := best_beside(trained.where)):
            print(printable(f"  {trained.where}: {best}"))
    if pushing is not None:
        pushing.push(target)
    return target


def _write(target: Path, trained: Trained, options: ExportOptions, shard_bytes: int) -> dict[str, Any]:
    """Write and verify the folder, with a card. Returns its report."""
    settings, device = _settings(trained, options.dtype), options.device
    with beside(target) as temporary:
        probe = Probe.of(settings.processor, str(device_of(device)))
        if options.adapter_only:
            report = _write_adapter(trained, settings, probe, temporary, device, options.layout)
        else:
            layout = options.layout or "released"
            report = _write_model(trained, settings, probe, temporary, device, layout, shard_bytes)
        write_json(temporary / REPORT, report)
        name = options.push or target.name
        write_text(temporary / CARD, model_card(name, report, settings.base, trained.run, options.adapter_only))
    return report


def _settings(trained: Trained, dtype: DType) -> Settings:
    folder = resolve(trained.base)
    checkpoint = Checkpoint.open(folder)
    return Settings(
        base=folder,
        checkpoint=checkpoint,
        processor=Processor.from_pretrained(trained.base, **trained.processing),
        max_tiles=trained.max_tiles or checkpoint.config.max_dynamic_patch,
        dtype=stored_dtype(checkpoint.files) if dtype == "auto" else dtype,
    )


def _write_model(
    trained: Trained, settings: Settings, probe: Probe, folder: Path, device: str, layout: str, shard_bytes: int
) -> dict[str, Any]:
    config = settings.checkpoint.config
    write = {"released": write_released, "hf": write_hf}[layout]
    notes = write(settings, folder)  # first: it refuses values without a form in the layout before any weight is read
    model = trained.model(settings.base, settings.dtype, device)
    before = probe(model)
    adapting.merge(model)
    model.to(getattr(torch, settings.dtype))
    names = {"released": llm_family(config.llm_architecture).layout, "hf": "hf"}
    state = model.state_dict()
    if layout == "hf":
        rows = read_json(folder / "config.json")["text_config"]["vocab_size"]
        state = {name: hf_tensor(name, tensor, config, model.image_token_id, rows) for name, tensor in state.items()}
    save_weights(state, folder, names[layout], config, shard_bytes)
    del model, state  # the written one is read next, and both may not fit
    checks = verify(folder, settings, layout, trained.parts, probe, before, device)
    if trained.adapter and (other := adapting.other_base(trained.adapter, trained.base)):
        notes.append(other)
    beyond = [part for part in trained.parts if part != "language_model"]
    if trained.lora_parts and beyond:
        notes.append(
            f"the adapter changes {' and '.join(beyond)}: vLLM and lmdeploy serve adapters of the language model only, "
            "so serve this merged folder, not the adapter"
        )
    if trained.quantize:
        notes.append(
            f"trained on a base in {trained.quantize}, merged into the whole weights: answers differ a little from the "
            "run's; load the folder with quantize for the same memory"
        )
    return _report(trained, settings, layout, notes, checks, _commands(layout, config.llm_architecture, folder))


def _write_adapter(
    trained: Trained, settings: Settings, probe: Probe, folder: Path, device: str, layout: Layout | None
) -> dict[str, Any]:
    assert trained.tune is not None, "only a run's LoRA is written as an adapter"
    layout = layout or settings.checkpoint.config.layout
    config, ends = settings.checkpoint.config, {"embeddings", "head"} & set(trained.parts)
    if layout == "hf" and ends and hf_rows(settings) != config.llm["vocab_size"]:
        raise UserError(
            f"--adapter_only --layout hf: {' and '.join(sorted(ends))} trained, and have a row more in the hf layout, "
            "for its token <video>; write the merged model, with --layout hf and without --adapter_only"
        )
    model = trained.model(settings.base, settings.dtype, device)
    before = probe(model)
    adapting.save_adapter(model, trained.tune, folder, trained.base, trained.state, layout)
    del model
    reloaded = Trained(trained.base, adapter=folder).model(settings.base, settings.dtype, device)
    checks = verify_adapter(folder, before, probe(reloaded), settings.dtype)
    notes = []
    if layout != config.layout:
        notes.append(
            f"its names are those of the {layout} layout: PEFT loads it onto the base written with --layout {layout}"
        )
    commands = {"merge": "python -m ivl export --adapter {} --out OUT"}
    return _report(trained, settings, f"{layout} adapter", notes, checks, commands)


def _report(
    trained: Trained, settings: Settings, layout: str, notes: list[str], checks: list[Check], commands: dict[str, str]
) -> dict[str, Any]:
    """Report of the export, as JSON takes it. Raises UserError where a check failed."""
    failed = [check for check in checks if not check.ok]
    if failed:
        raise UserError(
            "the export was not kept, as it failed its own checks: "
            + "; ".join(f"{check.name}: {check.detail}" for check in failed)
        )
    return {
        "program": f"ivl {__version__}",
        "from": trained.where or trained.base,
        "base": trained.base,
        "layout": layout,
        "dtype": settings.dtype,
        "parts": trained.parts,
        "max_tiles": settings.max_tiles,
        "checks": [vars(check) for check in checks],
        "notes": notes,
        "commands": commands,
    }


def _commands(layout: str, architecture: str, folder: Path) -> dict[str, str]:
    """Command to start each engine that takes the folder; {} stands for it."""
    if layout == "hf":
        return {
            "transformers": "AutoModelForImageTextToText.from_pretrained('{}')",
            "vllm": "vllm serve {}",
            "lmdeploy": "lmdeploy serve api_server {} --backend pytorch",
        }
    if not list(folder.glob("*.py")):  # the engines run them
        return {"ivl": "python -m ivl chat --model {}"}
    backend = " --backend pytorch" if architecture == "Phi3ForCausalLM" else ""  # not in its turbomind
    vllm = {} if architecture == "InternLM2ForCausalLM" else {"vllm": "vllm serve {} --trust-remote-code"}  # see notes
    return vllm | {
        "lmdeploy": f"lmdeploy serve api_server {{}}{backend}",
        "transformers": "AutoModel.from_pretrained('{}', trust_remote_code=True)",
    }


def _summary(target: Path, report: dict[str, Any]) -> str:
    lines = [
        f"{target}: {report['layout']} layout, {report['dtype']}, {len(report['checks'])} checks passed ({REPORT})"
    ]
    lines += [f"  note: {note}" for note in report["notes"]]
    lines += [f"  {name + ':':<14}{command.format(target)}" for name, command in report["commands"].items()]
    return "\n".join(lines)


# -- trained weights ---------------------------------------------------------------------------------------------


def _trained(options: ExportOptions) -> Trained:
    if options.run is not None:
        return read_run(options.run, "--run", options.base)
    if options.adapter is not None:
        folder = resolve_adapter(options.adapter)
        base = adapting.base_of(folder, options.base, "--base")
        return Trained(base, adapter=folder, where=options.adapter)
    return Trained(str(options.base))


def read_run(path: str | Path, option: str, base: str | None = None) -> Trained:
    """Read the trained weights of a run's folder, or of a checkpoint in it, with the settings in its config.yaml."""
    run, checkpoint = run_and_checkpoint(path, option, "--adapter")
    file = weights_of(checkpoint)
    if file.is_dir():
        raise UserError(
            f"{file}: a checkpoint in pieces, one per process; expected one file. Under DeepSpeed a run leaves it at "
            f"its end: go on with `fit --ckpt_path {file}`"
        )
    return Trained(
        base or run.base,
        run.tune,
        trained_state(file),
        max_tiles=run.data.get("max_tiles"),
        processing={name: run.data[name] for name in PROCESSING if run.data.get(name) is not None},
        quantize=run.model.get("quantize"),
        where=str(file),
    )


def _copy_into(model: InternVL, state: dict[str, Tensor], where: str) -> None:
    tensors = tuning.trainable_state(model)
    differing = sorted(tensors.keys() ^ state.keys())
    differing += [n for n in tensors.keys() & state.keys() if tensors[n].shape != state[n].shape]
    if differing:
        raise UserError(
            f"{where}: does not hold what the run's config.yaml says was trained on this base: {len(differing)} "
            f"tensors differ, {differing[0]} among them; is --base the checkpoint of this run?"
        )
    for name, tensor in state.items():
        tensors[name].copy_(tensor)


def main(options: ExportOptions) -> int:
    """Run the command. Returns 0. Raises UserError for a user's mistake."""
    _export(options)
    return 0
