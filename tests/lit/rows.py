"""A few rows with pictures for tests of the Lightning floor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_rows(folder: Path, count: int = 12, name: str = "train.jsonl") -> Path:
    """Rows of every shape: one image, two images in two turns, a box, text only; answers of unequal length."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for n in range(4):
        size = (90, 60) if n % 2 else (56, 120)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{n}.png")
    kinds = [
        {"query": "<image>What is it?", "response": "a cat", "images": ["0.png"], "source": "single"},
        {
            "query": "<image>And this?",
            "response": "It is a dog on the grass.",
            "history": [["<image>What is it?", "a cat"]],
            "images": ["1.png", "2.png"],
            "source": "turns",
        },
        {
            "query": "Find <ref-object>",
            "response": "<bbox>",
            "images": ["3.png"],
            "objects": [{"caption": "the cat", "bbox": [10, 10, 50, 40], "bbox_type": "real", "image": 0}],
            "source": "grounding",
        },
        {"query": "How many sheep are there?", "response": "four", "source": "text"},
    ]
    path = folder / name
    path.write_text("".join(json.dumps(kinds[n % 4] | {"id": f"row{n}"}) + "\n" for n in range(count)))
    return path


def write_pairs(folder: Path, count: int, name: str) -> Path:
    """Rows of several kinds, each with an answer that another row has."""
    path = write_rows(folder, count, name)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rejected = ["a cow", "It is a cat.", "<box> [[1, 2, 3, 4]] </box>", "seven or eight"]
    for n, row in enumerate(rows):
        row["rejected_response"] = rejected[n % 4]
        if "objects" in row:
            row["rejected_response"], row["rejected_objects"] = (
                "<bbox>",
                [{"caption": "the cat", "bbox": [1, 1, 9, 9], "bbox_type": "real", "image": 0}],
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
