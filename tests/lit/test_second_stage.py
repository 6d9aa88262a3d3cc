"""`fit --model.adapter DIR` goes on training an adapter on other rows, with its rank and layers, from its values."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ivl.__main__ import main
from tests.lit.rows import write_rows
from tests.lit.test_runs import config
from tests.tiny import write_checkpoint

TUNE = {"vision_model": {"last": 1}, "mlp1": "full", "language_model": {"rank": 3, "alpha": 5, "dropout": 0.1}}
ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}


def run(base: Path, root: Path, *more: str, **changes) -> int:
    return main(["fit", "--config", str(config(base, root, model__optimizer=ADAM, data__val=None, **changes)), *more])


def second(base: Path, root: Path, adapter: Path, *more: str, **changes) -> int:
    write_rows(base / "data", 8, "stage2.jsonl")
    changes = {"model__tune": None, "data__train": str(base / "data/stage2.jsonl")} | changes
    return run(base, root, "--model.adapter", str(adapter), *more, **changes)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stage1")
    assert run(base, root, model__tune=TUNE) == 0
    return root / "run/adapter"


def test_an_adapter_goes_on_training_from_its_values(base, adapter, tmp_path):
    still = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}
    path = config(base, tmp_path / "still", model__optimizer=still, data__val=None, model__tune=None)
    assert main(["fit", "--config", str(path), "--model.adapter", str(adapter)]) == 0
    before, kept = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "still/run/adapter"))
    assert before.keys() == kept.keys() and all(torch.equal(before[name], kept[name]) for name in before)

    assert second(base, tmp_path / "two", adapter) == 0
    after = load_file(tmp_path / "two/run/adapter/adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) / 2
    settings = json.loads((tmp_path / "two/run/adapter/adapter_config.json").read_text())
    assert settings["r"] == 3 and set(settings["alpha_pattern"].values()) == {5}
    said = yaml.safe_load((tmp_path / "two/run/config.yaml").read_text())["model"]
    assert said["tune"]["language_model"]["rank"] == 3 and said["tune"]["language_model"]["dropout"] == 0.1
    assert said["tune"]["mlp1"] == "full" and said["tune"]["vision_model"] == {"last": 1}
    assert load_file(adapter / "adapter_model.safetensors").keys() == before.keys()


def test_such_a_run_resumes_validates_and_is_exported(base, adapter, tmp_path):
    assert second(base, tmp_path / "whole", adapter, trainer__max_epochs=2) == 0
    steps = {"checkpoint__save_top_k": -1, "checkpoint__every_n_train_steps": 1}
    assert second(base, tmp_path / "cut", adapter, trainer__max_epochs=2, **steps) == 0
    for path in (tmp_path / "cut/run/checkpoints").glob("*.ckpt"):
        if "step=1" not in path.name:
            path.unlink()
    assert second(base, tmp_path / "cut", adapter, "--ckpt_path", "last", trainer__max_epochs=2) == 0
    whole, cut = (
        torch.load(tmp_path / name / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "cut")
    )
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    run_folder = tmp_path / "cut/run"
    last, rows = str(run_folder / "checkpoints/last.ckpt"), str(base / "data/val.jsonl")
    assert main(["test", "--ckpt_path", last, "--data.test", rows]) == 0
    assert main(["export", "--run", str(run_folder), "--out", str(tmp_path / "out")]) == 0


def test_what_is_typed_against_an_adapter_is_refused_in_one_line(base, adapter, tmp_path, capsys):
    assert second(base, tmp_path / "same", adapter, model__tune=TUNE) == 0
    capsys.readouterr()
    for changed, words in (
        ({"language_model": {"rank": 4}}, "language_model: a LoRA of rank 4, alpha 8, but the adapter in"),
        ({"mlp1": "frozen"}, "mlp1: frozen, but the adapter in"),
    ):
        assert second(base, tmp_path / "other", adapter, model__tune=TUNE | changed) == 2
        text = capsys.readouterr().err
        (line,) = [x for x in text.splitlines() if x.startswith("error:")]
        assert f"model.tune.{words}" in line and "Traceback" not in text


def test_an_adapter_of_another_model_is_refused(base, adapter, tmp_path, capsys):
    write_checkpoint(tmp_path / "another")
    assert second(base, tmp_path / "a", adapter, model__pretrained=str(tmp_path / "another")) == 2
    assert "was made for" in capsys.readouterr().err
    odd = tmp_path / "odd"
    shutil.copytree(adapter, odd)
    settings = json.loads((odd / "adapter_config.json").read_text())
    settings["alpha_pattern"][next(iter(settings["rank_pattern"]))] = 99
    (odd / "adapter_config.json").write_text(json.dumps(settings))
    assert second(base, tmp_path / "b", odd) == 2
    assert "language_model has layers of several ranks [3] or alphas" in capsys.readouterr().err
