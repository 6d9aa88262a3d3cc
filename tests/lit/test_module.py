"""The module under a plain Trainer: any loader of its batches, no data module, no command line."""

import json
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from ivl.__main__ import main
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.lit.callbacks.checkpoint import Checkpoints
from ivl.lit.callbacks.monitor import Watch
from ivl.lit.module import LitInternVL
from ivl.lit.schedule import Warmup
from ivl.options import GenerationOptions, Tune
from ivl.types import UserError
from tests.lit.test_runs import REPO, config

FULL = Tune("frozen", "full", "full")


@pytest.fixture(scope="module")
def processor(base) -> Processor:
    return Processor.from_pretrained(base / "model")


@pytest.fixture(scope="module")
def rows(base, processor) -> list:
    """A plain list of processed rows."""
    return list(RowDataset(base / "data/train.jsonl", processor))


def loader(processor: Processor, rows, **options) -> DataLoader:
    return DataLoader(rows, collate_fn=processor.collate, batch_size=2, **options)


def quiet(root: Path, *callbacks, **options) -> Trainer:
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"max_epochs": 1, "default_root_dir": root, "enable_checkpointing": bool(callbacks)}
    return Trainer(callbacks=list(callbacks), **quiet | options)


def test_a_plain_trainer_and_a_list_of_rows_train_as_the_command_line_does(base, tmp_path, processor, rows):
    module = LitInternVL(
        str(base / "model"),
        FULL,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),  # the command line's default decay
        schedule=lambda optimizer, steps: Warmup(optimizer, steps, 0, "constant"),
    )
    options = {"gradient_clip_val": 0.5, "max_epochs": 2}
    quiet(tmp_path, Watch(), accumulate_grad_batches=6, **options).fit(module, loader(processor, rows))
    changes = {f"trainer__{name}": value for name, value in options.items()}
    changes |= {"data__batch_size": 12, "data__val": None}
    changes |= {"model__tune": {"vision_model": "frozen", "mlp1": "full", "language_model": "full"}}
    assert main(["fit", "--config", str(config(base, tmp_path, **changes))]) == 0
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    trained = {f"model.{name}": p for name, p in module.model.named_parameters() if p.requires_grad}
    assert saved["state_dict"].keys() == trained.keys()
    for name, tensor in saved["state_dict"].items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-6, rtol=1e-4)
    assert module.total_steps == 2


def test_a_run_is_resumed_from_a_plain_checkpoint(base, tmp_path, processor, rows):
    states = []
    for path in (None, tmp_path / "epoch=0-step=6.ckpt"):
        module = LitInternVL(str(base / "model"), FULL)
        saves = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
        quiet(tmp_path, saves, max_epochs=2).fit(module, loader(processor, rows), ckpt_path=path)
        states.append({n: p.clone() for n, p in module.model.named_parameters()})
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name


def test_rows_are_validated_and_each_batch_predicts_its_own(base, tmp_path, processor, rows):
    module = LitInternVL(str(base / "model"), FULL, generation=GenerationOptions(max_new_tokens=4))
    trainer = quiet(tmp_path)
    (scores,) = trainer.validate(module, loader(processor, rows), verbose=False)
    assert scores["val/loss"] > 0 and scores["val/exact"] == 0 and scores["val/grounding/iou"] == 0
    assert [answer["row"].id for answer in module.answers] == [f"row{n}" for n in range(12)]
    batches = quiet(tmp_path).predict(module, loader(processor, rows))
    assert [sorted(row["id"] for row in batch) for batch in batches] == [
        sorted([f"row{n}", f"row{n + 1}"]) for n in range(0, 12, 2)
    ]
    answers = {row["id"]: row for batch in batches for row in batch}
    prompt = processor.collate([processor(rows[0].conversation.as_prompt())])
    alone = processor.decode(module.model.eval().generate(prompt, max_new_tokens=4)[0])
    assert answers["row0"]["response"] == alone and answers["row0"]["reference"] == "a cat"
    assert answers["row3"]["index"] == 3


def test_a_lora_of_a_plain_trainer_is_written_as_an_adapter(base, tmp_path, processor, rows):
    saves = Checkpoints(dirpath=str(tmp_path / "checkpoints"))
    quiet(tmp_path, saves).fit(LitInternVL(str(base / "model")), loader(processor, rows))
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_a_run_without_an_end_has_no_schedule(base, tmp_path, processor, rows):
    with pytest.raises(UserError, match="needs the number of steps; give max_steps"):
        quiet(tmp_path, max_epochs=-1).fit(LitInternVL(str(base / "model")), loader(processor, rows))


def test_the_page_s_example_runs(base, tmp_path, monkeypatch, capsys):
    page = (REPO / "docs/finetuning.md").read_text()
    (example,) = re.findall(r"```python\n(.*?Trainer.*?)```", page, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    root = str(base / "data")
    lines = (base / "data/train.jsonl").read_text().splitlines()
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(placed(json.loads(line), root)) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace("internvl2-2b", str(base / "model")), "finetuning.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def placed(row: dict, root: str) -> dict:
    """A row whose pictures have full paths."""
    return row | {"images": [f"{root}/{name}" for name in row.get("images", ())]}


def test_the_module_overrides_few_hooks():
    """A stranger reads it as any other; what a strategy or a guard needs stands where its name says."""
    hooks = {name for name in vars(LitInternVL) if hasattr(LightningModule, name) and not name.startswith("_")}
    assert len(hooks - {"test_step", "on_test_epoch_end"}) <= 10, sorted(hooks)
