"""lmdeploy's own prompts, ids and pixels of exported folders, without its engine, against ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ivl.commands.export import export
from ivl.data.processor import Processor
from tests.judges.conversations import pictures, questions
from tests.judges.results import Result, record, versions_in
from tests.judges.side import answer, interpreter, with_code
from tests.tiny import write_checkpoint

CASES = {
    "2": [
        ("Qwen2ForCausalLM", "Hermes-2"),
        ("InternLM2ForCausalLM", "internlm2-chat"),
        ("Phi3ForCausalLM", "phi3-chat"),
    ],
    "2.5": [("InternLM2ForCausalLM", "internvl2_5"), ("Qwen2ForCausalLM", "internvl2_5")],
    "3": [("Qwen2ForCausalLM", "internvl2_5")],
    "3.5": [("Qwen3ForCausalLM", "internvl2_5"), ("Qwen3MoeForCausalLM", "internvl2_5")],
}
"""Version → language models and templates"""
NEAR = 0.05
"""Of pixels in transformers' processor, which resizes otherwise; those of the released layout are equal"""


def differences(processor: Processor, row: dict[str, Any], theirs: dict[str, Any], pixels: Path, near: float) -> str:
    """First thing in which a row differs from ours; empty where nothing does."""
    example = processor(row)
    if example.input_ids.tolist() != theirs["ids"]:
        return f"ids: {theirs['prompt']!r}: {example.input_ids.tolist()}, there {theirs['ids']}"
    if not row["images"]:
        return ""
    ours, found = Processor.pixel_values(example.tiles), torch.from_numpy(np.load(pixels))
    if ours.shape != found.shape:
        return f"tiles: {tuple(ours.shape)}, there {tuple(found.shape)}"
    gap = float((ours - found).abs().mean())
    return f"pixels: {gap}" if gap > near else ""


@pytest.mark.judge
@pytest.mark.parametrize("layout", ["hf", "released"])
def test_prompts_ids_and_pixels(layout, tmp_path):
    interpreter("lmdeploy")
    released = layout == "released"
    kinds = [(v, *kind) for v, all_kinds in CASES.items() for kind in all_kinds]
    folders = []
    for n, (_, architecture, template) in enumerate(kinds):
        base = write_checkpoint(tmp_path / f"base{n}", architecture, template=template)
        if released:
            with_code(base)
        folders.append(export(str(tmp_path / f"out{n}"), base=str(base), layout=layout, dtype="float32"))
    rows = questions(pictures(tmp_path / "pictures"))
    task = {"folders": [str(f) for f in folders], "trust": released, "pixels": str(tmp_path), "rows": rows}
    answers, versions, results, different = answer("lmdeploy", task, tmp_path), [], [], []
    versions = versions_in("lmdeploy", "lmdeploy", "transformers")
    for n, ((version, architecture, template), folder, there) in enumerate(zip(kinds, folders, answers, strict=True)):
        processor = Processor.from_pretrained(folder)
        found = [
            differences(processor, row, theirs, tmp_path / f"{n}-{k}.npy", 1e-6 if released else NEAR)
            for k, (row, theirs) in enumerate(zip(rows, there, strict=True))
        ]
        wrong = [text for text in found if text]
        what = f"prompts, ids and pixels, {layout} layout, {version}: {architecture}, {template}"
        results.append(Result("lmdeploy", what, len(rows), len(wrong), {}, versions))
        different += [f"{what}: {text}" for text in wrong]
    record(f"lmdeploy_{layout}", results)
    assert not different, different
