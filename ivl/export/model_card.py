"""Model card of an exported folder, README.md: base, licence, data, options, scores and versions of its run.

Files are named without their folders, since a card is read by others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ivl import __version__
from ivl.architecture.config import read_json
from ivl.architecture.families import find_model
from ivl.hub.dataset_files import NAME as DATASET
from ivl.run import Run

CARD = "README.md"
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)$")
_SHOWN = (
    *("model.objective", "model.loss_reduction", "model.optimizer", "model.schedule", "model.quantize"),
    *("model.label_smoothing", "model.neftune", "data.batch_size", "trainer.accumulate_grad_batches"),
    *("data.packing", "data.pack_tokens", "trainer.max_epochs", "trainer.max_steps", "trainer.precision"),
    *("trainer.gradient_clip_val", "trainer.strategy", "data.max_length", "data.max_tiles", "data.system_message"),
    *("data.thinking", "data.video", "data.seed", "seed_everything"),
)
"""Options of a fit that a card shows, where they have a value"""


def model_card(name: str, report: dict[str, Any], base_folder: Path, run: Run | None, adapter_only: bool) -> str:
    """Return the text of a card. `report`: that of the export; `run`: None where the weights came from none."""
    base, parts = report["base"], report["parts"]
    shown = _link(base, base_folder)
    made = f"LoRA of {_listed(parts)} for {shown}" if adapter_only else shown
    if parts and not adapter_only:
        made = f"{shown}, fine-tuned ({_listed(parts)})"
    sections = [
        _front(report, base_folder, run, adapter_only),
        f"# {name.rpartition('/')[2]}",
        f"{made}. Written with ivl {__version__} in {report['dtype']} and the {report['layout']} layout.",
        "## Use",
        "```shell\n" + "\n".join(command.format(name) for command in _commands(report, adapter_only)) + "\n```",
    ]
    if run is not None:
        sections += _sections_of_run(run)
    sections += ["## Licence", _licence_line(base, base_folder)]
    return "\n\n".join(sections) + "\n"


def hub_id(base: str, folder: Path | None = None) -> str | None:
    """Return OWNER/NAME of a base on Hugging Face; None for a folder of this machine that did not come from there."""
    if row := find_model(base.partition("@")[0]):
        return row.huggingface.partition(":")[0]
    if Path(base).is_dir() or "/" not in base:
        match = _CACHED.search(str(folder.parent.parent)) if folder else None
        return f"{match[1]}/{match[2]}" if match else None
    return re.split("[@:]", base)[0]


def with_licence(card: str, licence: str, base: str) -> str:
    """Return a card with the licence of the base, as the hub has it, where the card names none."""
    front = re.match(r"---\n(.*?)---\n", card, re.DOTALL)
    if front is None or re.search(r"^license:", front[1], re.MULTILINE):
        return card
    card = card.replace("---\n", f"---\nlicense: {licence}\n", 1)
    return card.replace(_UNKNOWN.format(base=base), f"{licence}, as its base {base} on the hub.")


_UNKNOWN = "That of the base, {base}: see its own card."


def licence_in(folder: Path) -> str | None:
    """Licence that the card in a checkpoint folder names; None without a card."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    match = re.search(r"^license:[ \t]*['\"]?([\w.-]+)", front[1], re.MULTILINE) if front else None
    return match[1] if match else None


def _front(report: dict[str, Any], folder: Path, run: Run | None, adapter_only: bool) -> str:
    from huggingface_hub import ModelCardData

    base = hub_id(report["base"], folder)
    datasets = sorted({d for source in _sources(run) if (d := _dataset(str(source.get("path"))))}) if run else []
    data = ModelCardData(
        base_model=base,
        license=licence_in(folder),
        library_name="peft" if adapter_only else "transformers",
        pipeline_tag="image-text-to-text",
        datasets=datasets or None,
        tags=["internvl", "ivl", *(["lora"] if adapter_only else [])],
        base_model_relation=None if base is None else "adapter" if adapter_only else "finetune",
    )
    return f"---\n{data.to_yaml()}\n---"


def _link(base: str, folder: Path) -> str:
    name = hub_id(base, folder)
    return f"[{name}](https://huggingface.co/{name})" if name else f"`{Path(base).name}`"


def _licence_line(base: str, folder: Path) -> str:
    name = hub_id(base, folder) or Path(base).name
    if licence := licence_in(folder):
        return f"{licence}, as its base {name}."
    files = sorted(path.name for path in folder.glob("LICENSE*"))
    return f"That of the base: {files[0]}." if files else _UNKNOWN.format(base=name)


def _listed(parts: list[str]) -> str:
    return ", ".join(part.replace("_", " ") for part in parts)


def _commands(report: dict[str, Any], adapter_only: bool) -> list[str]:
    if adapter_only:
        return ["python -m ivl export --adapter {} --out merged"]
    return [command if "(" not in command else f"# {command}" for command in report["commands"].values()]


# -- run -----------------------------------------------------------------------------------------------------------


def _sections_of_run(run: Run) -> list[str]:
    fits = run.fits
    record = fits[-1][1] if fits else {}
    sections = ["## Data", _data(run, record), "## Training", _table(["option", "value"], list(_options(run, record)))]
    if run.scores:
        step, scores = run.scores[-1]["step"], run.scores[-1]["scores"]
        sections += [f"## Scores\n\nOf held-out rows, after step {step}:", _scores(scores)]
    if versions := record.get("versions"):
        sections += ["## Versions", ", ".join(f"{name} {version}" for name, version in versions.items())]
    return sections


def _sources(run: Run) -> list[dict[str, Any]]:
    train = run.data.get("train") or []
    train = train if isinstance(train, list) else [train]
    return [{"path": path} for path in train] + list(run.data.get("mixture") or [])


def _dataset(path: str) -> str | None:
    """OWNER/NAME of a data set on the hub; None for a file or a folder."""
    match = DATASET.fullmatch(path.partition("#")[0])
    is_file = Path(path).suffix or Path(path).exists() or path.startswith((".", "/", "~"))
    return match["repo"] if match and not is_file else None


def _data(run: Run, record: dict[str, Any]) -> str:
    counts = record.get("rows", {})
    weights = {
        str(source["path"]): ", ".join(f"{key} {source[key]:g}" for key in ("repeat", "ratio") if source.get(key))
        for source in _sources(run)
    }
    held = run.data.get("val") or []
    held_out = {str(path) for path in (held if isinstance(held, list) else [held])}
    files = list(counts) or [*weights, *sorted(held_out)]
    rows = []
    for path in files:
        use = "held out" if path in held_out else weights.get(path) or "trained on"
        rows.append([_dataset(path) or Path(path).name, str(counts.get(path, "-")), use])
    text = _table(["rows of", "rows", "used"], rows)
    if fraction := run.data.get("val_fraction"):
        text += f"\n\nA share of {fraction:g} of the rows was held out."
    return text


def _options(run: Run, record: dict[str, Any]) -> Iterator[list[str]]:
    for part, mode in (run.model.get("tune") or {}).items():
        if mode is not None:
            yield [f"model.tune.{part}", _shown(mode)]
    for option in _SHOWN:
        value: Any = run.config
        for key in option.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value not in (None, False, -1, 0, 0.0) or option == "seed_everything":
            yield [option, _shown(value)]
    for key in ("processes", "device"):
        if record.get(key):
            yield [key, str(record[key])]


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        name = str(value["class_path"]).rpartition(".")[2]
        return f"{name}: {_shown(value.get('init_args') or {})}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(v)}" for key, v in value.items() if v not in (None, False))
    if isinstance(value, list):
        return "(" + ", ".join(map(_shown, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _scores(scores: dict[str, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for values in scores.values() for name in values if name != "rows"))
    rows = []
    for kind, values in sorted(scores.items(), key=lambda item: (item[0] == "", item[0])):
        cells = [f"{values[name]:.4g}" if name in values else "-" for name in names]
        rows.append([kind or "all", f"{values.get('rows', 0):.0f}", *cells])
    return _table(["kind of row", "rows", *names], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def private_base(folder: Path) -> str | None:
    """Note on an adapter whose base is a folder of this machine, which others do not have; None for others."""
    file = folder / "adapter_config.json"
    base = str(read_json(file).get("base_model_name_or_path") or "") if file.is_file() else ""
    if base and hub_id(base) is None:
        return (
            f"adapter_config.json names the base by a folder of this machine, {base}; whoever takes the adapter gives "
            "another with --base"
        )
    return None
