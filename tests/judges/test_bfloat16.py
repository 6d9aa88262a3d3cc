"""Exports of bfloat16 bases, as releases are: transformers' InternVL, OpenGVLab's own class and peft, against ours."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from ivl.commands.export import export
from ivl.data.processor import Processor
from ivl.finetune.adapter import peft_adapter
from ivl.model.internvl import InternVL
from ivl.options import LoRA, Tune
from tests.commands.test_export import stored, write_run
from tests.judges.conversations import pictures, questions
from tests.judges.precision import Pair, differing, distance, pair
from tests.judges.results import Result, record, versions_in
from tests.judges.side import answer, checkout, interpreter
from tests.judges.test_dependencies import inputs_there, moved
from tests.tiny import FAMILIES, write_checkpoint

DTYPES = ("float32", "bfloat16")
PROJECTIONS = r".*language_model.*(q_proj|o_proj|qkv_proj)"
KINDS: dict[str, dict[str, Any]] = {"LoRA": {}, "DoRA": {"use_dora": True}, "PiSSA": {"init_lora_weights": "pissa"}}
"""Kind of adapter → options of peft"""
ADAPTERS = [(architecture, "LoRA") for architecture in FAMILIES]
ADAPTERS += [("Qwen2ForCausalLM", "DoRA"), ("Qwen2ForCausalLM", "PiSSA")]
OWN = ["InternLM2ForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM", "LlamaForCausalLM"]
"""Language models of OpenGVLab's class"""


def written(tmp_path: Path, architecture: str, vision: str = "300m") -> Path:
    return write_checkpoint(tmp_path / "base", architecture, vision, dtype=torch.bfloat16)


def opened(folder: Path, dtype: str) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def logits(model: InternVL, twin: Any, processor: Processor, theirs: Any, rows: list[dict], dtype: str) -> list[Pair]:
    """Logits of both for each row."""
    found = []
    for row in rows:
        made = {
            k: v.to(getattr(torch, dtype)) if k == "pixel_values" else v for k, v in inputs_there(theirs, row).items()
        }
        ours = model(processor(row).input_ids[None], tiles=made.get("pixel_values")).logits
        assert ours.dtype == getattr(torch, dtype)
        found.append(pair(ours, twin(**made).logits))
    return found


