"""Benchmarks of `--data.task`: their rows, and their settings where the user typed none."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from ivl.data.cache import default_cache, writable
from ivl.eval.benchmarks.tasks import Task, task
from ivl.types import Conversation


def rows_file(name: str, root: str, cache_dir: str | Path | None = None) -> Path:
    """Write the questions of a benchmark as a file of rows, from the official files below `root`.

    The file is kept in the cache under a digest of its content. Raises UserError where a file is missing or broken.
    """
    digest = hashlib.sha256()
    partial = writable(Path(cache_dir or default_cache()) / "tasks" / f".{name}-{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            for row in task(name, "--data.task").rows(Path(root).absolute()):
                line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                digest.update(line)
                file.write(line)
        path = partial.with_name(f"{name}-{digest.hexdigest()[:16]}.jsonl")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def settings(benchmark: Task) -> dict[str, Any]:
    """Published options of a benchmark: its own, greedy decoding, and no row shortened or turned."""
    options = {
        "model.generation.max_new_tokens": benchmark.max_new_tokens,
        "model.generation.min_new_tokens": benchmark.min_new_tokens,
        "model.generation.temperature": 0.0,
        "model.generation.top_p": 1.0,
        "model.generation.top_k": 0,
        "model.generation.repetition_penalty": 1.0,
        "model.generation.num_beams": 1,
        "model.generation.stop": (),
        "data.max_tiles": benchmark.max_tiles,
        "data.max_prompt_length": None,
        "data.exif": False,
        "data.system_message": None,
        "data.thinking": None,
        "data.share_tiles": False,
        "data.dynamic_image_size": None,
        "data.pad2square": None,
    }
    if benchmark.frames:
        video = {"num_segments": benchmark.frames, "fps": None, "sample": "middle", "max_tiles": benchmark.max_tiles}
        options |= {f"data.video.{name}": value for name, value in video.items()}
        options["data.video.frame_prefix"] = benchmark.frame_prefix
    return options


def apply(config: Namespace, argv: Iterable[str]) -> list[str]:
    """Set the options of `config.data.task` in a parsed config; one typed in `argv` is the user's and stays.

    Returns a line for each option of the user that differs from the benchmark's.
    """
    typed = {arg.removeprefix("--").partition("=")[0] for arg in argv if arg.startswith("--")}
    notices = []
    for option, value in settings(task(config.data.task, "--data.task")).items():
        parents = option.split(".")
        is_typed = any(".".join(parents[:n]) in typed for n in range(1, len(parents) + 1))
        if not is_typed:
            config[option] = value
        elif config[option] != value:
            notices.append(f"{option} {config[option]} as given (published: {value})")
    return notices


def score_fields(row: Conversation) -> dict[str, Any]:
    """Fields of a prediction for `python -m ivl score` and its report: ground truth, and paths of pictures.

    Pictures inside the row (data: URIs, bytes) are left out: `score --rows` finds them again.
    """
    images = [m.source for m in row.media if m.kind == "image" and isinstance(m.source, (str, os.PathLike))]
    images = [str(source) for source in images if not str(source).startswith("data:")]
    return row.truth | ({"images": images} if images else {})
