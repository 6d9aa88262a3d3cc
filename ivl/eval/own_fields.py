"""Fields of answer files of any program: those of ms-swift, LLaMA-Factory and others under our names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ALIASES = {
    "response": ("predict", "prediction", "pred", "generated_text", "output", "model_answer"),
    "reference": ("labels", "label", "ground_truth", "gold", "target", "solution", "answer"),
    "prompt": ("query", "question"),
    "source": ("dataset", "channel"),
}
"""Field of this program → names that other programs have for it, tried in order where the row has none of its own"""


def fill(row: Row, folder: Path) -> None:
    """Fill in the fields of a row that it has under another name, or in its `messages`, and its pictures as paths.

    `folder`: of the file of answers, where relative paths may start.
    """
    for field, names in ALIASES.items():
        if row.get(field) is None:
            row[field] = next((row[name] for name in names if row.get(name) is not None), None)
    messages = [m for m in row.get("messages") or [] if isinstance(m, dict)]
    texts = {
        role: [_text(m.get("content")) for m in messages if m.get("role") == role] for role in ("user", "assistant")
    }
    if row["prompt"] is None and texts["user"]:
        row["prompt"] = texts["user"][-1]
    if row["response"] is None and texts["assistant"]:
        row["response"] = texts["assistant"][-1]
    if isinstance(row["reference"], list):
        row["answers"] = row.get("answers") or row["reference"]
        row["reference"] = None
    if row["reference"] is not None:
        row["reference"] = str(row["reference"])
    pictures = row.get("images") or row.get("image") or []
    row["images"] = [path for one in _listed(pictures) if (path := _picture(one, folder))]


def _text(content: Any) -> str:
    """Text of a message, whose content is a text or a list of parts."""
    if isinstance(content, str):
        return content
    parts = [part for part in _listed(content) if isinstance(part, dict)]
    return "".join(str(p["text"]) if p.get("type") == "text" else f"<{p.get('type', 'image')}>" for p in parts)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _picture(value: Any, folder: Path) -> str | None:
    """Path or data: URI of a picture, given by it or as `{bytes, path}`; None for anything else."""
    value = value.get("path") if isinstance(value, dict) else value
    if not isinstance(value, str):
        return None
    beside = folder / value
    return str(beside) if not value.startswith("data:") and not os.path.exists(value) and beside.exists() else value