@torch.no_grad()
@pytest.mark.judge
@pytest.mark.parametrize("vision", ["300m", "6b"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_transformers_on_a_bfloat16_export(architecture, vision, tmp_path):
    base = written(tmp_path, architecture, vision)
    out = export(str(tmp_path / "out"), base=str(base), layout="hf")
    theirs, processor, rows = (
        AutoProcessor.from_pretrained(out),
        Processor.from_pretrained(base),
        questions(pictures(tmp_path / "p")),
    )
    exact, rounded = (
        logits(InternVL.from_pretrained(base, dtype=dtype), opened(out, dtype), processor, theirs, rows, dtype)
        for dtype in DTYPES
    )
    wrong, known = differing(exact, rounded)
    what = f"logits of a bfloat16 export, in bfloat16 and in float32, {architecture}, InternViT {vision}"
    versions = {"transformers": version("transformers")}
    record(
        f"transformers_bfloat16_{architecture}_{vision}",
        [Result("transformers", what, 2 * len(rows), len(wrong), known, versions)],
    )
    assert not wrong, wrong


@torch.no_grad()
@pytest.mark.judge
@pytest.mark.parametrize("vision", ["300m", "6b"])
@pytest.mark.parametrize("architecture", OWN)
def test_the_release_s_own_class_on_a_bfloat16_export(architecture, vision, tmp_path):
    interpreter("internvl")
    code = checkout("IVL_INTERNVL", "OpenGVLab/InternVL", "internvl_chat/internvl/train/dataset.py")
    out = export(str(tmp_path / "out"), base=str(written(tmp_path, architecture, vision)))
    processor, rows = Processor.from_pretrained(out), questions(pictures(tmp_path / "pictures"))
    examples = [processor(row) for row in rows]
    for n, example in enumerate(examples):
        if len(example.tiles):
            np.save(tmp_path / f"tiles{n}.npy", Processor.pixel_values(example.tiles).numpy())
    task = {"checkout": str(code / "internvl_chat"), "folder": str(out), "dtypes": DTYPES, "work": str(tmp_path)}
    task |= {"rows": [example.input_ids.tolist() for example in examples], "context": processor.tokenizer.context_id}
    answer("internvl", task, tmp_path, "internvl_model_side.py", PYTHONPATH="")
    found = []
    for dtype in DTYPES:
        model = InternVL.from_pretrained(out, dtype=dtype)
        found.append([])
        for n, example in enumerate(examples):
            theirs = torch.from_numpy(np.load(tmp_path / f"logits{n}-{dtype}.npy"))
            found[-1].append(pair(model(example.input_ids[None], tiles=example.tiles).logits, theirs))
    wrong, known = differing(*found)
    what = f"its own class on a bfloat16 export: logits in bfloat16 and in float32, {architecture}, InternViT {vision}"
    versions = versions_in("internvl", "transformers")
    record(
        f"internvl_bfloat16_{architecture}_{vision}",
        [Result("OpenGVLab", what, 2 * len(rows), len(wrong), known, versions)],
    )
    assert not wrong, wrong


def adapter_of(kind: str, base: Path, tmp_path: Path) -> Path:
    """Adapter folder: a LoRA of a run here, another kind by peft."""
    if kind == "LoRA":
        write_run(tmp_path / "run", base, Tune(vision_model=LoRA(rank=2), language_model=LoRA(rank=4)))
        return export(str(tmp_path / "adapter"), run=str(tmp_path / "run"), adapter_only=True)
    torch.manual_seed(3)
    made = get_peft_model(opened(base, "bfloat16"), LoraConfig(r=3, target_modules=PROJECTIONS, **KINDS[kind]))
    moved(made)
    made.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def merged_tensors(adapter: Path, base: Path, exact: Any, rounded: Any, tmp_path: Path) -> tuple[int, list[str], int]:
    """Tensors of our merged export beside those of peft's: number, wrong ones, those that are rounded once here alone.

    `exact`, `rounded`: peft's merged models in float32 and in bfloat16.
    """
    out = export(str(tmp_path / "merged"), adapter=str(adapter), base=str(base), layout="hf")
    exact.save_pretrained(str(tmp_path / "exact"))
    rounded.save_pretrained(str(tmp_path / "rounded"))
    ours, truth, theirs = (stored(folder) for folder in (out, tmp_path / "exact", tmp_path / "rounded"))
    assert ours.keys() == theirs.keys()
    other = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    wrong = [
        f"{n}: not rounded once" for n in other if distance([ours[n]], [truth[n]]) > distance([theirs[n]], [truth[n]])
    ]
    return len(ours), wrong, len(other) - len(wrong)


@torch.no_grad()
@pytest.mark.judge
@pytest.mark.parametrize(("architecture", "kind"), ADAPTERS)
def test_peft_on_a_bfloat16_base(architecture, kind, tmp_path):
    """An adapter beside the base and merged into it; the merged weights of an export are peft's own."""
    base = export(str(tmp_path / "hf"), base=str(written(tmp_path, architecture)), layout="hf")
    adapter, rows = adapter_of(kind, base, tmp_path), questions(pictures(tmp_path / "pictures"))
    processor, theirs = Processor.from_pretrained(base), AutoProcessor.from_pretrained(base)
    beside, merged, unloaded = [], [], []
    for dtype in DTYPES:
        model = InternVL.from_pretrained(base, dtype=dtype)
        peft_adapter.load_adapter(model, adapter)
        twin = PeftModel.from_pretrained(opened(base, dtype), str(adapter)).eval()
        beside.append(logits(model.eval(), twin, processor, theirs, rows, dtype))
        peft_adapter.merge(model)
        unloaded.append(twin.merge_and_unload())
        merged.append(logits(model, unloaded[-1], processor, theirs, rows, dtype))
    found = [differing(*pairs) for pairs in (beside, merged)]
    tensors, wrong, once = merged_tensors(adapter, base, *unloaded, tmp_path)
    known = {name: sum(counts.get(name, 0) for _, counts in found) for name in {n for _, c in found for n in c}}
    known |= {"rounded once here, twice there": once} if once else {}
    wrong += [text for texts, _ in found for text in texts]
    what = f"{kind} on a bfloat16 base, apart and merged: logits in bfloat16 and float32, weights, {architecture}"
    versions = {name: version(name) for name in ("peft", "transformers")}
    record(
        f"peft_bfloat16_{kind}_{architecture}",
        [Result("peft", what, 4 * len(rows) + tensors, len(wrong), known, versions)],
    )
    assert not wrong, wrong
