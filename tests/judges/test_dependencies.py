"""Judges that are dependencies: transformers' InternVL on every family's export, peft on its base, TRL's losses."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ivl.commands.export import export
from ivl.data.processor import Processor
from ivl.finetune.adapter import peft_adapter
from ivl.model.internvl import InternVL
from ivl.options import LoRA, Tune
from tests.commands.test_export import write_run
from tests.finetune.record_trl import CASES
from tests.finetune.test_objectives import check_against, models
from tests.judges.conversations import pictures, questions
from tests.judges.make_env import REPO
from tests.judges.results import Result, record, versions_in
from tests.judges.side import run
from tests.tiny import FAMILIES, write_checkpoint

__all__ = ["models"]
NEAR, TOKENS = 1e-4, 12


def inputs_there(processor: Any, row: dict[str, Any]) -> Any:
    """Inputs that transformers' processor makes of a row."""
    images = iter(row["images"])
    messages = [
        message
        | {
            "content": [
                {"type": "image", "image": Image.open(next(images))} if part["type"] == "image" else part
                for part in message["content"]
            ]
        }
        for message in row["messages"]
    ]
    return processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def wrong(model: InternVL, processor: Processor, twin: Any, theirs: Any, row: dict[str, Any]) -> str | None:
    """First of ids, tiles, logits and greedy answer that differs."""
    made, example = inputs_there(theirs, row), processor(row)
    if made["input_ids"][0].tolist() != example.input_ids.tolist():
        return f"ids: {example.input_ids.tolist()}, there {made['input_ids'][0].tolist()}"
    tiles = made.get("pixel_values")
    if (tiles is None) != (not row["images"]) or (tiles is not None and tiles.shape != example.tiles.shape):
        return f"tiles: {None if tiles is None else tiles.shape}"
    ours, found = model(example.input_ids[None], tiles=tiles).logits, twin(**made).logits
    gap = float((ours - found[..., : ours.shape[-1]]).abs().max())
    if gap > NEAR:
        return f"logits: {gap}"
    length = made["input_ids"].shape[1]
    answer = twin.generate(**made, max_new_tokens=TOKENS, do_sample=False)[0, length:].tolist()
    for n, token in enumerate(answer):
        ids = torch.cat([example.input_ids, torch.tensor(answer[:n], dtype=torch.int64)])
        logits = model(ids[None], tiles=tiles).logits[0, -1]
        if logits.max() - logits[token] > NEAR:
            return f"token {n}: {int(logits.argmax())}, there {token}"
        if token == processor.tokenizer.context_id:
            return None  # random weights answered with an image token
    return None


@torch.no_grad()
@pytest.mark.judge
@pytest.mark.parametrize("vision", ["300m", "6b"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_transformers_opens_an_export(architecture, vision, tmp_path):
    base = write_checkpoint(tmp_path / "base", architecture, vision)
    out = export(str(tmp_path / "out"), base=str(base), layout="hf", dtype="float32")
    theirs = AutoProcessor.from_pretrained(out)
    twin = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    model, processor, rows = (
        InternVL.from_pretrained(base),
        Processor.from_pretrained(base),
        questions(pictures(tmp_path / "p")),
    )
    found = [wrong(model, processor, twin, theirs, row) for row in rows]
    different = [text for text in found if text]
    what = f"its own InternVL and processor: ids, tiles, logits, greedy answers, {architecture}, InternViT {vision}"
    record(
        f"transformers_{architecture}_{vision}",
        [Result("transformers", what, len(rows), len(different), {}, {"transformers": version("transformers")})],
    )
    assert not different, different


def moved(model: torch.nn.Module) -> None:
    """Move the halves of a LoRA that begin as zeros."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
@pytest.mark.judge
@pytest.mark.parametrize("architecture", FAMILIES)
def test_peft_on_the_base_of_every_family(architecture, tmp_path):
    """Our adapter on transformers' class by peft, and one that peft made, here."""
    base = export(
        str(tmp_path / "hf"), base=str(write_checkpoint(tmp_path / "base", architecture)), layout="hf", dtype="float32"
    )
    write_run(tmp_path / "run", base, Tune(vision_model=LoRA(rank=2), language_model=LoRA(rank=4)))
    adapter = export(str(tmp_path / "adapter"), run=str(tmp_path / "run"), adapter_only=True)
    theirs, rows, different = AutoProcessor.from_pretrained(base), questions(pictures(tmp_path / "pictures")), []
    processor = Processor.from_pretrained(base)

    def loaded() -> Any:
        return AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()

    made = get_peft_model(
        loaded(), LoraConfig(r=3, target_modules=r".*language_model.*(q_proj|o_proj|qkv_proj)")
    ).eval()
    moved(made)
    made.save_pretrained(str(tmp_path / "theirs"))
    pairs = [("ours there", PeftModel.from_pretrained(loaded(), str(adapter)).eval(), adapter)]
    pairs += [("theirs here", made, tmp_path / "theirs")]
    for way, twin, folder in pairs:
        model = InternVL.from_pretrained(base)
        before = model(processor(rows[0]).input_ids[None]).logits
        peft_adapter.load_adapter(model, Path(folder))
        model.eval()
        assert (model(processor(rows[0]).input_ids[None]).logits - before).abs().max() > 1e-3
        reasons = [wrong(model, processor, twin, theirs, row) for row in rows]
        different += [f"{way}: {reason}" for reason in reasons if reason]
    what = f"LoRA adapters, ours there and its own here: logits and greedy answers, {architecture}"
    versions = {name: version(name) for name in ("peft", "transformers")}
    record(f"peft_{architecture}", [Result("peft", what, 2 * len(rows), len(different), {}, versions)])
    assert not different, different


RECORD = "import json, sys; from tests.finetune.record_trl import record; json.dump(record(), open(sys.argv[1], 'w'))"


@pytest.mark.judge
def test_trl_s_losses(models, tmp_path):
    """Losses, rewards and gradients of batches, and the losses of whole runs, computed now."""
    run("trl", ["-c", RECORD, tmp_path / "trl.json"], tmp_path, PYTHONPATH=str(REPO))
    recorded, different = json.loads((tmp_path / "trl.json").read_text()), []
    for name in CASES:
        try:
            check_against(recorded, models, name)
        except AssertionError as error:
            different.append(f"{name}: {error}")
    runs = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        str(REPO / "tests/finetune/test_trl_trainer.py"),
    ]
    printed = run("trl", [*runs, "--rootdir", str(REPO)], tmp_path, PYTHONPATH=str(REPO))
    (passed,) = map(int, re.findall(r"(\d+) passed", printed))
    assert "skipped" not in printed and "failed" not in printed, printed
    versions = versions_in("trl", "trl", "transformers")
    what = "preference losses, rewards and gradients of its trainer's batches"
    results = [Result("TRL", what, len(CASES), len(different), {}, versions)]
    results.append(Result("TRL", "losses of full runs of its trainer, step for step", passed, 0, {}, versions))
    record("trl", results)
    assert not different, different
