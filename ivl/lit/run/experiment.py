"""Identity of an experiment: options and files that two runs of it share.

Each checkpoint holds it. `--ckpt_path last` takes a checkpoint of the same experiment only; a fit from a checkpoint of
another one is refused, or logs the options that count now. Lengths of runs, learning rates, logs and machines may
change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from ivl.architecture.families import find_model
from ivl.data.sets.sources import is_meta
from ivl.finetune.tune import PARTS, scale_alpha
from ivl.hub import resolve_adapter
from ivl.options import LoRA, Tune
from ivl.storage.files import file_digest
from ivl.types import UserError, first_few, shortened

Experiment = dict[str, Any]
"""Option → plain value; files have a `digest` to compare and a `name` to show"""

WEIGHTS = ("model.pretrained", "model.tune", "model.adapter", "model.quantize")
ROWS = ("data.train", "data.mixture", "data.val_fraction", "data.seed", "data.shuffle", "seed_everything")
LENGTHS = (
    *("data.max_length", "data.max_tiles", "data.share_tiles", "data.dynamic_image_size", "data.on_too_long"),
    "data.learn",
)
"""Options that the order of rows or batches depends on, as the above"""
BATCHES = (
    *("data.batch_size", "data.packing", "data.pack_tokens", "data.pack_tiles", "data.group_by_length"),
    "trainer.accumulate_grad_batches",
)
"""Options of the size of a batch: they may change at the end of an epoch"""
COUNTED = (
    *("model.objective", "model.loss_reduction", "model.label_smoothing", "model.neftune", "model.router_aux_loss"),
    *("data.system_message", "data.compact_boxes"),
    *("data.video", "data.resize", "data.exif", "data.pad2square", "data.thinking"),
)
"""Options that a resumed run may change"""
_ADDED = {"model.objective": "sft", "data.learn": "all"}
"""Options that older checkpoints do not have, and their meaning there"""


def experiment_of(config: Namespace) -> Experiment:
    """Return the identity of the experiment of options of `fit`. Raises UserError where a file is missing."""
    experiment: Experiment = {}
    for option in (*WEIGHTS, *ROWS, *LENGTHS, *BATCHES, *COUNTED):
        experiment[option] = _plain(config.get(option))
    experiment["model.pretrained"] = _checkpoint(str(config.model.pretrained))
    experiment["model.tune"] = tune_settings(Tune.from_dict(experiment["model.tune"] or {}))
    if config.model.adapter:
        folder = _folder(resolve_adapter(config.model.adapter), "*.safetensors")
        experiment["model.adapter"] = folder | {"name": str(config.model.adapter)}
    train = experiment["data.train"]
    experiment["data.train"] = [_rows(path) for path in ([train] if isinstance(train, str) else train or ())]
    experiment["data.mixture"] = [
        _source(source) | {"path": _rows(source["path"])} for source in experiment["data.mixture"] or ()
    ]
    return experiment


def tune_settings(tune: Tune) -> dict[str, Any]:
    """Return the options of `tune` per part, as plain values with defaults filled in."""
    modes = {part: tune.mode(part) for part in PARTS}
    return {
        part: asdict(mode) | {"alpha": scale_alpha(mode)} if isinstance(mode, LoRA) else _plain(mode)
        for part, mode in modes.items()
    }


def differences(there: Experiment, here: Experiment, options: Iterable[str]) -> list[str]:
    """Describe the options that differ between a checkpoint's experiment (`there`) and this one (`here`)."""
    lines = []
    for option in options:
        before, now = there.get(option, _ADDED.get(option)), here.get(option)
        if _compared(before) == _compared(now):
            continue
        if isinstance(before, dict) and isinstance(now, dict) and "digest" not in (*before, *now):
            inner = [k for k in sorted({*before, *now}) if _compared(before.get(k)) != _compared(now.get(k))]
            lines += [f"{option}.{k} {_shown(before.get(k))} there, {_shown(now.get(k))} here" for k in inner]
        elif _shown(before) == _shown(now):
            lines.append(f"{option}: {_shown(now)} has another content by now")
        else:
            lines.append(f"{option} {_shown(before)} there, {_shown(now)} here")
    return lines


def check_same(path: str, there: Experiment, here: Experiment, epoch_ended: bool) -> list[str]:
    """Describe the options that a resumed run changes.

    Raises UserError where the checkpoint's weights or its position among the rows do not fit this experiment.
    """
    fixed = (*WEIGHTS, *ROWS, *LENGTHS, *(() if epoch_ended else BATCHES))
    if lines := differences(there, here, fixed):
        raise UserError(
            f"--ckpt_path {path}: of another experiment: {first_few(lines, 4)}. Give what it was trained with, or "
            "begin anew without --ckpt_path (--model.adapter RUN/adapter goes on training its LoRA)"
        )
    return differences(there, here, (*(BATCHES if epoch_ended else ()), *COUNTED))


def _source(source: dict[str, Any]) -> dict[str, Any]:
    """Options of a source, without those that older checkpoints do not have where they change nothing."""
    return {key: value for key, value in source.items() if (key, value) != ("loss_weight", 1.0)}


def _compared(value: Any) -> Any:
    """Replace files by their digests, for comparison."""
    if isinstance(value, dict):
        return value["digest"] if "digest" in value else {k: _compared(v) for k, v in value.items()}
    return [_compared(v) for v in value] if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "digest" in value:
        return str(value["name"])
    if isinstance(value, list):
        return first_few([_shown(v) for v in value], 3) or "none"
    return value if isinstance(value, str) else shortened(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        value = value.as_dict()
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


# -- files ---------------------------------------------------------------------------------------------------------


def _checkpoint(pretrained: str) -> dict[str, str]:
    """Identify a checkpoint: a folder by its config and sizes of weights, or a released model by name."""
    if Path(pretrained).is_dir():
        return _folder(Path(pretrained), "*.safetensors", sizes=True)
    row = find_model(pretrained)
    return {"name": pretrained, "digest": row.huggingface if row else pretrained}


def _folder(folder: Path, weights: str, sizes: bool = False) -> dict[str, str]:
    total = hashlib.blake2b(digest_size=16)
    for file in [*sorted(folder.glob("*config.json")), *sorted(folder.glob(weights))]:
        content = str(file.stat().st_size) if sizes and file.suffix == ".safetensors" else _digest(file)
        total.update(f"{file.name} {content} ".encode())
    return {"name": str(folder), "digest": total.hexdigest()}


def _rows(text: str) -> dict[str, str]:
    """Identify rows: a file by its content and that of the files a meta file names, or a data set by name."""
    prefix, _, count = text.partition("#")
    file = Path(text).expanduser()
    if file.exists():
        count = ""
    else:
        file = Path(prefix).expanduser()
    if not file.is_file():
        return {"name": text, "digest": text}
    digests = [_digest(file)]
    if is_meta(file):
        for entry in json.loads(file.read_text(encoding="utf-8-sig")).values():
            names = entry["annotation"]
            for name in names if isinstance(names, list) else [names]:
                paths = [Path(str(name)), file.parent / str(name)]
                digests += [_digest(path) for path in paths if path.is_file()][:1]
    return {"name": text, "digest": " ".join(digests) + (f"#{count}" if count else "")}


def _digest(path: Path) -> str:
    try:
        return file_digest(path, hashlib.blake2b(digest_size=16))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
