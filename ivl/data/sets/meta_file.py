"""Meta files of OpenGVLab: several sources of rows, each with its media folder and repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ivl.data.object_store import is_object
from ivl.data.processor import Processor
from ivl.data.sets.dataset import MixtureSource, RowDataset
from ivl.types import UserError


def read_meta(path: str | Path, processor: Processor, **options: Any) -> list[MixtureSource]:
    """Sources of an OpenGVLab meta file: name → root, annotation, repeat_time, max_dynamic_patch, length.

    `annotation` is a file of rows or a list of them. Paths are tried as seen from the working directory, then from the
    meta file's folder; `root` first from where the annotations are. A `repeat_time` below 1 takes that share of the
    rows, another one each epoch. `length` is not needed. `options` go to `RowDataset`.
    Raises UserError naming the source and the key.
    """
    try:
        meta = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a meta file ({error})") from None
    if not isinstance(meta, dict) or not all(
        isinstance(entry, dict) and "annotation" in entry for entry in meta.values()
    ):
        raise UserError(f'{path}: expected {{"name": {{"root": …, "annotation": …, "repeat_time": 1}}, …}}')
    parts = []
    for name, entry in meta.items():
        files, source_options, repeat = _meta_source(entry, Path(path).parent, f"{path}: {name}")
        rows = RowDataset(files, processor, **(options | {"source": name} | source_options))
        parts.append(MixtureSource(rows, name, repeat=repeat))
    return parts


_META = ("root", "annotation", "repeat_time", "max_dynamic_patch", "length", "data_augment")


def _meta_source(entry: dict[str, Any], folder: Path, where: str) -> tuple[list[str | Path], dict[str, Any], float]:
    """Files, options of `RowDataset`, and repeats of one source of a meta file."""
    if unknown := sorted(entry.keys() - set(_META)):
        raise UserError(f"{where}: {unknown[0]} is not read; expected {', '.join(_META)}; remove it")
    if entry.get("data_augment"):
        raise UserError(f"{where}: data_augment is not supported; expected false")
    repeat = entry.get("repeat_time", 1)
    if not isinstance(repeat, (int, float)) or not 0 < repeat < 1e9:
        raise UserError(f"{where}: expected a repeat_time above 0, found {repeat!r}")
    files = entry["annotation"]
    files = files if isinstance(files, list) else [files]
    if not files or not all(isinstance(file, str) and file for file in files):
        raise UserError(
            f"{where}: annotation: expected a file of rows or a list of them, found {entry['annotation']!r}"
        )
    root, tiles = entry.get("root"), entry.get("max_dynamic_patch")
    if not isinstance(root, (str, type(None))):
        raise UserError(f"{where}: root: expected a folder, found {root!r}")
    if tiles is not None and (not isinstance(tiles, int) or isinstance(tiles, bool) or tiles < 1):
        raise UserError(f"{where}: max_dynamic_patch: expected at least 1, found {tiles!r}")
    here, there = Path(), folder
    paths = [_existing(file, here, there) for file in files]
    if paths != [Path(file) for file in files]:
        here, there = there, here
    source_options = {"root": _existing(root, here, there) if root else None, "max_tiles": tiles}
    return (
        paths,
        {key: value for key, value in source_options.items() if value is not None},
        float(repeat),
    )


def _existing(path: str, *folders: Path) -> str | Path:
    """Path below the first of the folders that has it; relative to the working directory where none has."""
    if is_object(path):
        return path
    return next((folder / path for folder in folders if (folder / path).exists()), Path(path))
