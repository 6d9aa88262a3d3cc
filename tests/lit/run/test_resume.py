"""A resumed run: what is typed counts or is refused, and no other experiment's checkpoint or file is taken."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from ivl.__main__ import main
from ivl.checkpoint.newest import newest_checkpoint, read_head
from ivl.lit.arguments import with_lists
from tests.lit import test_runs
from tests.lit.rows import write_rows
from tests.lit.test_runs import config, losses

LORA = {"vision_model": "frozen", "mlp1": "frozen", "language_model": {"rank": 2}}
ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "weight_decay": 0.1}}
COSINE = {"class_path": "ivl.lit.schedule.Warmup", "init_args": {"warmup": 1, "decay": "cosine"}}
COMMON = {"model__tune": LORA, "model__optimizer": ADAM, "model__schedule": COSINE, "data__val": None}


def run(base: Path, root: Path, *more: str, **changes) -> int:
    return main(["fit", "--config", str(config(base, root, **COMMON | changes)), *more])


def loaded(root: Path, name: str = "run") -> dict:
    return torch.load(root / name / "checkpoints/last.ckpt", weights_only=True)


def rates(root: Path) -> list[float]:
    return test_runs.scalars(root, "lr/language_model")


@pytest.fixture(scope="module")
def first(base, tmp_path_factory) -> Path:
    """A run of one epoch, three steps, in `run`."""
    root = tmp_path_factory.mktemp("first")
    assert run(base, root, checkpoint__save_top_k=-1, checkpoint__every_n_train_steps=1) == 0
    return root


@pytest.fixture
def begun(first, tmp_path) -> Path:
    root = tmp_path / "begun"
    shutil.copytree(first, root)
    return root


def resume(base: Path, root: Path, *more: str, **changes) -> int:
    return run(base, root, "--ckpt_path", str(root / "run/checkpoints/last.ckpt"), *more, **changes)


# -- what is typed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--model.optimizer.lr", "--model.optimizer.init_args.lr"])
def test_a_typed_rate_and_decay_count(base, begun, caplog, option):
    more = ["--trainer.max_epochs", "3", option, "1e-5", "--model.optimizer.init_args.weight_decay", "0.2"]
    with caplog.at_level("INFO"):
        assert run(base, begun, "--ckpt_path", "last", *more) == 0
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("resumed at step 3")]
    assert "lr 0.001 → 1e-05" in said and "weight_decay 0.1 → 0.2" in said and "schedule (3 → 9 steps)" in said
    saved = loaded(begun)
    assert saved["global_step"] == 9
    assert saved["lr_schedulers"][0]["base_lrs"] == [1e-5]
    (group,) = saved["optimizer_states"][0]["param_groups"]
    assert group["weight_decay"] == 0.2 and group["initial_lr"] == 1e-5
    after = rates(begun)[3:]
    assert len(after) == 6 and 0 < max(after) < 1e-5
    settings = yaml.safe_load((begun / "run/config-1.yaml").read_text())
    assert settings["model"]["optimizer"]["init_args"]["lr"] == 1e-5


def test_a_longer_schedule_counts_from_the_first_resumed_step(base, begun, tmp_path):
    """The rates are those of a run that was given the longer schedule from its beginning."""
    assert resume(base, begun, trainer__max_epochs=2) == 0
    assert run(base, tmp_path / "long", trainer__max_epochs=2) == 0
    assert rates(begun)[3:] == rates(tmp_path / "long")[3:]


@pytest.mark.parametrize("every", [None, 1, 2], ids=["at the end", "each step", "each second step"])
def test_a_run_that_max_steps_ended_inside_an_epoch_goes_on_with_the_rest_of_it(base, tmp_path, every):
    changes = {"model__schedule": {"class_path": "ivl.lit.schedule.Warmup", "init_args": {"decay": "constant"}}}
    changes |= {"checkpoint__every_n_train_steps": every} if every else {}
    assert run(base, tmp_path / "cut", "--trainer.max_steps", "2", **changes) == 0
    more = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "2"]
    assert resume(base, tmp_path / "cut", *more, **changes) == 0
    assert run(base, tmp_path / "whole", *more, **changes) == 0
    assert loaded(tmp_path / "cut")["global_step"] == loaded(tmp_path / "whole")["global_step"] == 6
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_schedule_that_cannot_be_changed_on_the_way_is_refused(base, begun, capsys):
    cosine = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR"}
    assert resume(base, begun, trainer__max_epochs=2, model__schedule=cosine) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert "model.schedule: ivl.lit.schedule.Warmup there, torch.optim.lr_scheduler.CosineAnnealingLR here" in line


def test_another_optimizer_is_refused(base, begun, capsys):
    changed = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    assert resume(base, begun, trainer__max_epochs=2, model__optimizer=changed) == 2
    assert "model.optimizer: the checkpoint holds states of AdamW, found SGD" in capsys.readouterr().err
    rates = {"language_model": {"weight_decay": 0.0}}
    assert resume(base, begun, trainer__max_epochs=1, model__rates=rates) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__tune": LORA | {"language_model": {"rank": 4}}}, "'rank': 2"),
        ({"model__tune": LORA | {"mlp1": "full"}}, "model.tune.mlp1 frozen there, full here"),
        ({"data__train": "val.jsonl"}, "data.train"),
        ({"data__batch_size": 2, "trainer__max_epochs": 3}, None),
    ],
    ids=["rank", "tune", "rows", "batches"],
)
def test_another_experiment_is_refused_in_one_line(base, begun, capsys, changes, words):
    changes = dict(changes)
    if "data__train" in changes:
        changes["data__train"] = str(base / "data" / changes["data__train"])
    status = resume(base, begun, **changes)
    if words is None:  # where an epoch ends, batches may change
        assert status == 0
        return
    assert status == 2
    text = capsys.readouterr().err
    (line,) = [x for x in text.splitlines() if x.startswith("error:")]
    assert "of another experiment" in line and words in line and "Traceback" not in text


def test_batches_of_another_size_are_refused_inside_an_epoch(base, begun, capsys):
    path = next((begun / "run/checkpoints").glob("*step=2.ckpt"))
    assert run(base, begun, "--ckpt_path", str(path), data__batch_size=2) == 2
    assert "data.batch_size 4 there, 2 here" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_name_its_experiment_is_checked_by_its_tensors(base, begun, capsys):
    saved = loaded(begun)
    del saved["experiment"], saved["rate_settings"]
    torch.save(saved, begun / "run/checkpoints/last.ckpt")
    assert resume(base, begun, model__tune=LORA | {"language_model": {"rank": 4}}) == 2
    assert "shape (2, " in capsys.readouterr().err


# -- whose checkpoint ----------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_last_belongs_to_an_experiment(base, begun, caplog):
    """The same command with other rows begins anew, in a folder of its own."""
    before = snapshot(begun / "run")
    write_rows(base / "data", 8, "others.jsonl")
    with caplog.at_level("INFO"):
        assert run(base, begun, "--ckpt_path", "last", data__train=str(base / "data/others.jsonl")) == 0
    said = [r.getMessage() for r in caplog.records]
    (line,) = [text for text in said if text.startswith("--ckpt_path last: nothing of this experiment")]
    assert "data.train" in line and "others.jsonl here" in line
    assert snapshot(begun / "run") == before
    assert loaded(begun, "run-1")["global_step"] == 2
    with caplog.at_level("INFO"):  # each goes on in its own folder
        more = {"data__train": str(base / "data/others.jsonl"), "trainer__max_epochs": 2}
        assert run(base, begun, "--ckpt_path", "last", **more) == 0
        assert run(base, begun, "--ckpt_path", "last", trainer__max_epochs=2) == 0
    assert loaded(begun, "run-1")["global_step"] == 4 and loaded(begun)["global_step"] == 6
    assert not (begun / "run-2").exists()


def test_rows_that_changed_in_their_file_are_other_rows(base, tmp_path, caplog):
    rows = write_rows(base / "data", 8, "changing.jsonl")
    assert run(base, tmp_path, data__train=str(rows)) == 0
    rows.write_text(rows.read_text().replace("a cat", "a dog"))
    with caplog.at_level("INFO"):
        assert run(base, tmp_path, "--ckpt_path", "last", data__train=str(rows)) == 0
    assert any("has another content by now" in r.getMessage() for r in caplog.records)
    assert (tmp_path / "run-1/checkpoints/last.ckpt").is_file()


def test_a_run_begun_anew_replaces_no_file_of_the_one_before(base, begun, capsys):
    before = snapshot(begun / "run")
    assert run(base, begun) == 0
    assert snapshot(begun / "run") == before
    assert losses(begun) and (begun / "run-1/adapter/adapter_model.safetensors").is_file()
    folder = begun / "run/checkpoints"
    assert run(base, begun, "--checkpoint.dirpath", str(folder)) == 2
    assert f"--checkpoint.dirpath {folder}: another run's checkpoints stand there" in capsys.readouterr().err
    assert snapshot(begun / "run") == before


def test_a_run_without_a_logger_replaces_no_other(base, tmp_path, capsys):
    path = config(base, tmp_path / "config", data__val=None, trainer__logger=False)
    argv = ["fit", "--config", str(path), "--trainer.default_root_dir", str(tmp_path / "out"), "--trainer.max_steps"]
    assert main([*argv, "1"]) == 0
    before = snapshot(tmp_path / "out")
    assert main([*argv, "2"]) == 2
    assert "without a logger a run has no folder of its own" in capsys.readouterr().err
    assert snapshot(tmp_path / "out") == before
    assert main([*argv, "2", "--ckpt_path", str(tmp_path / "out/checkpoints/last.ckpt")]) == 0


def test_last_goes_by_step_not_by_file_time(begun):
    folder = begun / "run/checkpoints"
    (folder / "last.ckpt").unlink()
    for age, path in enumerate(sorted(folder.glob("*.ckpt"), key=lambda p: read_head(p).step)):
        os.utime(path, (1e9 - age, 1e9 - age))  # the furthest is the oldest
    found = newest_checkpoint([folder])
    assert found is not None and read_head(found).step == 3


# -- options that do not fit ---------------------------------------------------------------------------------------


def test_an_option_of_several_values_given_twice_keeps_both():
    argv = ["fit", "--data.train", "a", "--seed_everything", "1", "--data.train=b", "--data.val", "c"]
    assert with_lists(argv) == ["fit", "--seed_everything", "1", "--data.val", "c", "--data.train", '["a", "b"]']
    assert with_lists(["--data.train", "[a, b]", "--data.train", "c"]) == ["--data.train", '["a", "b", "c"]']
    assert with_lists(["--data.train", "a"]) == ["--data.train", "a"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__schedule": {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau"}}, "model.schedule: "),
        ({"model__schedule": {"class_path": "torch.optim.lr_scheduler.OneCycleLR"}}, "model.schedule: "),
        (
            {"model__optimizer": {"class_path": "torch.optim.LBFGS"}, "model__tune": LORA | {"mlp1": "full"}},
            "model.optimizer: ",
        ),
        ({"model__optimizer": ADAM | {"init_args": {"lr": -1}}}, "model.optimizer: "),
        ({"trainer__logger": {"class_path": "WandbLogger"}}, "lightning.pytorch.loggers.WandbLogger: Requirement"),
    ],
    ids=["plateau", "arguments", "no groups", "rate", "logger"],
)
def test_classes_that_do_not_fit_are_told_in_one_line(base, tmp_path, capsys, changes, words):
    assert run(base, tmp_path, **changes) == 2
    text = capsys.readouterr().err
    (line,) = [x for x in text.splitlines() if x.startswith("error:")]
    assert line.startswith(f"error: {words}") and "Traceback" not in text
