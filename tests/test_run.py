"""The folder of a run: its config, checkpoints, adapter and held-out rows are found in one place."""

from pathlib import Path

import pytest
import torch
import yaml

from ivl.lit.arguments import run_config, with_todays_classes
from ivl.options import LoRA
from ivl.run import Run, run_and_checkpoint
from ivl.types import UserError

SETTINGS = {
    "model": {"pretrained": "internvl2-2b", "tune": {"language_model": {"rank": 2}}, "quantize": "int8"},
    "data": {"val": "val.jsonl", "max_tiles": 3},
}


def save(path: Path, step: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "state_dict": {}}, path)
    return path


@pytest.fixture
def run(tmp_path) -> Run:
    folder = tmp_path / "runs/version_0"
    save(folder / "checkpoints/last.ckpt", 4)
    save(folder / "checkpoints/step=2.ckpt", 2)
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    return Run(folder)


def test_a_run_says_what_is_in_it(run):
    assert (run.base, run.model["quantize"], run.data["max_tiles"]) == ("internvl2-2b", "int8", 3)
    assert run.tune.language_model == LoRA(rank=2)
    assert run.adapter is None and run.split_file is None and run.validation_files == "val.jsonl"
    (run.folder / "adapter").mkdir()
    (run.folder / "adapter/adapter_config.json").write_text("{}")
    (run.folder / "validation-split.json").write_text("{}")
    assert run.adapter == run.folder / "adapter" and run.split_file == run.folder / "validation-split.json"


def test_the_last_checkpoint_is_the_furthest_whole_one(run):
    assert run.last_checkpoint() == run.folder / "checkpoints/last.ckpt"
    last = run.folder / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:100])
    notices: list[str] = []
    assert run.last_checkpoint(notices.append) == run.folder / "checkpoints/step=2.ckpt"
    assert notices and notices[0].startswith(f"{last}: ")
    (run.folder / "checkpoints/step=2.ckpt").unlink()
    with pytest.raises(UserError, match="no whole checkpoint in checkpoints/"):
        run.last_checkpoint(notices.append)


def test_a_run_is_found_from_its_checkpoint_and_its_folder(run, tmp_path):
    last = run.folder / "checkpoints/last.ckpt"
    assert Run.of(last) == Run.of(run.folder) == run
    assert Run.of(tmp_path / "elsewhere/last.ckpt") is None is Run.of(None)
    assert run_and_checkpoint(run.folder, "--run", "--adapter") == run_and_checkpoint(last, "--run", "--adapter")
    for path, words in (
        (tmp_path / "none", "no such folder"),
        (run.folder / "checkpoints/none.ckpt", "no such file"),
        (save(tmp_path / "alone/checkpoints/last.ckpt", 1), "no config.yaml of its run beside it"),
    ):
        with pytest.raises(UserError, match=f"--run {path}: {words}"):
            run_and_checkpoint(path, "--run", "--adapter")


def test_a_config_that_is_none_of_a_run_is_refused(run):
    (run.folder / "config.yaml").write_text("model: {tune: {}}")
    with pytest.raises(UserError, match=r"config\.yaml: not the config of a run"):
        _ = run.base


def test_a_run_s_folder_stands_for_its_last_checkpoint(run):
    last, config = str(run.folder / "checkpoints/last.ckpt"), str(run.folder / "config.yaml")
    words = ["predict", "--ckpt_path", str(run.folder)]
    assert run_config(words) == ["predict", "--config", config, *words[1:], "--ckpt_path", last]
    assert run_config(["fit", *words[1:]]) == ["fit", *words[1:], "--ckpt_path", last]
    assert run_config([*words, "--config", "mine.yaml"])[-2:] == ["--ckpt_path", last]


def test_class_paths_of_earlier_versions_are_read_as_today_s(run, capsys):
    config = run.folder / "config.yaml"
    strategy = {"class_path": "ivl.lit.split.LayerSplit", "init_args": {"devices": 2}}
    config.write_text(yaml.safe_dump(SETTINGS | {"trainer": {"strategy": strategy}}))
    for argv in (["predict", "--config", str(config)], ["predict", f"--config={config}"]):
        text = with_todays_classes(argv)[-1].removeprefix("--config=")
        read = yaml.safe_load(text)["trainer"]["strategy"]
        assert read == strategy | {"class_path": "ivl.lit.strategies.layer_split.LayerSplit"}
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"note: {config}: ivl.lit.split.LayerSplit is ivl.lit.strategies.layer_split.LayerSplit")
    assert run.config["trainer"]["strategy"]["class_path"] == "ivl.lit.strategies.layer_split.LayerSplit"
    words = ["fit", "--trainer.strategy", "ivl.lit.sharded.Sharded"]
    assert with_todays_classes(words)[-1] == "ivl.lit.strategies.fsdp.Sharded"
    plain = ["fit", "--config", str(run.folder / "none.yaml")]
    assert with_todays_classes(plain) == plain


def test_every_moved_class_is_where_the_table_says():
    import importlib

    from ivl.run import MOVED_CLASSES

    for place in MOVED_CLASSES.values():
        module, _, name = place.rpartition(".")
        assert hasattr(importlib.import_module(module), name)
