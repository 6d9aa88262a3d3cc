"""Runs on a GPU by each recipe: losses near those of the CPU, and memory near what `plan` predicts."""

import shutil

import pytest
import torch

from ivl.__main__ import main
from ivl.estimate.hardware import CONTEXT
from ivl.estimate.memory import memory_needed
from ivl.estimate.training_step import BatchShape, ShallowModel, TrainSetup
from ivl.finetune.tune import apply
from ivl.model.internvl import InternVL
from ivl.options import LoRA, Tune
from tests.gpu.conftest import ON_CPU
from tests.lit.rows import write_rows
from tests.lit.test_runs import config, fit, losses
from tests.tiny import write_checkpoint

LORA = {"vision_model": "frozen", "mlp1": "full", "language_model": {"rank": 4, "dropout": 0.0}}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Widths that 4-bit blocks of 64 numbers divide"""
FUSED = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "fused": True}}
ADAM_8BIT = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 0.001}}
RECIPES = {
    "lora": {"model__tune": LORA},
    "full": {},
    "packed": {"data__packing": True, "data__pack_tokens": 600},
    "bf16": {"trainer__precision": "bf16-mixed", "model__optimizer": FUSED},
    "fp16": {"trainer__precision": "16-mixed"},
    "recomputed": {"model__checkpointing": {"vision_model": True, "language_model": True}},
    "compiled": {"model__compile": True, "data__packing": True, "data__pack_tokens": 600},
    "qlora": {"model__tune": LORA, "model__quantize": "nf4", "trainer__precision": "bf16-mixed"},
    "int8": {"model__tune": LORA, "model__quantize": "int8", "trainer__precision": "bf16-mixed"},
    "fp8": {"model__tune": LORA, "model__quantize": "fp8", "trainer__precision": "bf16-mixed"},
    "adam_8bit": {"model__optimizer": ADAM_8BIT},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model", llm=WIDE)
    write_rows(folder / "data", 16)
    write_rows(folder / "data", 4, "val.jsonl")
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_as_on_the_cpu(base, tmp_path, device, recipe):
    changes = RECIPES[recipe]
    if recipe in ("qlora", "int8", "adam_8bit"):
        pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    if recipe == "compiled" and not any(map(shutil.which, ("g++", "clang++", "gcc"))):
        pytest.skip("needs a C++ compiler")
    if ON_CPU and recipe in ("fp16", "adam_8bit"):
        pytest.skip("a GPU alone has it")
    plain = {key: value for key, value in changes.items() if key in ("model__tune", "model__optimizer")}
    if recipe == "adam_8bit":
        plain["model__optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}}
    fit(base, tmp_path / "cpu", **plain, trainer__max_steps=3)
    fit(base, tmp_path / "gpu", **changes, trainer__accelerator="cpu" if ON_CPU else "gpu", trainer__max_steps=3)
    tolerance = 0.25 if recipe in ("qlora", "int8", "fp8") else 0.05 if "trainer__precision" in changes else 1e-3
    expected, found = losses(tmp_path / "cpu"), losses(tmp_path / "gpu")
    if "data__packing" in changes:  # of other rows a step
        expected, found = expected[:1], found[:1]
        tolerance = 0.3
    assert found == pytest.approx(expected, abs=tolerance)


def test_a_run_is_resumed_bit_for_bit(base, tmp_path, device):
    common = {"trainer__accelerator": "cpu" if ON_CPU else "gpu", "model__tune": LORA, "model__optimizer": FUSED}
    whole = fit(base, tmp_path / "whole", **common, trainer__max_epochs=2)
    fit(base, tmp_path / "parts", **common, trainer__max_epochs=1)
    resumed = fit(base, tmp_path / "parts", "--ckpt_path", "last", **common, trainer__max_epochs=2)
    for name, tensor in whole.items():
        assert torch.equal(resumed[name].cpu(), tensor.cpu()), name


def test_predictions_are_those_of_the_cpu(base, tmp_path, device):
    answers = []
    for place in ("cpu", "cpu" if ON_CPU else "gpu"):
        file = tmp_path / f"{place}{len(answers)}.jsonl"
        path = config(base, tmp_path / place, trainer__accelerator=place, data__predict=str(base / "data/val.jsonl"))
        assert main(["predict", "--config", str(path), "--predictions.file", str(file)]) == 0
        answers.append(file.read_text())
    assert answers[0] == answers[1]


def test_lack_of_memory_names_the_rows(base, tmp_path, device, capsys):
    if ON_CPU:
        pytest.skip("a GPU alone has a limit that a test can set")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(max(1e-4, 24e6 / total), device)
    try:
        path = config(base, tmp_path, trainer__accelerator="gpu")
        assert main(["fit", "--config", str(path)]) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["full", "lora"])
def test_memory_is_what_plan_predicts(tmp_path, device, name):
    """A language model of 30 M parameters, packed rows without pictures: within a fifth."""
    llm = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    if ON_CPU:
        pytest.skip("a GPU alone counts what tensors take")
    tune = Tune("full", "full", "full") if name == "full" else Tune(language_model=LoRA(8, dropout=0.05))
    model = InternVL.from_pretrained(write_checkpoint(tmp_path, llm=llm), dtype="bfloat16", device=device)
    apply(model, tune)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(0, 200, (1, 8192), device=device)
    batch = {"input_ids": ids, "labels": ids.clone(), "row_ids": torch.zeros_like(ids)}
    batch |= {"position_ids": torch.arange(8192, device=device)[None], "tiles_per_row": torch.tensor([0])}
    batch |= {"tiles": torch.zeros(0, 3, 56, 56, dtype=torch.uint8, device=device), "lengths": torch.tensor([8192])}
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated(device)
    setup = TrainSetup(tune, precision="bf16-mixed")
    needed = memory_needed(ShallowModel(model.config, setup), BatchShape(1, 8192, 0, 8192, packed=True))
    assert measured == pytest.approx(needed.total - CONTEXT, rel=0.2)
